"""Hypervolume in a large space: FrontSampler after 40 evaluations beside Optuna's samplers after 400.

    python benchmarks/bench_large_space.py [--seeds 3] [--fill MINUTES]

SmolLM2-135M, all 62 units × {fp32, bf16, fp8} (the embeddings without fp8): 2 · 3^61 assignments. A drop is measured:
the model runs 256 tokens of an Austen novel with the plan in force (ambient BF16, FP8 emulated), KL against FP32. A
time is that of a table: the products of 16,384 tokens on the catalogue's H100 SXM, each the larger of its arithmetic
and its traffic (`recommender.features.gemm_seconds`), what FP8 needs to scale and cast taken as fused into what comes
before; a border between neighbours of different formats reads the stream once and writes it once. All samplers start
from the same three uniform plans, which count as evaluations, as does an assignment that is proposed again.

FrontSampler's prior of drops is one `probe_sensitivity`: of the 256 tokens themselves, and, in a run of its own, of
2,048 tokens of another novel. Its prior of times is the table with an error of 10 % a unit and format, as in
`bench_sampler.py`, whose reference point (the worst drop and time of the uniform plans) and floor are used.

A CPU without instructions for BF16 computes its products in FP32 and rounds them once (`runtime.target`).

Measured drops are kept in `benchmarks/truths/large-smollm2.jsonl`, an assignment a line; what is there is not
measured again. `--fill` measures what Optuna's samplers ask for, for so many minutes, and writes no result; several
processes may fill, each starting with another of the seeds (`--first`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from bench_sampler import FORMATS, Assignment, Problem, ours, rivals, run, uniform
from models import default_cache
from record import device, write_result
from truths import FOLDER

from autoprec import Plan, Workload, applied, probe_sensitivity, probe_units
from autoprec.catalog import find_entry
from autoprec.formats import Format
from autoprec.probe.compare import compare
from autoprec.probe.readout import Readout
from autoprec.probe.workload import workload_from
from autoprec.recommender.features import bandwidth, gemm_seconds, unit_facts
from autoprec.records import Mode
from autoprec.runtime import fp8
from autoprec.runtime.identity import weights_digest
from autoprec.runtime.target import products_in_fp32

PATH = FOLDER / "large-smollm2.jsonl"
CARD, TOKENS = "h100-sxm-80gb", 16_384
#: bytes that a cast between FP32 and BF16 moves: it reads the one and writes the other
CAST_BYTES = 6
WIDTHS = {Format.FP32: 4, Format.BF16: 2, Format.FP8: 1}
OURS, RIVALS = (10, 20, 40), (40, 100, 200, 400)
KINDS = ("TPE", "TPE multivariate", "NSGA-II")


class OutOfTimeError(Exception):
    """The minutes of `--fill` are over."""


def workload(novel: str, batches: int) -> Workload:
    """Return SmolLM2 on windows of a novel: batches of 2 x 128 tokens, all of which count."""
    cache = default_cache()
    text = cache / "austen" / f"{novel}.txt"
    found = workload_from(str(cache / "smollm2"), data=text, mode="infer", batch_size=2, seq_len=128, batches=batches)
    return found.with_batches([{"input_ids": b["input_ids"]} for b in found.batches])


class Drops:
    """Drops of assignments by running the model, kept in a file that several processes may add to."""

    def __init__(self, work: Workload, path: Path, until: float) -> None:
        self.model, self.batch, self.work, self.until = work.model.eval(), work.batches[0], work, until
        units = probe_units(self.model).units
        self.base = Plan.assign(self.model, {u.name: "fp32" for u in units}, ambient="bf16", mode="infer")
        self.units = {u.name: [f for f in FORMATS if f in u.formats] for u in units}
        about = {
            "units": list(self.units),
            "weights_digest": weights_digest(self.model),
            "data_digest": work.data_digest(),
            "device": [device()["name"], *device()["instructions"]],
            "torch": torch.__version__,
        }
        if not path.exists():
            path.write_text(json.dumps(about) + "\n")
        first, *rows = path.read_text().splitlines()
        if json.loads(first) != about:
            raise SystemExit(f"{path} is of another model, text, device or torch; move it away to measure anew")
        self.path, self.known, self.seen = path, dict(map(json.loads, rows)), path.stat().st_size
        self.measured = 0
        with torch.no_grad():
            read = work.readout(self.batch, work.forward(self.batch))
            self.reference = Readout(read.kind, read.predictions.clone(), read.counted, read.labels)
            log_p = self.reference.predictions.double().log_softmax(-1)
            self.p = log_p.exp()
            self.negentropy = float((self.p * log_p).sum())

    def __call__(self, chosen: Assignment) -> float:
        """Return the drop of an assignment, measured now where it is not known."""
        key = "".join(str(FORMATS.index(chosen[name])) for name in self.units)
        if key not in self.known and self.path.stat().st_size > self.seen:
            self.look()
        if key not in self.known:
            if time.monotonic() > self.until:
                raise OutOfTimeError
            self.known[key] = self.measure(chosen)
            self.measured += 1
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]

    def look(self) -> None:
        """Add what other processes have measured; a line is written at once, and the last may still be under way."""
        text = self.path.read_text()
        self.seen = len(text)
        self.known |= dict(map(json.loads, text[: text.rindex("\n")].splitlines()[1:]))

    def measure(self, chosen: Assignment) -> float:
        """Run the model with the assignment in force; KL in FP64, with the reference's share of it computed once."""
        with torch.no_grad(), products_in_fp32(), applied(self.model, self.base.replace(chosen), emulate=True):
            logits = self.work.readout(self.batch, self.work.forward(self.batch)).predictions.double()
            cross = float(logits.logsumexp(-1).sum() - torch.dot(self.p.view(-1), logits.view(-1)))
        return max((self.negentropy + cross) / logits[..., 0].numel(), 0.0)

    def check(self, chosen: Assignment) -> None:
        """See that an assignment's drop is the same each time, and what the package's own comparison gives."""
        with torch.no_grad(), products_in_fp32(), applied(self.model, self.base.replace(chosen), emulate=True):
            part = compare(self.reference, self.work.readout(self.batch, self.work.forward(self.batch)))
        plain = float(part.drop.sum() / part.weight.sum())
        with rounded_once(self.model):
            found = {self.measure(chosen), self.measure(chosen)}
        if len(found) > 1 or abs(found.pop() - plain) > 1e-9 * plain:
            raise SystemExit("one plan gave two drops; the file of drops is of no use here")


