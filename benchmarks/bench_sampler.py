"""Share of the true hypervolume that samplers reach by evaluations, and what the sampler itself takes.

    python benchmarks/bench_sampler.py [exhaustive] [wrong] [speed] [long] [--seeds 5]

`exhaustive`: every assignment of a small real model was measured (`exhaustive.py`), so the true front is known. Times
come from a table of what an H100 would take (below), casts between neighbours in the cost. All samplers start from the
same three uniform plans, which count. FrontSampler's prior of drops is one `probe_sensitivity`, that of times the
table with an error of 10 % a unit and format. `wrong`: its drop prior is off by a random factor of up to 10 a unit, and
no prior at all. `speed`: seconds a trial, and memory, of 200 units over 2,000 trials; `long`: of 62 units, as SmolLM2
has, over 5,000.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import optuna
import torch
from exhaustive import FORMATS, load
from record import write_result

from autoprec import FrontSampler, probe_sensitivity
from autoprec.formats import Format
from autoprec.probe.workload import workload_from
from autoprec.study.chain import ChainUnit, Choice
from autoprec.study.front import predicted_front
from autoprec.study.hypervolume import front_of, hypervolume

#: TFLOP/s that large GEMMs reach on an H100 SXM: two thirds of NVIDIA's peaks for dense work (67, 989, 1979)
RATES = {"fp32": 45e12, "bf16": 660e12, "fp8": 1320e12}
#: bytes a second of casts: three quarters of 3.35 TB/s; a border reads FP32 and writes BF16, or the other way round
BANDWIDTH, CAST_BYTES = 2.5e12, 6
TOKENS, FLOOR = 16_384, 1e-9
COUNTS = (10, 15, 20, 30, 50, 100, 200)

Assignment = dict[str, str]


@dataclass
class Problem:
    """Units with a drop to be looked up or measured, and a time from the table (µs)."""

    units: dict[str, list[str]]
    times: dict[str, dict[str, float]]
    border: float
    drop: Callable[[Assignment], float]
    corner: tuple[float, float] = (math.nan, math.nan)
    best: float = math.nan
    seen: dict[tuple[str, ...], float] = field(default_factory=dict)

    def time(self, chosen: Assignment) -> float:
        formats = [chosen[name] for name in self.units]
        casts = sum(a != b for a, b in itertools.pairwise(formats))
        return sum(self.times[n][f] for n, f in zip(self.units, formats, strict=True)) + casts * self.border

    def __call__(self, chosen: Assignment) -> tuple[float, float]:
        key = tuple(chosen[name] for name in self.units)
        if key not in self.seen:
            self.seen[key] = self.drop(chosen)
        return self.seen[key], self.time(chosen)

    def volume(self, values: Sequence[tuple[float, float]]) -> float:
        points = np.array([(math.log(max(d, FLOOR)), t) for d, t in values])
        return hypervolume(points, np.array([math.log(self.corner[0]), self.corner[1]]))

    def shares(self, values: Sequence[tuple[float, float]], counts: Sequence[int] = COUNTS) -> dict[int, float]:
        """Return the share of the best hypervolume after so many evaluations; a list that ended stays where it was."""
        ends = [n for n in counts if n <= max(len(values), counts[0])]
        return {n: self.volume(values[:n]) / self.best for n in ends}


def table(sizes: dict[str, int], hidden: int, formats: dict[str, list[str]]) -> tuple[dict[str, Any], float]:
    """Return microseconds of each unit and format for a forward, and of a cast at a border."""
    times = {n: {f: 2e6 * sizes[n] * TOKENS / RATES[f] for f in fs} for n, fs in formats.items()}
    return times, 1e6 * TOKENS * hidden * CAST_BYTES / BANDWIDTH


def exhaustive() -> tuple[Problem, np.ndarray]:
    """Return the small model's problem with its true front's hypervolume as `best`, and that front."""
    names, drops = load()
    model = workload_from("demo", mode="infer", batch_size=2, batches=1).model
    units = {name: list(FORMATS) for name in names}
    sizes, hidden = sizes_of(model, names)
    times, border = table(sizes, hidden, units)
    index = {f: i for i, f in enumerate(FORMATS)}
    problem = Problem(units, times, border, lambda chosen: float(drops[tuple(index[chosen[n]] for n in names)]))
    every = [dict(zip(names, row, strict=True)) for row in itertools.product(FORMATS, repeat=len(names))]
    values = [problem(chosen) for chosen in every]
    problem.corner = (max(d for d, _ in values), max(t for _, t in values))
    problem.best = problem.volume(values)
    return problem, front_of(np.array(values))


def sizes_of(model: torch.nn.Module, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Return the weights that each unit multiplies by, and the width of the stream."""
    from autoprec import probe_units

    modules = dict(model.named_modules())
    units = {u.name: u for u in probe_units(model).units}
    sizes = {n: sum(modules[m].weight.numel() for m in units[n].modules) for n in names}
    return sizes, int(model.config.hidden_size)


