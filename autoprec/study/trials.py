"""Measuring what the sampler proposes, until budget, trials, space or gains end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeAlias

from optuna.trial import Trial

from autoprec.formats import Format
from autoprec.probe.pacing import SAME
from autoprec.quantities import DropLimit
from autoprec.records import Measurement
from autoprec.study.course import Course
from autoprec.study.crew import Crew
from autoprec.study.finalists import training_ahead
from autoprec.study.knowledge import drop_priors, forecast_priors, time_priors
from autoprec.study.measuring import Outcome, outcome_of
from autoprec.study.sampler import FrontSampler

__all__ = ["measure_trials"]

_Key: TypeAlias = tuple[tuple[str, str], ...]

#: between looks at what other machines are at
_LOOK_SECONDS = 1.0
#: so many measurements in a row that cannot be carried out end a search: then it is not the plans
_FAULTS = 5
#: proposals in a row that were measured before, after which the space counts as seen
_STALE = 200
#: so many proposals in a row that are expected to add less than this share of the area under the corner end a search,
#: where no plan within the limit is predicted to be faster by more than what counts as the same
_IDLE, _NO_GAIN = 3, 1e-3
#: drops beyond this many limits, and under this part of one, are as good as one another to a search
_CORNER, _FLOOR = 10.0, 1e-3


def measure_trials(course: Course, trials: int | None) -> None:
    """Measure what the sampler proposes, until budget, trials, space or gains end."""
    course.sampler = course.ledger.sample_with(_new_sampler(course))
    with Crew[_Key, Outcome](course.workers) as crew:
        _search(course, trials, crew)


def _search(course: Course, trials: int | None, crew: Crew[_Key, Outcome]) -> None:
    """Keep every worker at a trial; the study is read and written here alone."""
    going, stale, idle, over = dict[_Key, Trial](), 0, 0, False
    while True:
        course.ledger.refresh()
        seen, away = _seen(course), _elsewhere(course)
        done = sum(row.trial is not None for row in course.ledger.rows)
        wanted = trials is None or done + len(going) + len(away) < trials
        if crew.free and wanted and not over and course.budget.has_time(course.reserve_seconds):
            if stale >= _STALE or _usable(course, (*seen, *going, *away)) >= course.size:
                course.news("search", f"the space of {course.size} assignments is seen")
                over = True
                continue
            trial = course.ledger.ask(course.distributions)
            idle = _idle(course, idle)
            assignment = course.space.assignment(trial.params)
            key = _key(assignment)
            # of two machines that ask at once, the later one sees by now what both are to measure
            course.ledger.refresh()
            seen = _seen(course)
            if key in seen or key in going or _elsewhere(course).get(key, trial.number) < trial.number:
                stale += 1
                course.ledger.repeat(trial, seen.get(key) or _twice(assignment))
                continue
            stale, going[key] = 0, trial
            course.ledger.begin(trial, assignment)
            name = trial.user_attrs.get("name", f"trial {trial.number}")
            request = course.request(course.plan(assignment), name, race=True)
            crew.begin(partial(outcome_of, request, budget=course.budget), key)
        elif going:
            key, outcome = crew.next()
            trial = going.pop(key)
            found = course.noted(outcome)
            course.ledger.add_trial(trial, found)
            left = _seconds_left(course, trials, crew.size)
            course.news("search", found.name, left, trial=trial.number, measurement=found)
            over = over or _is_over(course, found, trials, idle)
        elif (
            away
            and not over
            and trials is not None
            and done < trials
            and course.budget.has_time(course.reserve_seconds)
        ):
            course.say_once("search", "waiting for trials that other machines are at")
            time.sleep(_LOOK_SECONDS)
        else:
            return


def _seconds_left(course: Course, trials: int | None, workers: int) -> float:
    """Return how long the search goes on with all that comes after it; with nothing left to gain it ends before."""
    done = sum(row.trial is not None for row in course.ledger.rows)
    ahead = min(course.size - _usable(course, _seen(course)), sys.maxsize if trials is None else max(0, trials - done))
    measuring = ahead * course.budget.each_seconds / workers
    return min(course.budget.left, measuring + course.confirm_seconds + training_ahead(course))


def _idle(course: Course, idle: int) -> int:
    """Count proposals in a row that are expected to gain next to nothing."""
    gain = course.sampler.gain if course.sampler else None
    return idle + 1 if gain is not None and gain < _NO_GAIN else 0


def _is_over(course: Course, found: Measurement, trials: int | None, idle: int) -> bool:
    """Say whether a search ends here, because nothing can be measured any more or nothing is left to gain."""
    if course.faults >= _FAULTS:
        course.notes.append(
            f"the search ended early: {course.faults} plans in a row could not be measured, the last because "
            f"{found.reason}. What was measured stands; go on with --resume"
        )
        return True
    bound = course.bound() if trials is None and idle >= _IDLE else None
    if bound is None or bound["faster_percent"] >= 100 * (SAME - 1):
        return False
    course.news("search", f"nothing left to gain: {_bound_text(bound, course.limit)}")
    return True


def _new_sampler(course: Course) -> FrontSampler:
    """Return the sampler, with what is known before any trial."""
    reference = course.ledger.reference
    assert reference is not None and reference.step_ms is not None
    limit = max(course.limit_value, 1e-12)
    return FrontSampler(
        {d.name: d.formats for d in course.space.decisions},
        drop_priors(course.space, course.known),
        forecast_priors(course.space, course.forecast) if course.forecast else time_priors(course.space, course.speed),
        drop_floor=_FLOOR * limit,
        corner=(_CORNER * limit, reference.step_ms),
        # the same seed again would draw what was drawn already
        seed=course.seed + len(course.ledger.rows),
        barred=course.barred,
    )


def _seen(course: Course) -> dict[_Key, Measurement]:
    """Return what was measured of the space: trials, and the baselines that stand for one."""
    inside = {b.name for b in course.plans.baselines if course.standing_for(b.plan) is not None}
    return {
        _key(row.measurement.assignment): row.measurement
        for row in course.ledger.rows
        if (row.trial is not None and not row.gone) or row.measurement.name in inside
    }


def _usable(course: Course, keys: Iterable[_Key]) -> int:
    """Count the assignments that heed the vetoes, as those that `course.size` counts."""
    vetoes = {(veto.unit, str(veto.format)) for veto in course.vetoes}
    return sum(vetoes.isdisjoint(key) for key in set(keys))


def _elsewhere(course: Course) -> dict[_Key, int]:
    """Return the assignments that other machines are at, each with the first trial of it."""
    found = dict[_Key, int]()
    for number, choices in course.ledger.elsewhere().items():
        if choices.keys() == {d.name for d in course.space.decisions}:  # else its choices are being made
            found.setdefault(_key(course.space.assignment(choices)), number)
    return found


def _twice(assignment: Mapping[str, Format]) -> Measurement:
    """Return what is told of an assignment that is being measured already."""
    return Measurement(name="twice", assignment=assignment, reason="being measured by another worker")


def _key(assignment: Mapping[str, Format]) -> _Key:
    return tuple(sorted((name, str(choice)) for name, choice in assignment.items()))


def _bound_text(bound: Mapping[str, float], limit: DropLimit) -> str:
    return f"as predicted, no plan within {limit} is {bound['faster_percent']:.1f} % faster than the fastest measured"
