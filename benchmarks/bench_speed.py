"""Step times of random assignments, predicted from units timed one by one, against measured ones.

    python benchmarks/bench_speed.py [smollm2] [minilm] [demo] [--modes infer train] [--plans 30]

Each assignment gives BF16 to a share of the units that is drawn, too, and FP16 to one in ten of the rest where FP16 is
not hopeless. What counts is the ratio to FP32 of the same run: pairs of steps, reference and plan in alternating order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import numpy as np
import torch
from record import write_result
from scipy import stats
from truths import WORKLOADS

from autoprec import Plan, Workload, probe_speed, probe_units
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.records import SpeedProfile

#: pairs of steps by assignment; a step of SmolLM2 in training takes seconds
_PAIRS = {"infer": 9, "train": 5}


def assignments(workload: Workload, known: SpeedProfile, count: int, seed: int) -> list[dict[str, Format]]:
    """Return random assignments of the units that can take more than FP32."""
    draw = random.Random(seed)
    slow = {row.unit for row in known.times if row.format is Format.FP16 and row.ratio.value > 3}
    found = []
    for _ in range(count):
        share, plan = draw.random(), {}
        for unit in probe_units(workload.model).units:
            low = draw.random() < share
            half = Format.FP16 in known.formats and unit.name not in slow and draw.random() < 0.1
            plan[unit.name] = Format.BF16 if low else Format.FP16 if half else Format.FP32
        found.append(plan)
    return found


def judged(name: str, mode: str, count: int) -> dict[str, Any]:
    """Probe, measure, and compare the ratios to FP32."""
    workload = WORKLOADS[name]()
    workload = Workload(
        workload.model, workload.batches[:1], mode=mode, outputs=workload.outputs, task=workload.task, model_id=name
    )
    begun = time.monotonic()
    known = probe_speed(workload, ("bf16", "fp16"))
    took = time.monotonic() - begun
    rows = []
    for number, chosen in enumerate(assignments(workload, known, count, seed=7)):
        plan = Plan.assign(workload.model, chosen, ambient=known.ambient, mode=mode)
        pairs = _PAIRS[mode]
        found = evaluate(
            Request(
                workload=workload, plan=plan, min_pairs=pairs, max_pairs=pairs, gradient_batches=1, name=str(number)
            )
        )
        guess = known.step_ms(chosen)
        assert found.speedup is not None
        interval = found.speedup_ci95 or (found.speedup, found.speedup)
        rows.append(
            {
                "predicted": guess.value / known.reference_ms.value,
                "low": guess.low / known.reference_ms.value,
                "high": guess.high / known.reference_ms.value,
                "measured": 1 / found.speedup,
                "measured_ci95": [1 / interval[1], 1 / interval[0]],
            }
        )
        print(f"{name} {mode} {number}: {rows[-1]}", file=sys.stderr, flush=True)
    own, true = (np.array([row[key] for row in rows]) for key in ("predicted", "measured"))
    apart = [
        (own[i] - own[j]) * (true[i] - true[j]) > 0
        for i in range(count)
        for j in range(i)
        if rows[i]["measured_ci95"][0] > rows[j]["measured_ci95"][1]
        or rows[j]["measured_ci95"][0] > rows[i]["measured_ci95"][1]
    ]
    return {
        "probe_s": round(took, 1),
        "shapes": len({row.shape for row in known.times}),
        "corrections": {str(f): round(c.value, 3) for f, c in known.corrections.items()},
        "around": round(known.around.value, 3),
        "mean_error": round(float(np.mean(np.abs(own / true - 1))), 4),
        "worst_error": round(float(np.max(np.abs(own / true - 1))), 4),
        "spearman": round(float(stats.spearmanr(own, true)[0]), 4),
        "pairs told apart by measurement": len(apart),
        "of these in the predicted order": round(float(np.mean(apart)), 4) if apart else None,
        "rows": [{k: np.round(v, 4).tolist() for k, v in row.items()} for row in rows],
    }


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2", "minilm", "demo"])
    parser.add_argument("--modes", nargs="*", default=["infer", "train"])
    parser.add_argument("--plans", type=int, default=30)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for name in asked.models:
        for mode in asked.modes:
            result = judged(name, mode, asked.plans)
            write_result(f"speed-{name}-{mode}", result)
            print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
