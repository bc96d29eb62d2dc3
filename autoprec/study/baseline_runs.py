"""Measuring what every search begins with: the reference, the baselines, and the recommender's plan asked for first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from autoprec.errors import MeasurementError, StudyError
from autoprec.records import Measurement
from autoprec.study.ahead import seconds_left
from autoprec.study.baselines import RECOMMENDED, Baseline
from autoprec.study.course import Course
from autoprec.study.measuring import outcome_of

__all__ = ["measure_baselines"]


def measure_baselines(course: Course) -> None:
    """Measure the baselines that are not known yet, and make them known to the sampler; of machines, one does."""
    with course.ledger.turn(partial(_wait, course)):
        _measure_baselines(course)


def _wait(course: Course, by: str) -> None:
    """Wait for the baselines that another machine measures."""
    if not course.budget.has_time():
        raise StudyError(f"the budget ended while {by} measured the baselines. Go on with --resume and more of it.")
    course.say_once("baselines", f"waiting for {by}, which measures the baselines for all")


def _measure_baselines(course: Course) -> None:
    known = {row.measurement.name for row in course.ledger.rows}
    wanted = list(course.plans.baselines)
    if course.plans.recommended and course.space.of_plan(course.plans.recommended) is None:
        wanted.append(Baseline(RECOMMENDED, course.plans.recommended))
    todo = [b for b in wanted if b.name not in known]
    for count, baseline in enumerate(todo):
        if baseline.plan is not None and course.ledger.reference is not None and not course.budget.has_time():
            course.news("baselines", f"{baseline.name} is left out: the budget is spent")
            continue
        ahead = sum(b.plan is not None for b in todo[count:])
        course.news("baselines", f"measuring {baseline.name}", seconds_left(course, ahead))
        found = _baseline(course, baseline)
        course.ledger.add_baseline(found)
        course.news("baselines", baseline.name, measurement=found)
    # a kill may have come between any two of these
    _tell_baselines(course)
    _enqueue(course)


def _baseline(course: Course, baseline: Baseline) -> Measurement:
    if baseline.plan is None:
        return Measurement(name=baseline.name, assignment={}, reason=baseline.reason)
    found = course.noted(outcome_of(course.request(baseline.plan, baseline.name), course.worker, course.budget))
    if baseline.barred and found.step_ms is not None:
        found = replace(found, barred=True, reason="; ".join(filter(None, (found.reason, baseline.reason))))
    if course.ledger.reference is None:
        # the reference against itself: its speedup is the noise of this machine
        if found.step_ms is None:
            raise MeasurementError(
                f"the FP32 reference cannot be measured: {found.reason}. Try a smaller --batch-size or --seq-len."
            )
        course.ledger.set_reference(found)
    return found


def _tell_baselines(course: Course) -> None:
    """Give the study the baselines of the space as trials, so that a sampler learns from them."""
    plans = {b.name: b.plan for b in course.plans.baselines}
    told = course.ledger.told()
    for found in course.measured():
        if found.name in told:
            continue
        choices = course.standing_for(plans.get(found.name))
        if choices is not None and found.drop is not None and found.step_ms is not None:
            course.ledger.tell_known(choices, course.distributions, found)


def _enqueue(course: Course) -> None:
    """Ask for the recommender's plan first."""
    recommended = course.space.of_plan(course.plans.recommended) if course.plans.recommended else None
    if recommended is not None:
        course.ledger.enqueue(recommended, RECOMMENDED)
