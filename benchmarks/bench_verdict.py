"""How often a plan over the limit is accepted, one well under it is not, and the reference called faster than itself.

    python benchmarks/bench_verdict.py [drops] [aa] [--record N]

`drops` simulates confirmations, noise log-normal or drawn from recorded drops (`benchmarks/truths/`), all repetitions
at once: `evidence` and `look_levels` take the place of `confirm`; on how many samples the two differ is in the result.
The spread is learnt from 8 other batches, of 12 other plans and the plan itself. `unknown`: nothing was learnt.
`aa` compares steps of the demo model with themselves, from traces in `benchmarks/truths/timing.json` (`--record`
measures more) and by ten real comparisons.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, device, write_result

from autoprec.probe.pacing import Speed, pace
from autoprec.probe.pairs import Pairs
from autoprec.probe.steps import device_of, timed
from autoprec.probe.workload import workload_from
from autoprec.study.confirmation import spending
from autoprec.study.race import FIRST_LOOK, Answer, Spread, evidence, judge, look_levels

TRUTHS = Path(__file__).parent / "truths"
MODELS = ("smollm2", "minilm", "vit", "demo")
REPEATS, SEED = 4000, 2026
#: plans measured before, and their batches, from which the spread is learnt
EARLIER, EARLIER_BATCHES = 12, 8

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Noise:
    """Drops of mean 1: `draw(generator, shared, [R, C, N])` of C plans on N batches, and the deviation of their log."""

    name: str
    draw: Callable[[np.random.Generator, float, tuple[int, int, int]], Array]
    log_sd: float | None = None


def log_normal(variation: float) -> Noise:
    """Return noise of a coefficient of variation, of which plans share a part `shared` of the logarithm's variance."""
    sd = float(np.sqrt(np.log1p(variation**2)))

    def draw(generator: np.random.Generator, shared: float, shape: tuple[int, int, int]) -> Array:
        own = generator.standard_normal(shape)
        common = generator.standard_normal((shape[0], 1, shape[2]))
        return np.exp(sd * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own) - sd**2 / 2)

    return Noise(f"log-normal {variation}", draw, sd)


def recorded(model: str) -> Noise:
    """Return noise that resamples recorded lists, one list a plan; where `shared`, all plans at the same batches.

    A model "all four" is another one from repetition to repetition.
    """
    found = [lists_of(name) for name in (MODELS if model == "all four" else (model,))]

    def draw(generator: np.random.Generator, shared: float, shape: tuple[int, int, int]) -> Array:
        lists = [found[r % len(found)] for r in range(shape[0])]
        plans = np.stack([x[generator.integers(0, len(x), shape[1])] for x in lists])
        batches = generator.integers(0, plans.shape[2], (shape[0], 1 if shared else shape[1], shape[2]))
        return np.take_along_axis(plans, np.broadcast_to(batches, shape), axis=2)

    return Noise(f"recorded {model}", draw)


def lists_of(model: str) -> Array:
    """Return the recorded drops of single units, [K, 8], each list divided by its mean; all-zero lists left out."""
    drops = np.array(list(json.loads((TRUTHS / f"{model}.json").read_text())["single"].values()), dtype=float)
    drops = drops[drops.mean(axis=1) > 0]
    return drops / drops.mean(axis=1, keepdims=True)


def learnt(earlier: Array, own: Array) -> Spread:
    """Return `Spread.of` of each plan, [R, C], from [R, E, B] and [R, C, B]; an array where a `Spread` has a number."""
    variance = [np.log(np.maximum(x, 0.01 * x.mean(axis=2, keepdims=True))).var(axis=2, ddof=1) for x in (earlier, own)]
    log_sd = np.sqrt(np.maximum(variance[0].mean(axis=1, keepdims=True), variance[1]))
    return Spread(np.maximum(log_sd, 0.01), Spread.of([earlier[0, 0]]).weight)


def drawn(noise: Noise, plans: int, shared: float, batches: int, how: str, seed: int) -> tuple[Array, Spread]:
    """Return drops [R, C, N] of mean 1, and what is known of their spread: `learnt`, `unknown`, or `half` the truth."""
    generator = np.random.default_rng([SEED, seed, plans, int(10 * shared), batches])
    found = noise.draw(generator, shared, (REPEATS, plans + EARLIER, EARLIER_BATCHES + batches))
    seen, drops = found[:, :, :EARLIER_BATCHES], found[:, :plans, EARLIER_BATCHES:]
    if how == "learnt":
        return drops, learnt(seen[:, plans:], seen[:, :plans])
    return drops, Spread() if how == "unknown" else Spread(0.5 * (noise.log_sd or 0.0), 10.5)


