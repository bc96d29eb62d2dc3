"""Regret of the recommender on models and devices left out of its tree, beside what one would use without it.

    python benchmarks/bench_regret.py [--devices N] [--no-write]

For every model with known drops (`fronts.py`), on devices drawn with a fixed seed, in two modes, four sizes and six
allowances: predicted time of the recommended plan over the solved front's best at the same allowance. A plan with FP8
is compiled, as its training arguments say, and so is the front that it is held against; others are eager. The front may
use FP8 wherever a kernel exists, in the head and the outer blocks too. `broken`: the emulated drop, the sum over units,
is above the allowance; of trained models alone, whose drops are their own. Nothing here is timed. Writes
benchmarks/results/regret.json.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from fronts import LIMITS, SIZES, Sample, Solved, samples, situation, solved
from record import write_result

from autoprec.catalog import device_names, find_device
from autoprec.formats import Format, Fp8Recipe
from autoprec.recommender.advice import base_choice
from autoprec.recommender.choice import too_small, unit_choices
from autoprec.recommender.learned import shipped_tree
from autoprec.recommender.table import read_tables, shipped_texts, table_digest
from autoprec.recommender.tree import Tree, fit_tree
from autoprec.records import Mode, Role, Support

#: mission row 5, by compute capability; AMD's and newer cards as their formats
_ROW5_FP8 = (8, 9)


@dataclass(frozen=True, slots=True)
class Case:
    """One plan in one situation."""

    ratio: float
    broken: bool
    model: str
    device: str
    own: bool
    fp8: bool
    size: int
    mode: str
    limit: float


class Fronts:
    """The fronts of one situation, eager and compiled, solved when they are asked for."""

    def __init__(self, sample: Sample, device: str, mode: Mode, size: tuple[int, int]) -> None:
        self.place = (sample, device, mode, size)
        self._known: dict[bool, Solved | None] = {}
        self._best: dict[tuple[bool, float], float] = {}

    def of(self, compiled: bool) -> Solved | None:
        """Return the front, None where nothing can be predicted."""
        if compiled not in self._known:
            sample, device, mode, size = self.place
            self._known[compiled] = solved(sample, device, mode, size, compiled=compiled)
        return self._known[compiled]

    def case(self, assignment: Mapping[str, Format], limit: float, *, compiles: bool = True) -> Case:
        """Judge an assignment; not `compiles`: eager, whatever it is."""
        sample, device, mode, size = self.place
        fp8 = Format.FP8 in assignment.values()
        front = self.of(fp8 and compiles)
        assert front is not None
        key = (fp8 and compiles, limit)
        if key not in self._best:
            self._best[key] = front.best(limit)[0]
        ratio = front.seconds(assignment) / self._best[key]
        drop = sample.drop(assignment, tf32=front.tf32)
        return Case(ratio, drop > limit, sample.name, device, sample.own, fp8, size[0] * size[1], str(mode), limit)


def recommended(sample: Sample, front: Solved, limit: float, tree: Tree) -> dict[str, Format]:
    """Return what is recommended."""
    here = situation(sample, front.device, front.setup, limit)
    chosen = unit_choices(sample.profile, sample.units, sample.facts, front.setup, base_choice(here), here, tree)
    return {name: choice.format for name, choice in chosen.items()}


def bf16_flag(sample: Sample, front: Solved) -> dict[str, Format] | None:
    """Return `bf16=True`: BF16 everywhere, native or not."""
    return _everywhere(front, Format.BF16, lambda name: True)


def row5(sample: Sample, front: Solved) -> dict[str, Format] | None:
    """Return the table of mission row 5: FP8 on Hopper and later, BF16 from capability 8.0, FP16 before."""
    return (
        fp8_everywhere(sample, front)
        if front.device.name.startswith(("h100", "h200", "gh200", "b200"))
        else _half(front)
    )


def fp8_everywhere(sample: Sample, front: Solved) -> dict[str, Format] | None:
    """Return FP8 for all linear layers that have a kernel, where it is native."""
    return _everywhere(front, Format.FP8, lambda name: True)


def torchao(sample: Sample, front: Solved) -> dict[str, Format] | None:
    """Return FP8 for units all of whose layers pass torchao's filter, where it is native."""

    def passes(name: str) -> bool:
        gemms = sample.units[name].gemms
        return bool(gemms) and not any(too_small(leaf, Fp8Recipe.TENSORWISE) for leaf in gemms)

    return _everywhere(front, Format.FP8, passes)


