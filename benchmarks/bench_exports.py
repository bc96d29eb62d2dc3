"""Step time through each export target that runs here, against the same step under a plain `autoprec.apply`.

A target's steps and the plain ones take turns in short chunks, the order turning round; a ratio is taken within a
pair of chunks, and the interval is distribution-free. `ddp` and `fsdp2` are one process: what wrapping costs, not
what sending does. `apply again` is the plain loop against itself: what the machine's noise makes of such a ratio.

    python benchmarks/bench_exports.py [--pairs 40] [--steps 5] [--targets accelerate ddp]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29712", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from ratios import ratio_row
from record import ROOT, write_result

import autoprec

sys.path.insert(0, str(ROOT / "examples"))

from exported import Demo, demo, parser  # noqa: E402

#: returns the seconds that n steps took
Chunk = Callable[[int], float]


def fresh() -> Demo:
    """Return the demo model and a plan of BF16 with the head in FP32."""
    return demo(parser("").parse_args(["--steps", "8", "--batch-size", "8", "--seq-len", "128"]))


def loop(program: Any, model: Any, made: Demo) -> Chunk:
    """Return chunks of an exported program's own training loop; a learning rate of 0 leaves the weights alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    batches = cycle(list(made.batches()))

    def chunk(steps: int) -> float:
        started = time.perf_counter()
        program.train(model, islice(batches, steps), optimizer)
        return time.perf_counter() - started

    return chunk


def plain() -> Chunk:
    """The python target: `autoprec.apply` and a loop."""
    made = fresh()
    program = made.program("python")
    return loop(program, program.prepare(made.model), made)


def compiled() -> Chunk:
    """Blocks compiled by inductor."""
    made = fresh()
    program = made.program("torch-compile")
    return loop(program, program.prepare(made.model), made)


def wrapped(target: str, **options: Any) -> Chunk:
    """DDP or FSDP2, in one process."""
    made = fresh()
    program = made.program(target)
    device = torch.device("cpu") if torch.distributed.is_initialized() else program.start()
    return loop(program, program.wrap(made.model, device, **options), made)


def accelerate() -> Chunk:
    """What `accelerate launch` with the exported file makes of the script."""
    from accelerate import Accelerator

    made = fresh()
    autoprec.apply(made.model, made.plan)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.0, weight_decay=0.0)
    model, prepared = accelerator.prepare(made.model, optimizer)
    batches = cycle(list(made.batches()))
    model.train()

    def chunk(steps: int) -> float:
        started = time.perf_counter()
        for batch in islice(batches, steps):
            prepared.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            loss.item()
        return time.perf_counter() - started

    return chunk


def lightning() -> Chunk:
    """Lightning's own loop, from the start of one batch to the start of another, so without its starting up."""
    import lightning as library

    made = fresh()
    program = made.program("lightning")
    module = program.Planned(made.model, learning_rate=0.0)

    class Clock(library.Callback):
        def __init__(self) -> None:
            self.starts: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.starts.append(time.perf_counter())

    def chunk(steps: int) -> float:
        clock = Clock()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = program.make_trainer("cpu", max_steps=steps + 1, gradient_clip_val=1.0, callbacks=[clock], **quiet)
        batches = list(islice(cycle(list(made.batches())), steps + 1))
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        return clock.starts[-1] - clock.starts[0]

    return chunk


SIDES: dict[str, Callable[[], Chunk]] = {
    "apply again": plain,
    "accelerate": accelerate,
    "lightning": lightning,
    "ddp": lambda: wrapped("ddp"),
    "fsdp2": lambda: wrapped("fsdp2"),
    "fsdp2, low_gather": lambda: wrapped("fsdp2", low_gather=True),
    "torch-compile": compiled,
}


def ratio(other: Chunk, base: Chunk, pairs: int, steps: int) -> dict[str, Any]:
    """Return the median ratio of a target's chunks to plain ones, with its interval."""
    base(steps), other(steps)  # warm up, and compile
    ratios = []
    for index in range(pairs):
        first, second = (base, other) if index % 2 else (other, base)
        one, two = first(steps), second(steps)
        ratios.append(two / one if index % 2 else one / two)
    return ratio_row(ratios) | {"pairs": pairs}


def main() -> None:
    """Measure the asked targets, or all."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=40)
    asked.add_argument("--steps", type=int, default=5)
    asked.add_argument("--targets", nargs="*", choices=list(SIDES), default=list(SIDES))
    options = asked.parse_args()
    torch.set_num_threads(2)
    figures: dict[str, Any] = {"step": "train, demo model, 8x128 tokens, BF16 with the head in FP32"}
    for name in options.targets:
        figures[f"{name} / apply"] = ratio(SIDES[name](), plain(), options.pairs, options.steps)
        print(name, figures[f"{name} / apply"], flush=True)
    print(write_result("exports-steps", figures).read_text())


if __name__ == "__main__":
    main()