def decided(drops: Array, spread: Spread, levels: list[float]) -> tuple[Array, Array]:
    """Return whether each plan [R, C] is accepted against the limit 1, and after how many batches it was decided."""
    batches = drops.shape[2]
    accepted, taken = np.zeros(drops.shape[:2], bool), np.full(drops.shape[:2], batches)
    still = np.ones(drops.shape[:2], bool)
    give_up = look_levels(0.05, batches, batches)
    allowed = np.array([look_levels(level, batches, batches) for level in levels])
    for look, count in enumerate(range(FIRST_LOOK, batches + 1)):
        over, under = evidence(drops[:, :, :count], 1.0, spread)
        within = still & (over <= allowed[:, look])
        above = still & ~within & (under <= give_up[look])
        accepted |= within
        taken[within | above] = count
        still &= ~(within | above)
    return accepted, taken


def plug_in(drops: Array) -> Array:
    """Return whether mean + 1.96 s/√n is under the limit at any look, the rule this one replaces."""
    found = np.zeros(drops.shape[:2], bool)
    for count in range(FIRST_LOOK, drops.shape[2] + 1):
        seen = drops[:, :, :count]
        found |= seen.mean(axis=2) + 1.96 * seen.std(axis=2, ddof=1) / np.sqrt(count) <= 1.0
    return found


def false_row(noise: Noise, plans: int, shared: float, batches: int, how: str = "learnt") -> dict[str, Any]:
    """Return the share of repetitions that choose a plan, where all are 2 % over the limit."""
    drops, spread = drawn(noise, plans, shared, batches, how, 0)
    drops = 1.02 * drops
    accepted, taken = decided(drops, spread, [spending(k) for k in range(plans)])
    chosen = accepted.any(axis=1)
    return {
        "noise": noise.name,
        "plans": plans,
        "shared": shared,
        "batches": batches,
        "spread": how,
        "false accept": rounded(chosen.mean()),
        "of first plan": rounded(accepted[:, 0].mean()),
        "plug-in normal": rounded(plug_in(drops).any(axis=1).mean()),
        "mean batches a plan": round(float(taken.mean()), 1),
    }


def power_row(noise: Noise, share: float, shared: float, batches: int, how: str = "learnt") -> dict[str, Any]:
    """Return how often a plan at a share of the limit is accepted when tried first, and second, and how soon."""
    drops, spread = drawn(noise, 1, shared, batches, how, int(1000 * share))
    drops = share * drops
    accepted, taken = decided(drops, spread, [spending(0)])
    return {
        "noise": noise.name,
        "share of limit": share,
        "shared": shared,
        "batches": batches,
        "spread": how,
        "accepted": rounded(accepted.mean()),
        "accepted if second": rounded(decided(drops, spread, [spending(1)])[0].mean()),
        "mean batches": round(float(taken.mean()), 1),
        "by the 6th batch": rounded((accepted & (taken <= 6)).mean()),
    }


def worst_list(model: str, repeats: int = 1000) -> dict[str, Any]:
    """Return the false acceptance of the first plan tried for the recorded list that deceives most."""
    lists, generator = lists_of(model), np.random.default_rng(SEED)
    rates = []
    for drops in lists:
        seen = drops[generator.integers(0, len(drops), (repeats, 1, EARLIER_BATCHES + 16))]
        spread = learnt(np.broadcast_to(lists, (repeats, *lists.shape)), seen[:, :, :EARLIER_BATCHES])
        accepted, _ = decided(1.02 * seen[:, :, EARLIER_BATCHES:], spread, [spending(0)])
        rates.append(float(accepted.mean()))
    return {
        "model": model,
        "lists": len(lists),
        "worst": rounded(max(rates)),
        "lists above 5 %": sum(r > 0.05 for r in rates),
        "drops of the worst": [rounded(x) for x in sorted(lists[int(np.argmax(rates))])],
    }


