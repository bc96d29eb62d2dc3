"""The end of a search: plans it would choose are tried on batches that neither probe nor search has used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from autoprec.measurement import Request, evaluate
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.workload import Workload
from autoprec.records import Confirmed, Measurement
from autoprec.study.confirmation import Candidate, Try, Unmeasurable, attempts
from autoprec.study.race import FIRST_LOOK, Spread
from autoprec.study.worker import WorkerLost

__all__ = ["OutOfTime", "confirmed", "split"]


class OutOfTime(Exception):
    """The budget ends before a plan is confirmed."""


def split(workload: Workload) -> tuple[Workload, Workload | None]:
    """Return the workload to probe and search on, and that to confirm on: the second half of the batches.

    None where that half would be too few to tell anything.
    """
    batches = workload.batches
    half = len(batches) // 2
    if half < FIRST_LOOK:
        return workload, None
    return workload.with_batches(batches[: len(batches) - half]), workload.with_batches(batches[-half:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirming:
    """What confirmations need: unseen batches, the limit in the drop's unit, and drops that plans had in the search."""

    unseen: Workload
    limit: float
    earlier: Sequence[Sequence[float]]
    drop_unit: str
    plan_of: Callable[[Measurement], Plan]
    has_time: Callable[[], bool]
    #: None: in this process
    measure: Callable[[Request], Measurement] | None = None
    #: of a device that is not here
    forecast: Forecast | None = None
    #: why a plan whose drop is within the limit is not to be chosen all the same
    also: Callable[[str, Plan], str | None] = lambda name, plan: None

    def candidate(self, found: Measurement) -> Candidate:
        """Return a measured plan as a candidate."""
        plan = self.plan_of(found)

        def drop(batch: int) -> float:
            if not self.has_time():
                raise OutOfTime
            one = self.unseen.with_batches([self.unseen.batches[batch]])
            try:
                again = (self.measure or evaluate)(self._request(one, plan, found.name))
            except WorkerLost as error:
                raise Unmeasurable(str(error)) from None
            if again.drop is None:
                raise Unmeasurable(again.reason or "its drop is not finite")
            return again.drop

        also = partial(self.also, found.name, plan)
        return Candidate(found.name, drop, Spread.of(self.earlier, found.batch_drops), also)

    def _request(self, workload: Workload, plan: Plan, name: str) -> Request:
        away = self.forecast is not None
        return Request(workload=workload, plan=plan, name=name, emulate=away, forecast=self.forecast, drop_only=True)


def confirmed(setting: Confirming, wanted: Iterator[Measurement]) -> tuple[tuple[Confirmed, ...], str | None]:
    """Try plans in order until one is shown to be within the limit; return all tries and, where time ran out, that.

    Raises:
        MeasurementError: the reference cannot be run, or its output is not finite.
    """
    tries: list[Confirmed] = []
    weights = [float(setting.unseen.tokens(batch)) for batch in setting.unseen.batches]
    candidates = (setting.candidate(found) for found in wanted)
    try:
        for one in attempts(candidates, setting.limit, len(weights), weights=weights, unit=setting.drop_unit):
            tries.append(_record(one))
    except OutOfTime:
        return tuple(tries), "the budget ended before a plan was confirmed on unseen batches"
    return tuple(tries), None


def _record(one: Try) -> Confirmed:
    bounds = one.bounds
    return Confirmed(
        name=one.name,
        answer=str(one.answer),
        drop=bounds.mean if bounds else None,
        low=bounds.lower if bounds else None,
        high=bounds.upper if bounds else None,
        batches=one.batches,
        level=one.level,
        reason=one.reason,
    )
