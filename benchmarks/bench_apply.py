"""What applying a plan costs: a train step under uniform BF16 against the same step under `torch.autocast`.

Each round times three steps in rotating order: autocast, the plan, and autocast again (A/A: what the machine's
noise alone makes of such a ratio). The interval is distribution-free, from order statistics of paired ratios.

    python benchmarks/bench_apply.py [--model demo|smollm2] [--pairs 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ratios import ratio_row
from record import ROOT, write_result

from autoprec import Plan, apply
from autoprec.probe.compare import median_ci95
from autoprec.probe.steps import Stepper, timed
from autoprec.probe.workload import Workload, workload_from

#: batch and window of the recorded figures
SIZES = {"demo": (8, 128), "smollm2": (2, 256)}


def workload(model: str) -> Workload:
    """Load a model with two batches of text it was not trained on."""
    rows, window = SIZES[model]
    place = "demo" if model == "demo" else str(ROOT / ".models" / model)
    text = None if model == "demo" else ROOT / ".models" / "austen" / "sense_and_sensibility.txt"
    return workload_from(place, data=text, batch_size=rows, seq_len=window, batches=2, mode="train")


def rounds(found: Workload, pairs: int) -> dict[str, list[float]]:
    """Time `pairs` rounds and return the seconds of each side."""
    found.model.train()
    handle = apply(found.model, Plan.uniform(found.model, "bf16"))
    stepper = Stepper(found)  # one optimizer: all sides step the same FP32 weights by nothing
    device = torch.device("cpu")

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)

    sides: list[tuple[str, Callable[[], AbstractContextManager[Any]], Callable[[], AbstractContextManager[Any]]]] = [
        ("autocast", handle.suspended, autocast),
        ("plan", nullcontext, nullcontext),
        ("autocast again", handle.suspended, autocast),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in sides}
    for index in range(-3, pairs):
        order = sides[index % 3 :] + sides[: index % 3]
        for name, off, around in order if (index // 3) % 2 else reversed(order):
            with off(), around():
                spent, _ = timed(device, partial(stepper.run, found.batches[index % 2]))
            if index >= 0:  # three rounds of warm-up
                seconds[name].append(spent)
    handle.remove()
    return seconds


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios plan / autocast and autocast / autocast, median and 95 % interval."""
    result: dict[str, Any] = {"pairs": len(seconds["plan"])}
    both = [(a + b) / 2 for a, b in zip(seconds["autocast"], seconds["autocast again"], strict=True)]
    for name, one, other in (
        ("plan / autocast", seconds["plan"], both),
        ("A/A: autocast / autocast", seconds["autocast again"], seconds["autocast"]),
    ):
        result[name] = ratio_row(a / b for a, b in zip(one, other, strict=True))
    result["autocast step, ms (median; this machine, this hour)"] = round(1e3 * median_ci95(both)[0], 1)
    return result


def main() -> None:
    """Measure the asked model, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES))
    parser.add_argument("--pairs", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for model in [asked.model] if asked.model else list(SIZES):
        found = figures(rounds(workload(model), asked.pairs))
        rows, window = SIZES[model]
        path = write_result(f"apply-{model}", {"model": model, "step": f"train, {rows}x{window} tokens"} | found)
        print(Path(path).read_text())


if __name__ == "__main__":
    main()
