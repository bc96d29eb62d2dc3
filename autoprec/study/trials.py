"""Measuring what the sampler proposes, until budget, trials, space or gains end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from optuna.trial import Trial

from autoprec.formats import Format
from autoprec.probe.pacing import SAME
from autoprec.quantities import DropLimit
from autoprec.records import Measurement
from autoprec.study.ahead import seconds_left
from autoprec.study.course import Course
from autoprec.study.crew import Crew
from autoprec.study.knowledge import drop_priors, forecast_priors, time_priors
from autoprec.study.measuring import Outcome, outcome_of
from autoprec.study.sampler import FrontSampler
from autoprec.study.seen import Key, key_of, seen, usable

__all__ = ["measure_trials"]

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


def measure_trials(course: Course) -> None:
    """Measure what the sampler proposes, until budget, trials, space or gains end."""
    course.sampler = course.ledger.sample_with(_new_sampler(course))
    with Crew[Key, Outcome](course.workers) as crew:
        _search(course, crew)


def _search(course: Course, crew: Crew[Key, Outcome]) -> None:
    """Keep every worker at a trial; the study is read and written here alone."""
    trials, going, stale, idle, over = course.trials, dict[Key, Trial](), 0, 0, False
    while True:
        course.ledger.refresh()
        known, away = seen(course), _elsewhere(course)
        done = sum(row.trial is not None for row in course.ledger.rows)
        wanted = trials is None or done + len(going) + len(away) < trials
        if crew.free and wanted and not over and course.budget.has_time(course.reserve_seconds):
            if stale >= _STALE or usable(course, (*known, *going, *away)) >= course.size:
                course.news("search", f"the space of {course.size} assignments is seen")
                over = True
                continue
            trial = course.ledger.ask(course.distributions)
            idle = _idle(course, idle)
            assignment = course.space.assignment(trial.params)
            key = key_of(assignment)
            # of two machines that ask at once, the later one sees by now what both are to measure
            course.ledger.refresh()
            known = seen(course)
            if key in known or key in going or _elsewhere(course).get(key, trial.number) < trial.number:
                stale += 1
                course.ledger.repeat(trial, known.get(key) or _twice(assignment))
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
            left = seconds_left(course)
            course.news("search", found.name, left, trial=trial.number, measurement=found)
            over = over or _is_over(course, found, idle)
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


def _idle(course: Course, idle: int) -> int:
    """Count proposals in a row that are expected to gain next to nothing."""
    gain = course.sampler.gain if course.sampler else None
    return idle + 1 if gain is not None and gain < _NO_GAIN else 0


def _is_over(course: Course, found: Measurement, idle: int) -> bool:
    """Say whether a search ends here, because nothing can be measured any more or nothing is left to gain."""
    if course.faults >= _FAULTS:
        course.notes.append(
            f"the search ended early: {course.faults} plans in a row could not be measured, the last because "
            f"{found.reason}. What was measured stands; go on with --resume"
        )
        return True
    bound = course.bound() if course.trials is None and idle >= _IDLE else None
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


def _elsewhere(course: Course) -> dict[Key, int]:
    """Return the assignments that other machines are at, each with the first trial of it."""
    found = dict[Key, int]()
    for number, choices in course.ledger.elsewhere().items():
        if choices.keys() == {d.name for d in course.space.decisions}:  # else its choices are being made
            found.setdefault(key_of(course.space.assignment(choices)), number)
    return found


def _twice(assignment: Mapping[str, Format]) -> Measurement:
    """Return what is told of an assignment that is being measured already."""
    return Measurement(name="twice", assignment=assignment, reason="being measured by another worker")


def _bound_text(bound: Mapping[str, float], limit: DropLimit) -> str:
    return f"as predicted, no plan within {limit} is {bound['faster_percent']:.1f} % faster than the fastest measured"
