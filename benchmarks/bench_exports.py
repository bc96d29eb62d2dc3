"""Step time through each export target that runs here, against the same step under a plain `autoprec.apply`.

A target's steps and the plain ones take turns in short chunks, the order turning round; a ratio is taken within a
pair of chunks, and the interval is distribution-free. `ddp` and `fsdp2` are one process: what wrapping costs, not
what sending does; `keras` is its own model of the same sizes. `apply again` is the plain loop against itself: what
the machine's noise makes of such a ratio.

    python benchmarks/bench_exports.py [--pairs 40] [--steps 5] [--targets accelerate ddp]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29712", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from ratios import ratio_row
from record import ROOT, write_result
from transformers import Trainer

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


def trainer() -> Chunk:
    """Transformers' Trainer, from the start of one step to the start of another, so without its starting up."""
    from transformers import TrainerCallback

    made = fresh()
    program = made.program("transformers")

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.starts: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.starts.append(time.perf_counter())

    rows = [{k: v[i] for k, v in batch.items()} for batch in made.batches() for i in range(len(batch["input_ids"]))]
    settings = {"per_device_train_batch_size": 8, "learning_rate": 0.0, "use_cpu": True, "report_to": "none"}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "no"}
    folder = tempfile.mkdtemp(prefix="autoprec-bench-")
    autoprec.apply(made.model, made.plan)

    def chunk(steps: int) -> float:
        clock = Clock()
        arguments = program.make_arguments(folder, max_steps=steps + 1, **settings, **quiet)
        Trainer(model=made.model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
        return clock.starts[-1] - clock.starts[0]

    return chunk


def keras() -> Chunk:
    """Keras on torch: its own decoder of the same sizes with the plan's policies, AdamW and no clipping."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as library
    import numpy as np
    from train_keras import Decoder

    made = fresh()
    program = made.program("keras")
    model = Decoder(made.model.config, program.policy_map(lambda path: f"decoder/{path}"))
    batches = cycle([np.asarray(batch["input_ids"]) for batch in made.batches()])
    model(next(batches))
    optimizer: Any = library.optimizers.AdamW(0.0)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, auto_scale_loss=False)

    def chunk(steps: int) -> float:
        started = time.perf_counter()
        for ids in islice(batches, steps):
            float(model.train_on_batch(ids[:, :-1], ids[:, 1:]))
        return time.perf_counter() - started

    return chunk


def small_llama() -> tuple[Any, autoprec.Plan]:
    """Return a Llama with random weights and a plan of FP8 in all but a block's FFN and the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    plan = autoprec.Plan.uniform(model, "fp8", fp8_recipe="tensorwise")
    return model, plan.replace({"blocks.0.ffn": "bf16", "lm_head": "bf16"})


def fp8(target: str) -> Chunk:
    """FP8 emulated, by torchao or by apply: torchao converts nn.Linear only, which the demo model has not."""
    model, plan = small_llama()
    made = replace(fresh(), model=model, plan=plan)
    ids = torch.randint(0, 512, (8, 128), generator=torch.Generator().manual_seed(0))
    if target == "torchao":
        program = made.program("torchao")
        model = program.prepare(model, emulate=True)
    else:
        program = fresh().program("python")
        autoprec.apply(model, plan, emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def chunk(steps: int) -> float:
        started = time.perf_counter()
        program.train(model, [{"input_ids": ids, "labels": ids}] * steps, optimizer)
        return time.perf_counter() - started

    return chunk


def forward(target: str) -> Chunk:
    """A forward pass in FP32 with one FFN in FP16, in onnxruntime or by apply; its CPU provider has no BF16."""
    made = fresh()
    plan = autoprec.Plan.uniform(made.model, "fp32", mode="infer").replace({"blocks.0.ffn": "fp16"})
    plan.save(made.plan_path)
    made = replace(made, plan=plan)
    ids = next(made.batches(1))["input_ids"]
    if target == "onnx":
        import onnxruntime

        file = made.plan_path.parent / "model.onnx"
        made.program("onnx").write(made.model, file, input_ids=ids)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        run: Callable[[], Any] = partial(session.run, None, {"input_ids": ids.numpy()})
    else:
        autoprec.apply(made.model.eval(), plan)
        run = partial(made.model, input_ids=ids)

    def chunk(steps: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                run()
        return time.perf_counter() - started

    return chunk


#: by name: what makes a target's chunks, and what makes those of `apply`
SIDES: dict[str, tuple[Callable[[], Chunk], Callable[[], Chunk]]] = {
    "apply again": (plain, plain),
    "transformers": (trainer, plain),
    "accelerate": (accelerate, plain),
    "lightning": (lightning, plain),
    "ddp": (partial(wrapped, "ddp"), plain),
    "fsdp2": (partial(wrapped, "fsdp2"), plain),
    "fsdp2, low_gather": (partial(wrapped, "fsdp2", low_gather=True), plain),
    "torch-compile": (compiled, plain),
    "keras": (keras, plain),
    "torchao, fp8 emulated": (partial(fp8, "torchao"), partial(fp8, "apply")),
    "onnx, forward in fp32 and fp16": (partial(forward, "onnx"), partial(forward, "apply")),
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
        other, base = SIDES[name]
        figures[f"{name} / apply"] = ratio(other(), base(), options.pairs, options.steps)
        print(name, figures[f"{name} / apply"], flush=True)
    print(write_result("exports-steps", figures).read_text())


if __name__ == "__main__":
    main()