@contextlib.contextmanager
def rounded_once(model: torch.nn.Module) -> Iterator[None]:
    """Keep the weights' FP8 roundings between runs: they are the same each time, and half of a run's work."""
    plain, kept, weights = fp8.fp8_quantize, {}, {p.data_ptr() for p in model.parameters()}

    def quantize(values: torch.Tensor, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if values.data_ptr() not in weights:
            return plain(values, *args, **named)
        key = (values.data_ptr(), values.shape, values.stride(), *args, *named.items())
        if key not in kept:
            kept[key] = plain(values, *args, **named)
        return kept[key]

    fp8.fp8_quantize = quantize
    try:
        yield
    finally:
        fp8.fp8_quantize = plain


def problem_of(drops: Drops) -> Problem:
    """Return the problem with the table of times, in µs; `best` is set once all points are known."""
    card = find_entry(CARD)
    speed = bandwidth(card.profile)
    assert speed is not None  # the catalogue has it
    facts = unit_facts(probe_units(drops.model))
    times: dict[str, dict[str, float]] = {}
    for name, formats in drops.units.items():
        times[name] = {}
        for choice in map(Format, formats):
            rate = card.profile.peak_tflops[choice] * card.achieved_fraction.get(choice, 1.0)
            seconds = (
                gemm_seconds(leaf, TOKENS, Mode.INFER, rate, speed, WIDTHS[choice]) for leaf in facts[name].gemms
            )
            times[name][str(choice)] = 1e6 * sum(seconds)
    border = 1e6 * TOKENS * int(drops.model.config.hidden_size) * CAST_BYTES / speed
    problem = Problem(drops.units, times, border, drops)
    ends = [problem(chosen) for chosen in uniform(problem)]
    problem.corner = (max(d for d, _ in ends), max(t for _, t in ends))
    return problem


def probed(novel: str, batches: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return a probe's drops by unit and format."""
    profile = probe_sensitivity(workload(novel, batches), ("bf16", "fp8"), seed=seed, cache=False)
    found: dict[str, dict[str, Any]] = {}
    for row in profile.drops:
        found.setdefault(row.unit, {})[str(row.format)] = row.drop
    return found


def courses(problem: Problem, seed: int, *, fill: bool) -> Iterator[tuple[str, list[tuple[float, float]], float]]:
    """Yield each sampler's values in their order, and the sampler's seconds a trial; to fill, Optuna's alone.

    These propose the same again for the same drops; a probe ends by the clock, and ours with it.
    """
    for kind in KINDS:
        yield kind, *run(problem, rivals(seed)[kind](), RIVALS[-1])
    if fill:
        return
    for label, novel, batches in (("same tokens", "sense_and_sensibility", 1), ("another novel", "emma", 8)):
        prior = probed(novel, batches, seed)
        yield f"FrontSampler, probe of {label}", *run(problem, ours(problem, prior, seed), OURS[-1])


def judged(problem: Problem, found: dict[int, dict[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    """Return hypervolumes as shares of that of all points measured here together."""
    problem.best = problem.volume([v for course in found.values() for values in course.values() for v in values])
    shares: dict[str, list[dict[int, float]]] = {}
    for course in found.values():
        for kind, values in course.items():
            shares.setdefault(kind, []).append(problem.shares(values, OURS if kind.startswith("Front") else RIVALS))
    bar = [max(shares[kind][i][RIVALS[-1]] for kind in KINDS) for i in range(len(found))]
    reached = {
        kind: {
            "least lead over the best rival of the same seed": round(
                min(row[OURS[-1]] - b for row, b in zip(rows, bar, strict=True)), 4
            ),
            "at least as good in every seed": all(row[OURS[-1]] >= b for row, b in zip(rows, bar, strict=True)),
        }
        for kind, rows in shares.items()
        if kind.startswith("Front")
    }
    return {
        "share of the hypervolume of all points found, by evaluations": {
            kind: {
                str(n): {
                    "median": round(statistics.median(row[n] for row in rows), 4),
                    "by seed": [round(row[n], 4) for row in rows],
                }
                for n in rows[0]
            }
            for kind, rows in shares.items()
        },
        f"FrontSampler at {OURS[-1]} beside the best rival at {RIVALS[-1]}": reached,
    }


def main() -> None:
    """Run all samplers for all seeds; write the result, unless only to fill the file of drops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fill", type=float, metavar="MINUTES", help="measure for so long, write no result")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the seed to start with")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    until = time.monotonic() + 60 * asked.fill if asked.fill is not None else float("inf")
    drops = Drops(workload("sense_and_sensibility", 1), PATH, until)
    found: dict[int, dict[str, list[tuple[float, float]]]] = {}
    lasting: dict[str, float] = {}
    drops.check({n: fs[-1] for n, fs in drops.units.items()})
    with rounded_once(drops.model):
        problem = problem_of(drops)
        try:
            for seed in [(asked.first + i) % asked.seeds for i in range(asked.seeds)]:
                begun = time.monotonic()
                for kind, values, each in courses(problem, seed, fill=asked.fill is not None):
                    found.setdefault(seed, {})[kind] = values
                    lasting[kind] = max(lasting.get(kind, 0.0), each)
                    volume, spent = problem.volume(values), time.monotonic() - begun
                    print(
                        seed,
                        kind,
                        f"{volume:.6g}, {drops.measured} measured, {spent:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
        except OutOfTimeError:
            print(f"time over: {drops.measured} measured, {len(drops.known)} known", file=sys.stderr)
            return
    if asked.fill is not None:
        return
    figures = {
        "model": "SmolLM2-135M-Instruct, 256 tokens of Sense and Sensibility",
        "units": len(problem.units),
        "seeds": asked.seeds,
        "corner": {"drop_nats": problem.corner[0], "time_us": round(problem.corner[1], 1)},
        "border_us": round(problem.border, 2),
        "uniform plans, nats and us": [[d, round(t, 1)] for d, t in map(problem, uniform(problem))],
        **judged(problem, dict(sorted(found.items()))),
        "slowest seconds a proposal": {kind: round(each, 3) for kind, each in lasting.items()},
        "assignments measured in all": len(drops.known),
    }
    print(json.dumps(figures, indent=1), file=sys.stderr)
    write_result("large-space-smollm2", figures)


if __name__ == "__main__":
    main()
