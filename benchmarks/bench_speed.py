"""Step times of random assignments, predicted from units timed one by one, against measured ones.

    python benchmarks/bench_speed.py [smollm2] [minilm] [demo] [--modes infer train] [--plans 30]
    python benchmarks/bench_speed.py smollm2 --device cuda --batch-size 16 --seq-len 1024

Each assignment gives BF16 to a share of the units that is drawn, too, and FP16 to one in ten of the rest where FP16 is
not hopeless; where FP8 has a time, a third of the BF16 units that take it. What counts is the ratio to FP32 of the same
run: pairs of steps, reference and plan in alternating order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from models import default_cache
from record import write_result
from scipy import stats
from truths import WORKLOADS

from autoprec import Plan, Workload, apply, probe_speed, probe_units
from autoprec.formats import Format
from autoprec.probe.pairs import Pairs
from autoprec.probe.payoff import SETTLED
from autoprec.probe.steps import Stepper, device_of, kept_state, plain_fp32
from autoprec.probe.workload import workload_from
from autoprec.records import Mode, SpeedProfile

#: pairs of steps by assignment, at least; and seconds at most, unless the interval is narrow before
_PAIRS, _SECONDS = 6, 5.0


def assignments(workload: Workload, known: SpeedProfile, count: int, seed: int) -> list[dict[str, Format]]:
    """Return random assignments of the units that can take more than FP32."""
    draw, lower = random.Random(seed), random.Random(seed + 1)
    fp8 = {row.unit for row in known.times if row.format is Format.FP8}
    slow = {row.unit for row in known.times if row.format is Format.FP16 and row.ratio.value > SETTLED}
    found = []
    for _ in range(count):
        share, plan = draw.random(), {}
        for unit in probe_units(workload.model).units:
            low = draw.random() < share
            half = Format.FP16 in known.formats and unit.name not in slow and draw.random() < 0.1
            least = Format.FP8 if unit.name in fp8 and lower.random() < 1 / 3 else Format.BF16
            plan[unit.name] = least if low else Format.FP16 if half else Format.FP32
        found.append(plan)
    return found


def timed_pairs(workload: Workload, plan: Plan) -> Pairs:
    """Time the reference's steps and the plan's in turns."""
    handle, pairs, begun = apply(workload.model, plan), Pairs(), time.monotonic()
    reference = Stepper(workload)
    try:
        with handle.suspended():
            reference.run(workload.batches[0])
        own = reference.scaled(plan.grad_scaler)
        own.run(workload.batches[0])
        while len(pairs.plan_s) < _PAIRS or not (pairs.is_narrow() or time.monotonic() - begun > _SECONDS):
            pairs.pair(handle, lambda: reference.run(workload.batches[0]), lambda: own.run(workload.batches[0]))
    finally:
        handle.remove()
    return pairs


def measured(workload: Workload, known: SpeedProfile, count: int) -> Iterator[dict[str, Any]]:
    """Yield for each assignment what was predicted and what was measured, as ratios to FP32."""
    train = workload.mode is Mode.TRAIN
    with kept_state(workload.model, weights=train), plain_fp32(device_of(workload.model).type):
        workload.model.train(train)
        for chosen in assignments(workload, known, count, seed=7):
            pairs = timed_pairs(workload, Plan.assign(workload.model, chosen, ambient=known.ambient, mode=known.mode))
            speedup, interval = pairs.ratio()
            assert interval is not None
            guess = known.step_ms(chosen).scaled(1 / known.reference_ms.value)
            yield {
                "predicted": guess.value,
                "predicted_ci95": [guess.low, guess.high],
                "measured": 1 / speedup,
                "measured_ci95": [1 / interval[1], 1 / interval[0]],
                "pairs": len(pairs.plan_s),
                "units": {str(f): sum(own is f for own in chosen.values()) for f in sorted(set(chosen.values()))},
            }


def on_card(name: str, asked: argparse.Namespace) -> Workload:
    """Return the same model and text on another device, in larger batches: a card is not filled by 256 tokens."""
    cache = default_cache()
    model = name if name == "demo" else str(cache / name)
    text = None if name == "demo" else cache / "austen" / "sense_and_sensibility.txt"
    return workload_from(
        model, data=text, mode="infer", device=asked.device, batch_size=asked.batch_size, seq_len=asked.seq_len
    )


def judged(name: str, mode: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Probe, measure, and compare the ratios to FP32."""
    found, count = WORKLOADS[name]() if asked.device == "cpu" else on_card(name, asked), asked.plans
    batch = dict(found.batches[0])
    if name == "minilm" and mode == "train":  # which has none to be trained towards; times do not depend on them
        batch["labels"] = torch.zeros(len(batch["input_ids"]))
    workload = Workload(found.model, [batch], mode=mode, outputs=found.outputs, task=found.task, model_id=name)
    begun = time.monotonic()
    known = probe_speed(
        workload, ("bf16", "fp16", "fp8"), cache=False
    )  # beside FP32; FP8 has no time on a CPU, which is noted
    took = time.monotonic() - begun
    rows = []
    for row in measured(workload, known, count):
        rows.append(row)
        print(f"{name} {mode} {len(rows)}: {row}", file=sys.stderr, flush=True)
    own, true = (np.array([row[key] for row in rows]) for key in ("predicted", "measured"))
    apart = [
        (own[i] - own[j]) * (true[i] - true[j]) > 0
        for i in range(count)
        for j in range(i)
        if rows[i]["measured_ci95"][0] > rows[j]["measured_ci95"][1]
        or rows[j]["measured_ci95"][0] > rows[i]["measured_ci95"][1]
    ]
    inside = [
        r["predicted_ci95"][0] <= r["measured_ci95"][1] and r["measured_ci95"][0] <= r["predicted_ci95"][1]
        for r in rows
    ]
    off = np.abs(own / true - 1)
    return {
        "probe_s": round(took, 1),
        "fp32_ms": round(known.reference_ms.value, 3),
        "shapes": len({row.shape for row in known.times}),
        "around": round(known.arrival.mean[0], 3),
        "mean_error": round(float(off.mean()), 4),
        "worst_error": round(float(off.max()), 4),
        "spearman": round(float(stats.spearmanr(own, true)[0]), 4),
        "pairs told apart by measurement": len(apart),
        "rank correlation of these": round(2 * float(np.mean(apart)) - 1, 4) if apart else None,
        "intervals that meet": round(float(np.mean(inside)), 4),
        "mean width of a measured interval": round(float(np.mean([np.ptp(r["measured_ci95"]) for r in rows])), 4),
        "rows": [{k: v if k == "units" else np.round(v, 4).tolist() for k, v in row.items()} for row in rows],
    }


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2", "minilm", "demo"])
    parser.add_argument("--modes", nargs="*", default=["infer", "train"])
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="on another device than the CPU")
    parser.add_argument("--seq-len", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for name in asked.models:
        for mode in asked.modes:
            result = judged(name, mode, asked)
            at = "" if asked.device == "cpu" else f"-{asked.device}-{asked.batch_size}x{asked.seq_len}"
            write_result(f"speed-{name}-{mode}{at}", result)
            print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