def drops_part() -> dict[str, Any]:
    """Simulate all rows."""
    normal = [log_normal(v) for v in (0.3, 0.7, 1.0)]
    real = [recorded(model) for model in (*MODELS, "all four")]
    false, power = [], []
    for noise in normal + real:
        sharing = (0.0, 0.5, 1.0) if noise in normal else (0.0, 1.0)
        false.append(shown(false_row(noise, 1, 1.0, 16)))
        false += [shown(false_row(noise, 20, shared, 16)) for shared in sharing]
        power += [shown(power_row(noise, 0.5, shared, 16)) for shared in (0.0, 1.0)]
        power += [shown(power_row(noise, share, 1.0, 16)) for share in (0.75, 0.05, 0.01)]
    for noise in (normal[1], real[-1]):
        false += [shown(false_row(noise, plans, 0.0, 64)) for plans in (1, 20)]
        power.append(shown(power_row(noise, 0.75, 1.0, 64)))
    for noise in normal + real[:-1]:  # the first plans of a search, or one plan confirmed alone
        false.append(shown(false_row(noise, 20, 0.0, 16, "unknown")))
        power += [shown(power_row(noise, share, 1.0, 16, "unknown")) for share in (0.5, 0.05, 0.01)]
    stress = [shown(false_row(noise, plans, 0.0, 16, "half")) for noise in normal for plans in (1, 20)]
    half = [r for r in power if r["share of limit"] == 0.5 and r["spread"] == "learnt"]
    bars = {
        "false accept <= 5 % in every row": max(r["false accept"] for r in false) <= 0.05,
        "highest false accept": max(r["false accept"] for r in false),
        "power >= 90 % at half the limit up to CV 0.7": min(power_at(half, v) for v in (0.3, 0.7)) >= 0.9,
        "lowest power there": min(power_at(half, v) for v in (0.3, 0.7)),
    }
    return {
        "bars": bars,
        "false": false,
        "power": power,
        "spread underrated": stress,
        "worst list": [shown(worst_list(m)) for m in MODELS],
    }


def power_at(rows: list[dict[str, Any]], variation: float) -> float:
    return min(r["accepted"] for r in rows if r["noise"] == f"log-normal {variation}")


# times


def comparison(steps: Iterator[tuple[float, float]], least: int = 8, most: int = 60) -> Pairs:
    """Take pairs as `autoprec.measurement` does: at least 8, then until their ratio is narrow or there are 60."""
    pairs = Pairs()
    while len(pairs.plan_s) < least or (len(pairs.plan_s) < most and not pairs.is_narrow()):
        reference, plan = next(steps)
        pairs.reference_s.append(reference)
        pairs.plan_s.append(plan)
    return pairs


def real_steps() -> Iterator[tuple[float, float]]:
    """Yield seconds of pairs of short forward passes of the demo model, the order alternating, without end."""
    workload = workload_from("demo", mode="infer")
    where, turn = device_of(workload.model), 0
    workload.model.eval()
    # one example of 64 tokens: short steps are the noisy ones
    batches = [{name: value[:1, :64] for name, value in batch.items()} for batch in workload.batches]
    with torch.no_grad():
        for batch in batches:
            workload.forward(batch)
        while True:
            batch = batches[turn % len(batches)]
            first, second = (timed(where, lambda b=batch: workload.forward(b))[0] for _ in range(2))
            yield (first, second) if turn % 2 == 0 else (second, first)
            turn += 1


