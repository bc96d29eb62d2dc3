"""What a step of a card's plan takes where the card is not here: 16-bit products in FP32, and by the CPU's own kernels.

    python benchmarks/bench_emulated.py [--rounds 7]

Forward and backward of the demo GPT (8x128 tokens) and of MiniLM's spam classifier (8 mails of up to 64 tokens) under
uniform BF16 and FP16 of an H100, emulated, in turns with FP32; ratios to FP32's step of the same round. `own kernels`:
with what the CPU has for the format itself. Written to benchmarks/results/emulated.json. Needs one quiet core.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from unittest.mock import patch

import torch
from bench_training import WORKLOADS
from ratios import ratio_row
from record import write_result

from autoprec import Plan, Workload, applied
from autoprec.catalog import find_device
from autoprec.probe.steps import timed
from autoprec.runtime import target

CPU = torch.device("cpu")


def step(workload: Workload, plan: Plan | None) -> float:
    """Return the seconds of a forward and backward."""

    def run() -> None:
        batch = workload.batches[0]
        workload.training_loss(batch, workload.forward(batch)).backward()
        workload.model.zero_grad(set_to_none=True)

    if plan is None:
        return timed(CPU, run)[0]
    with applied(workload.model, plan, emulate=True):
        return timed(CPU, run)[0]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    card, slow = find_device("h100-sxm-80gb"), sorted(map(str, target._slow()))
    figures = {}
    for name in ("demo", "minilm"):
        workload = WORKLOADS[name]()
        ratios = defaultdict(list)
        for turn in range(asked.rounds + 1):  # the first warms up
            reference = step(workload, None)
            for choice in ("bf16", "fp16"):
                plan = Plan.uniform(workload.model, choice, device=card)
                seconds = {choice: step(workload, plan)}
                with patch.object(target, "_slow", return_value=frozenset()):
                    seconds[f"{choice}, own kernels"] = step(workload, plan)
                for way, taken in seconds.items() if turn else ():
                    ratios[way].append(taken / reference)
        figures[name] = {way: ratio_row(found) for way, found in ratios.items()}
        print(name, figures[name], flush=True)
    print(write_result("emulated", {"without instructions for": slow, "step over FP32's": figures}))


if __name__ == "__main__":
    main()
