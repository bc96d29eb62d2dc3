"""Times of a few whole steps beside the reference's: all units in a format, and all units of a shape."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.arrival import Part, Run
from autoprec.probe.batches import Batch
from autoprec.probe.clock import Clock
from autoprec.probe.payoff import SETTLED
from autoprec.probe.steps import Stepper, timed
from autoprec.probe.workload import Workload
from autoprec.records import ModelProfile, UnitTime
from autoprec.runtime.attach import applied

__all__ = ["WholeSteps", "time_steps"]

#: shapes that have steps of their own, those that save or cost most; and from which share of all units' time on
_SHAPES, _MATTERS = 6, 0.02
#: seconds of a step from which on the first one under a plan is as good as the next: what attaching costs it is lost
#: there, and each step is dear (in steps of 10 ms, FP32 units in an ambient format took 8-16 % more; the next, 1-3 %)
_LONG_S = 0.2
#: rounds that are made in any case (of no fewer assignments), and at most
_FEWEST, _MOST = 2, 40

_Assignment = Mapping[str, Format]


class WholeSteps:
    """Seconds of the reference's steps and, by assignment, ratios to them."""

    def __init__(self, assignments: Sequence[_Assignment]) -> None:
        self.assignments = list(assignments)
        self.reference_s: list[float] = []
        self.ratios: list[list[float]] = [[] for _ in assignments]

    def runs(self, times: Sequence[UnitTime]) -> Iterator[Run]:
        """Yield what the regression reads."""
        wide = {row.unit: row for row in times if row.format is Format.FP32}
        step_ms = 1e3 * statistics.median(self.reference_s)
        for assignment, ratios in zip(self.assignments, self.ratios, strict=True):
            shares = dict[Part, float]()
            for unit, choice in assignment.items():
                if unit in wide:
                    part = wide[unit].shape, choice
                    shares[part] = shares.get(part, 0.0) + wide[unit].step_ms / step_ms
            yield Run(shares, ratios)


def time_steps(
    workload: Workload, profile: ModelProfile, times: Sequence[UnitTime], ambient: Format, clock: Clock
) -> WholeSteps:
    """Time steps in rounds until the clock's time is spent, the order turning round from round to round."""
    stepper, batch = Stepper(workload), workload.batches[0]
    _step(stepper, batch, None)  # sets up kernels and optimizer states
    each = _step(stepper, batch, None)
    fitting = int((clock.allowed - clock.elapsed) / (_FEWEST * max(each, 1e-9))) - 2  # beside the reference's two
    found = WholeSteps(list(itertools.islice(_assignments(times), max(fitting, _FEWEST))))
    takes_fp8 = any(row.format is Format.FP8 for row in times)
    wide = Plan.assign(
        profile,
        {u.name: Format.FP32 for u in profile.units},
        ambient=ambient,
        fp8_recipe="tensorwise" if takes_fp8 else None,
        mode=workload.mode,
    )
    plans = [wide.replace(dict(assignment)) for assignment in found.assignments]
    begun = clock.elapsed
    for number in range(_MOST):
        spent = clock.elapsed - begun
        if number >= _FEWEST and clock.elapsed + spent / number > clock.allowed:
            break
        order = list(range(len(found.assignments)))
        before, seconds = _step(stepper, batch, None), dict[int, float]()
        for index in order if number % 2 == 0 else reversed(order):
            seconds[index] = _step(stepper, batch, plans[index], warm=each < _LONG_S)
        reference = (before + _step(stepper, batch, None)) / 2  # all of a round are told by it
        found.reference_s.append(reference)
        for index, ratios in enumerate(found.ratios):
            ratios.append(seconds[index] / reference)
    return found


def _assignments(times: Sequence[UnitTime]) -> Iterator[_Assignment]:
    """Yield what is worth a step: nothing low, all units in a format, all units of a shape in it.

    What is far slower than FP32 alone is not made slow in a step, too, nor what matters little looked for in one.
    """
    yield {}
    wide = {row.unit: row.step_ms for row in times if row.format is Format.FP32}
    quick = [row for row in times if row.format is not Format.FP32 and row.ratio.value <= SETTLED]
    groups: dict[Part, list[UnitTime]] = {}
    for row in quick:
        groups.setdefault((row.shape, row.format), []).append(row)
    weights = {
        part: sum(wide[row.unit] * abs(row.ratio.value - 1) for row in rows) / sum(wide.values())
        for part, rows in groups.items()
    }
    matter = sorted((part for part in groups if weights[part] >= _MATTERS), key=lambda part: -weights[part])
    for choice in dict.fromkeys(choice for _, choice in matter):
        yield {row.unit: choice for row in quick if row.format is choice}
    for shape, choice in matter[:_SHAPES]:
        if sum(other is choice for _, other in matter) > 1:
            yield {row.unit: choice for row in groups[shape, choice]}


def _step(stepper: Stepper, batch: Batch, plan: Plan | None, *, warm: bool = False) -> float:
    """Return the seconds of one step under a plan, with its loss scale, or of the reference; `warm`: of the second."""
    own = stepper.scaled(plan.grad_scaler) if plan and plan.grad_scaler else stepper
    with applied(stepper.workload.model, plan) if plan else contextlib.nullcontext():
        if warm:
            own.run(batch)
        return timed(stepper.device, partial(own.run, batch))[0]