def uniform(problem: Problem) -> list[Assignment]:
    """Return the three uniform plans: FP32, BF16, FP8 where a unit takes it."""
    return [{n: f if f in fs else "bf16" for n, fs in problem.units.items()} for f in FORMATS]


def run(problem: Problem, sampler: optuna.samplers.BaseSampler, count: int) -> tuple[list[tuple[float, float]], float]:
    """Let a sampler propose; return the distinct plans' values in order, and the sampler's seconds a trial."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for chosen in uniform(problem):
        study.enqueue_trial(chosen)
    distributions = {n: optuna.distributions.CategoricalDistribution(fs) for n, fs in problem.units.items()}
    values, spent = [], 0.0
    for _ in range(count):
        begun = time.perf_counter()
        trial = study.ask(distributions)
        spent += time.perf_counter() - begun
        values.append(problem(trial.params))
        study.tell(trial, values[-1])
    return values, spent / count


def wrong_times(problem: Problem, seed: int) -> dict[str, dict[str, float]]:
    draw = np.random.default_rng(seed)
    return {n: {f: t * draw.lognormal(0, 0.1) for f, t in own.items()} for n, own in problem.times.items()}


def ours(problem: Problem, prior: Any, seed: int) -> FrontSampler:
    """Return the sampler as a search uses it."""
    return FrontSampler(
        problem.units, prior, wrong_times(problem, seed), border_ms=problem.border, corner=problem.corner, seed=seed
    )


def rivals(seed: int) -> dict[str, Callable[[], optuna.samplers.BaseSampler]]:
    """Return Optuna's samplers."""
    return {
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "TPE": lambda: optuna.samplers.TPESampler(seed=seed),
        "TPE multivariate": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
        "NSGA-II": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    }


def walk(problem: Problem, kind: str, prior: dict[str, dict[str, float]], seed: int) -> list[tuple[float, float]]:
    """Return the values of a rival without an engine, the uniform plans first."""
    return [problem(chosen) for chosen in itertools.chain(uniform(problem), WALKS[kind](problem, prior, seed))]


def never_updated(problem: Problem, prior: dict[str, dict[str, float]], seed: int) -> Iterator[Assignment]:
    """Take the predicted front's points, each time the one that adds most if the prediction is true."""
    times = wrong_times(problem, seed)
    units = [
        ChainUnit(n, tuple(Choice(Format(f), prior[n].get(f, 0.0), times[n][f]) for f in fs))
        for n, fs in problem.units.items()
    ]
    front = predicted_front(units, border_ms=problem.border)
    points = np.stack([np.log(np.maximum(front.drop, FLOOR)), front.time_ms], axis=1)
    corner = np.array([math.log(problem.corner[0]), points[:, 1].max()])
    taken: list[int] = []
    while len(taken) < len(front):
        gains = [hypervolume(points[[*taken, i]], corner) if i not in taken else -1.0 for i in range(len(front))]
        taken.append(int(np.argmax(gains)))
        yield {n: str(f) for n, f in front.assignment(taken[-1]).items()}


def measured_alone(problem: Problem) -> list[tuple[float, str, str]]:
    """Return (drop, unit, format) of each unit alone, least first: an evaluation each."""
    high = {n: "fp32" for n in problem.units}
    return sorted((problem(high | {n: f})[0], n, f) for n, fs in problem.units.items() for f in fs if f != "fp32")