def _half(front: Solved) -> dict[str, Format]:
    return _everywhere(front, front.half, lambda name: True) or {}


def _everywhere(front: Solved, wanted: Format, passes: Callable[[str], bool]) -> dict[str, Format] | None:
    """Return a format where a unit has it and passes, else the 16-bit one; None where the device has no price."""
    found = {}
    for name, formats in front.choices.items():
        if front.sample.units[name].unit.role is Role.EMBEDDING:
            found[name] = Format.FP32 if Format.FP32 in formats else formats[0]
        elif wanted is Format.FP8:
            found[name] = wanted if wanted in formats and passes(name) else front.half
        elif wanted in front.prices.units[name]:
            found[name] = wanted
        else:
            return None
        if found[name] not in front.prices.units[name]:
            return None
    return found


RIVALS = {
    "bf16=True": bf16_flag,
    "torchao's auto filter": torchao,
    "mission row 5": row5,
    "fp8 for all linears where native": fp8_everywhere,
}


def places(count: int) -> Iterator[tuple[Sample, str, Mode, tuple[int, int]]]:
    """Yield situations: half of each one's devices have native FP8, which are a quarter of the catalogue."""
    fp8 = [n for n in device_names() if find_device(n).supports(Format.FP8) is Support.NATIVE]
    others = [n for n in device_names() if n not in fp8]
    for sample in samples():
        for mode in Mode:
            for size in SIZES:
                draw = random.Random(f"{sample.name} {mode} {size}")
                for device in (*draw.sample(fp8, count // 2), *draw.sample(others, count - count // 2)):
                    yield sample, device, mode, size


def summary(cases: list[Case]) -> dict[str, Any]:
    """Return quantiles of the ratios, and the share of broken allowances among trained models."""
    ratios = [case.ratio for case in cases]
    own = [case for case in cases if case.own]
    return {
        "cases": len(cases),
        "median": round(median(ratios), 4),
        "mean": round(float(np.mean(ratios)), 4),
        "p95": round(float(np.quantile(ratios, 0.95)), 4),
        "largest": round(max(ratios), 3),
        "with_fp8": sum(case.fp8 for case in cases),
        "broken_percent": round(100 * sum(case.broken for case in own) / max(1, len(own)), 2),
        "cases_of_trained_models": len(own),
    }


def main() -> None:
    """Judge, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="a model, mode and size")
    parser.add_argument("--leaves", type=int)
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    texts = shipped_texts()
    rows, digest = read_tables(texts).rows, table_digest(texts)
    more = {"leaves": asked.leaves} if asked.leaves else {}
    by_model = {g: fit_tree(rows[rows["group"] != g], digest, **more) for g in rows["group"].unique()}
    by_device = {d: fit_tree(rows[rows["device"] != d], digest, **more) for d in rows["device"].unique()}
    cases: dict[str, list[Case]] = {}
    for sample, device, mode, size in places(asked.devices):
        fronts = Fronts(sample, device, mode, size)
        front = fronts.of(False)
        if front is None or any(Format.FP32 not in own for own in front.prices.units.values()):
            continue  # a B300's peak in FP32 is not known: what is recommended there cannot be priced
        trees = {
            "one model left out": by_model[sample.source],
            "one device left out": by_device.get(device) or shipped_tree(),
            "nothing left out": shipped_tree(),
        }
        for limit in LIMITS:
            for name, tree in trees.items():
                given = recommended(sample, front, limit, tree)
                cases.setdefault(name, []).append(fronts.case(given, limit))
                if name == "one model left out":
                    again = fronts.case(given, limit, compiles=False)
                    cases.setdefault("one model left out, nothing compiled", []).append(again)
            for name, rival in RIVALS.items():
                plan = rival(sample, front)
                if plan is not None:
                    cases.setdefault(name, []).append(fronts.case(plan, limit))
    figures = {name: summary(own) for name, own in cases.items()}
    for name, row in figures.items():
        print(f"{name:38}", row)
    worst = sorted(cases["one model left out"], key=lambda case: -case.ratio)[:30]
    print(*worst, sep="\n", file=sys.stderr)
    print(*[case for case in cases["one model left out"] if case.broken and case.own][:20], sep="\n", file=sys.stderr)
    if not asked.no_write:
        write_result("regret", {"limits_percent": list(LIMITS), "sizes": [list(size) for size in SIZES], **figures})


if __name__ == "__main__":
    main()