def record_traces(traces: int, threads: int, pairs: int = 200) -> None:
    """Measure more traces of reference against reference, added to those there as whole microseconds."""
    path = TRUTHS / "timing.json"
    found = json.loads(path.read_text())["traces"] if path.exists() else []
    torch.set_num_threads(threads)
    for _ in range(traces):
        load, steps = os.getloadavg()[0], real_steps()
        trace = np.rint(1e6 * np.array([next(steps) for _ in range(pairs)])).astype(int)
        found.append(
            {"load": round(load, 1), "threads": threads, "a_us": trace[:, 0].tolist(), "b_us": trace[:, 1].tolist()}
        )
    what = "demo, forward passes of one example of 64 tokens in pairs: a first in even pairs, b first in odd ones"
    where = {key: value for key, value in device().items() if key != "threads"}
    head = json.dumps({"what": what, "device": where, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(trace) for trace in found)
    path.write_text(f'{head[:-1]}, "traces": [\n{lines}\n]}}\n')


def traces_of(*threads: int) -> list[Array]:
    """Return traces recorded with so many threads, seconds [P, 2] each."""
    found = json.loads((TRUTHS / "timing.json").read_text())["traces"]
    return [np.array([t["a_us"], t["b_us"]]).T / 1e6 for t in found if t["threads"] in threads]


def blocks(traces: list[Array], count: int, gain: float, exact: int | None, seed: int) -> list[Pairs]:
    """Return comparisons of contiguous blocks of traces, the plan's times divided by `gain`."""
    generator, found = np.random.default_rng([SEED, seed]), []
    for _ in range(count):
        trace = traces[generator.integers(len(traces))]
        start = int(generator.integers(0, (len(trace) - 60) // 2 + 1)) * 2
        # either column may be the plan
        block = trace[start : start + 60, :: 1 if generator.integers(2) else -1]
        steps = iter([(float(a), float(b) / gain) for a, b in block])
        found.append(comparison(steps, exact or 8, exact or 60))
    return found


def pace_row(name: str, found: list[Pairs]) -> dict[str, Any]:
    """Return how often each answer was given, beside the rule that only asks for a median's 95 % interval above 1."""
    answers = [pace(p.reference_s, p.plan_s) for p in found]
    medians = [p.ratio()[1] for p in found]
    return {
        "comparisons": name,
        "count": len(found),
        **{str(speed): sum(a.answer is speed for a in answers) for speed in Speed},
        "median interval above 1": sum(m is not None and m[0] > 1 for m in medians),
        "mean pairs": round(float(np.mean([a.pairs for a in answers])), 1),
        "median width": rounded(np.median([a.interval[1] - a.interval[0] for a in answers if a.interval])),
    }


def aa_part() -> dict[str, Any]:
    """Compare the reference with itself, and with itself made faster on paper."""
    torch.set_num_threads(2)
    traces, steps = traces_of(1, 2), real_steps()
    rows = [
        pace_row("A/A of traces", blocks(traces, 200, 1.0, None, 0)),
        pace_row("A/A, real", [comparison(steps) for _ in range(10)]),
        pace_row("A/A of traces, more", blocks(traces, 4000, 1.0, None, 1)),
        *(pace_row(f"A/A of traces, {n} pairs", blocks(traces, 4000, 1.0, n, n)) for n in (8, 20, 60)),
    ]
    for threads, gain, pairs in itertools.product((1, 2), (1.05, 1.1), (20, 60, None)):
        name = f"{gain} times as fast, {pairs or 'usual'} pairs, {threads} threads"
        rows.append(pace_row(name, blocks(traces_of(threads), 1000, gain, pairs, 7)))
    for row in rows:
        shown(row)
    bars = {"faster at most 2 of 200": rows[0]["faster"] <= 2, "none of 10 real": rows[1]["faster"] == 0}
    for row in rows:
        if "60 pairs, " in row["comparisons"]:
            bars[f"power >= 80 %, {row['comparisons']}"] = row["faster"] >= 0.8 * row["count"]
    logs = [np.log(t[:, 0] / t[:, 1]) for t in traces]
    kept = json.loads((TRUTHS / "timing.json").read_text())["traces"]
    noise = {
        "threads and load average": [[t["threads"], t["load"]] for t in kept],
        "sd of log ratio": [rounded(x.std()) for x in logs],
        "quartile range of log ratio": [rounded(np.subtract(*np.quantile(x, [0.75, 0.25]))) for x in logs],
        "autocorrelation of pairs at lag 1 and 2": [
            [rounded(np.corrcoef(x[k:], x[:-k])[0, 1]) for x in logs] for k in (1, 2)
        ],
        "step ms": [rounded(1e3 * np.median(t)) for t in traces],
    }
    return {"bars": bars, "rows": rows, "noise": noise}


def rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as it comes, and return it."""
    cells = (f"{k} {v}" if isinstance(v, str) else f"{k} {v:g}" for k, v in row.items() if not isinstance(v, list))
    print("  ".join(cells), file=sys.stderr)
    return row


def agrees() -> int:
    """Return on how many of 100 samples `judge` and this file's walk over all at once differ; it is to be 0."""
    noise, generator = log_normal(0.7), np.random.default_rng(SEED)
    drops = 0.7 * noise.draw(generator, 0.0, (100, 13, 24))
    seen, drops = drops[:, :, :8], drops[:, :1, 8:]
    accepted, _ = decided(drops, learnt(seen[:, 1:], seen[:, :1]), [0.05])
    spreads = [Spread.of(list(x[1:]), own=list(x[0])) for x in seen]
    answers = [judge(row[0].tolist(), 1.0, spread=s) for row, s in zip(drops, spreads, strict=True)]
    return sum((a is Answer.WITHIN) != bool(b) for a, b in zip(answers, accepted[:, 0], strict=True))


def main() -> None:
    """Run the parts asked for, keep the other's figures, and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="drops, aa; default both")
    parser.add_argument("--record", type=int, default=0, metavar="N", help="measure N more timing traces")
    parser.add_argument("--threads", type=int, default=2, help="threads of the traces to record")
    asked = parser.parse_args()
    kept = RESULTS / "verdict.json"
    figures = json.loads(kept.read_text())["figures"] if kept.exists() else {}
    if not asked.parts or "drops" in asked.parts:
        figures["drops"] = {"repetitions": REPEATS, "judge differs on": agrees(), **drops_part()}
    if not asked.parts or "aa" in asked.parts:
        if asked.record:
            record_traces(asked.record, asked.threads)
        figures["aa"] = aa_part()
    path = write_result("verdict", figures)
    for part in asked.parts or ("drops", "aa"):
        print(part, figures[part]["bars"], file=sys.stderr)
    print(path)


if __name__ == "__main__":
    main()