def accuracy_ordered(problem: Problem, prior: dict[str, dict[str, float]], seed: int) -> Iterator[Assignment]:
    """AIMET's way: measure each unit alone, then lower one after the other, the least sensitive first."""
    high = {n: "fp32" for n in problem.units}
    order = measured_alone(problem)
    for _, name, choice in order:
        yield high | {name: choice}
    now = dict(high)
    for _, name, choice in order:
        now = now | {name: choice}
        yield now


def greedy_revert(problem: Problem, prior: dict[str, dict[str, float]], seed: int) -> Iterator[Assignment]:
    """NNCF's way: from all low, give the unit with the largest score back its precision, one after the other."""
    low = uniform(problem)[2]
    for name in sorted(problem.units, key=lambda n: -prior[n].get(low[n], 0.0)):
        low = low | {name: "bf16"}
        yield low


def programme(problem: Problem, prior: dict[str, dict[str, float]], seed: int) -> Iterator[Assignment]:
    """ModelOpt's way: for budgets of cost the least sum of diagonal scores, by a 0/1 programme; scores unverified."""
    times = problem.times
    units = [
        ChainUnit(n, tuple(Choice(Format(f), DIAGONAL[n].get(f, 0.0), times[n][f]) for f in fs))
        for n, fs in problem.units.items()
    ]
    front = predicted_front(units)
    for budget in np.linspace(front.time_ms.min(), front.time_ms.max(), 14)[1:-1]:
        fitting = np.flatnonzero(front.time_ms <= budget)
        yield {n: str(f) for n, f in front.assignment(int(fitting[np.argmin(front.drop[fitting])])).items()}


WALKS = {
    "predicted front, never updated": never_updated,
    "accuracy-ordered fallback (AIMET)": accuracy_ordered,
    "greedy revert (NNCF)": greedy_revert,
    "0/1 programme on diagonal scores (ModelOpt)": programme,
}
DIAGONAL: dict[str, dict[str, float]] = {}


def diagonal_scores(workload: Any) -> dict[str, dict[str, float]]:
    """Return ModelOpt's scores by unit and format."""
    from bench_sensitivity import rivals as scored

    found: dict[str, dict[str, float]] = {}
    for key, value in scored(workload)["diagonal"].items():
        choice, name = key.split(" ", 1)
        found.setdefault(name, {})[choice] = value
    return found


def medians(rows: Sequence[dict[int, float]]) -> dict[str, Any]:
    """Return by evaluations the median share over seeds, and the least."""
    counts = [n for n in rows[0] if all(n in row for row in rows)]
    return {
        str(n): {
            "median": round(statistics.median(row[n] for row in rows), 4),
            "least": round(min(row[n] for row in rows), 4),
        }
        for n in counts
    }


def probed(problem: Problem, seed: int, model: str = "demo") -> dict[str, dict[str, float]]:
    """Return a probe's drops by unit and format, on the data that the problem is measured on."""
    workload = workload_from(model, mode="infer", batch_size=2, batches=1)
    profile = probe_sensitivity(workload, ("bf16", "fp8"), seed=seed, cache=False)
    return {n: {f: profile[n, f] for f in fs if f != "fp32"} for n, fs in problem.units.items()}


