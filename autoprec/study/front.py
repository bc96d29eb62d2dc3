"""Pareto fronts: of plans that were measured, and of all assignments as predicted.

The predicted front is exact where it can be (`chain`), and says so; with it comes a bound: no assignment of at most
this drop is faster than that, as predicted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autoprec.errors import StudyError
from autoprec.formats import Format
from autoprec.probe.pacing import SAME
from autoprec.records import Measurement
from autoprec.study.chain import Border, Chain, ChainUnit, Choice, Hull, distinct, unbeaten

__all__ = [
    "ChainUnit",
    "Choice",
    "PredictedFront",
    "feasible",
    "measured_front",
    "pareto_front",
    "pareto_indices",
    "predicted_front",
]

Array = npt.NDArray[np.float64]


def pareto_indices(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats in both coordinates (smaller is better), first rising.

    A point is beaten by one that is no larger in both and smaller in one; of equal points the first stays.
    """
    found: list[int] = []
    best = float("inf")
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def feasible(measurement: Measurement) -> bool:
    """Say whether a measurement may be used, has both objectives and keeps its gradient within its limit."""
    if measurement.barred or measurement.drop is None or measurement.step_ms is None:
        return False
    if measurement.grad_error is None or measurement.grad_error_limit is None:
        # train mode gives a reason where there is no finite gradient; infer mode has neither
        return not (measurement.reason or "").startswith("the gradient is not finite")
    return measurement.grad_error <= measurement.grad_error_limit


def pareto_front(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the feasible measurements that none beats in both drop and step time, from least drop to least time."""
    usable = [m for m in measurements if feasible(m)]
    return [usable[i] for i in pareto_indices([_point(m) for m in usable])]


def _point(measurement: Measurement) -> tuple[float, float]:
    """Return the drop and the step time of a feasible measurement."""
    assert measurement.drop is not None and measurement.step_ms is not None
    return measurement.drop, measurement.step_ms


def measured_front(measurements: Sequence[Measurement], baselines: Collection[str]) -> list[Measurement]:
    """Return `pareto_front`, with a baseline in place of a plan that alone beats it, and by no more than noise.

    A plan file to follow should bring something: a search of some trials nearly always finds one that is 2 % ahead.

    Args:
        baselines: names of those of the measurements that are baselines.
    """
    front = pareto_front(measurements)
    for plain in (m for m in measurements if m.name in baselines and m not in front and feasible(m)):
        drop, step_ms = _point(plain)
        better = [i for i, m in enumerate(front) if _point(m)[0] <= drop and _point(m)[1] <= step_ms]
        if len(better) == 1 and front[better[0]].name not in baselines and _alike(front[better[0]], plain):
            front[better[0]] = plain
    return front


def _alike(plan: Measurement, plain: Measurement) -> bool:
    """Say whether times count as the same and intervals of drops meet; without an interval a drop is exact."""
    (drop, step_ms), (plain_drop, plain_ms) = _point(plan), _point(plain)
    high = plan.drop_ci95[1] if plan.drop_ci95 else drop
    low = plain.drop_ci95[0] if plain.drop_ci95 else plain_drop
    return plain_ms <= SAME * step_ms and low <= high


@dataclass(frozen=True, slots=True, eq=False)
class PredictedFront:
    """Points that no assignment beats, as predicted, from least time to least drop.

    `drop` [P] nats, `time_ms` [P], `bytes` [P], `picks` [P, units]: the index of each unit's choice. `exact`: no other
    assignment is missing; otherwise points may be missing, and `least_ms` is what bounds them.
    """

    units: tuple[ChainUnit, ...]
    drop: Array
    time_ms: Array
    bytes: Array
    picks: npt.NDArray[np.int8]
    exact: bool
    #: what bounds all assignments where the front is not exact
    hull: Hull | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.drop)

    def assignment(self, index: int) -> dict[str, Format]:
        """Return the format of each unit at a point."""
        return {u.name: u.choices[k].format for u, k in zip(self.units, self.picks[index], strict=True)}

    def within(self, drop: float) -> int | None:
        """Return the index of the fastest point whose drop is at most `drop`, None where there is none."""
        fitting = np.flatnonzero(self.drop <= drop)
        return int(fitting[np.argmin(self.time_ms[fitting])]) if len(fitting) else None

    def least_ms(self, drop: float) -> float:
        """Return a time that no assignment of at most this drop can beat, as predicted; infinite where none has it."""
        if self.hull is not None:
            return self.hull.least_ms(drop)
        fastest = self.within(drop)
        return math.inf if fastest is None else float(self.time_ms[fastest])


def predicted_front(
    units: Sequence[ChainUnit],
    *,
    border_ms: Border = 0.0,
    memory: bool = False,
    max_states: int | None = None,
) -> PredictedFront:
    """Return the front of all assignments of `units`, in the order in which they run.

    Args:
        units: what each may choose from, with predicted drop and time.
        border_ms: cost of a cast where two neighbours differ; or for each pair of neighbours a cost by formats
            (of the earlier, of the later), 0 where it is not named.
        memory: keep what is better in memory alone, too.
        max_states: partial assignments kept for one format of the last unit; None: what a second allows; 0: none, which
            leaves the hull of the front.

    Raises:
        StudyError: no unit, a unit without choices, a figure that is not finite, or units tied without a common format.
    """
    units = tuple(units)
    _check(units)
    chain = Chain(units, border_ms)
    if max_states == 0:
        picks, exact = np.empty((0, len(units)), dtype=np.intp), False
    else:
        picks, exact = chain.states(memory, max_states)
    hull = None if exact else chain.relaxed()
    if hull is not None:
        picks = np.concatenate([picks, hull.corners])
    picks = distinct(picks)
    drop, time_ms, size = chain.cost(picks)
    order = np.lexsort((size, drop, time_ms))
    table = np.stack([time_ms, drop, size] if memory else [time_ms, drop])[:, order]
    order = order[unbeaten(table)]
    return PredictedFront(units, drop[order], time_ms[order], size[order], picks[order].astype(np.int8), exact, hull)


def _check(units: tuple[ChainUnit, ...]) -> None:
    if not units:
        raise StudyError("there is no unit to choose a format for; give the units of a model")
    for unit in units:
        if not unit.choices:
            raise StudyError(f"unit '{unit.name}' has no format to choose from; give it one, such as fp32")
        for c in unit.choices:
            if not all(map(math.isfinite, (c.drop, c.time_ms, c.bytes))):
                raise StudyError(
                    f"unit '{unit.name}' in {c.format} has drop {c.drop} and time {c.time_ms} ms, which is no finite "
                    "figure; leave that format out of its choices"
                )