def values_of(prior: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {n: {f: e.value for f, e in own.items()} for n, own in prior.items()}


def exhaustive_part(seeds: int) -> dict[str, Any]:
    """Compare all samplers on the small model."""
    problem, front = exhaustive()
    DIAGONAL.update(diagonal_scores(workload_from("demo", mode="infer", batch_size=2, batches=1)))
    rows: dict[str, list[dict[int, float]]] = {}
    for seed in range(seeds):
        prior = probed(problem, seed)
        values, each = run(problem, ours(problem, prior, seed), 200)
        rows.setdefault("FrontSampler", []).append(problem.shares(values))
        print("FrontSampler", seed, rows["FrontSampler"][-1], f"{each:.3f} s", file=sys.stderr, flush=True)
        for kind in WALKS:
            rows.setdefault(kind, []).append(problem.shares(walk(problem, kind, values_of(prior), seed)))
        for kind, make in rivals(seed).items():
            rows.setdefault(kind, []).append(problem.shares(run(problem, make(), 200)[0]))
            print(kind, seed, rows[kind][-1], file=sys.stderr, flush=True)
        gaussian = run(problem, optuna.samplers.GPSampler(seed=seed), 50)[0]
        rows.setdefault("GPSampler", []).append(problem.shares(gaussian, (10, 15, 20, 30, 50)))
        print("GPSampler", seed, rows["GPSampler"][-1], file=sys.stderr, flush=True)
    return {
        "assignments": 3 ** len(problem.units),
        "points of the true front": len(front),
        "seeds": seeds,
        "share of hypervolume": {kind: medians(found) for kind, found in rows.items()},
    }


def wrong_part(seeds: int) -> dict[str, Any]:
    """Give FrontSampler priors that are wrong by a factor of up to 10 a unit, and none at all beside TPE."""
    problem, _ = exhaustive()
    rows: dict[str, list[dict[int, float]]] = {}
    for seed in range(seeds):
        factors = 10 ** np.random.default_rng(seed).uniform(-1, 1, len(problem.units))
        prior = values_of(probed(problem, seed))
        off = {n: {f: v * k for f, v in prior[n].items()} for n, k in zip(problem.units, factors, strict=True)}
        rows.setdefault("wrong by up to 10", []).append(problem.shares(run(problem, ours(problem, off, seed), 50)[0]))
        bare = FrontSampler(problem.units, border_ms=problem.border, corner=problem.corner, seed=seed)
        rows.setdefault("no prior", []).append(problem.shares(run(problem, bare, 50)[0]))
        for kind in ("TPE", "TPE multivariate"):
            rows.setdefault(kind, []).append(problem.shares(run(problem, rivals(seed)[kind](), 50)[0]))
    return {"seeds": seeds, "share of hypervolume": {kind: medians(found) for kind, found in rows.items()}}


def speed_part(seeds: int, count: int = 200, trials: int = 2000) -> dict[str, Any]:
    """Measure a sampler of so many units over so many trials of a made-up additive problem."""
    draw = np.random.default_rng(0)
    units = {f"unit {i}": list(FORMATS) for i in range(count)}
    sizes = {n: 10 ** draw.uniform(-8, -4) for n in units}
    drops = {n: {"fp32": 0.0, "bf16": s, "fp8": 60 * s * draw.lognormal(0, 0.3)} for n, s in sizes.items()}
    times = {n: dict(zip(FORMATS, (4.0, 2.0, 1.0 * draw.lognormal(0, 0.2)), strict=True)) for n in units}
    problem = Problem(units, times, 0.1, lambda chosen: sum(drops[n][f] for n, f in chosen.items()))
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=FrontSampler(units, {n: {f: v for f, v in o.items() if f != "fp32"} for n, o in drops.items()}, times),
    )
    distributions = {n: optuna.distributions.CategoricalDistribution(fs) for n, fs in units.items()}
    seconds, peaks = [], []
    for number in range(trials):
        begun = time.perf_counter()
        trial = study.ask(distributions)
        seconds.append(time.perf_counter() - begun)
        study.tell(trial, problem(trial.params))
        if number % 250 == 249:
            peaks.append(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))
            recent = seconds[-250:]
            print(number + 1, f"{statistics.median(recent):.3f} s", peaks[-1], "MB", file=sys.stderr, flush=True)
    return {
        "units": count,
        "trials": trials,
        "median_seconds_by_250": [round(statistics.median(seconds[i : i + 250]), 3) for i in range(0, trials, 250)],
        "95_percent_seconds": round(float(np.quantile(seconds, 0.95)), 3),
        "process_peak_mb_by_250": peaks,
        "distinct": len({tuple(t.params.items()) for t in study.get_trials(deepcopy=False)}),
    }


PARTS = {
    "exhaustive": exhaustive_part,
    "wrong": wrong_part,
    "speed": speed_part,
    "long": partial(speed_part, count=62, trials=5000),
}


def main() -> None:
    """Make the named tables, all where none is named, and write a result each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # small products: threads would wait for each other
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    for part in asked.parts or PARTS:
        found = PARTS[part](asked.seeds)
        print(json.dumps(found, indent=1), file=sys.stderr)
        write_result(f"sampler-{part}", found)


if __name__ == "__main__":
    main()
