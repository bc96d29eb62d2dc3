"""How long a search goes on, as far as it can be told: with nothing left to gain it ends before."""

from __future__ import annotations

import sys

from autoprec.study.course import Course
from autoprec.study.finalists import training_ahead
from autoprec.study.seen import seen, usable

__all__ = ["closing_seconds", "seconds_left"]


def seconds_left(course: Course, baselines: int = 0) -> float:
    """Return how long a search goes on with all that comes after its trials; `baselines`: so many come before them."""
    done = sum(row.trial is not None for row in course.ledger.rows)
    asked = sys.maxsize if course.trials is None else max(0, course.trials - done)
    trials = min(course.size - usable(course, seen(course)), asked) / max(1, len(course.workers))
    return min(course.budget.left, (baselines + trials) * course.budget.each_seconds + closing_seconds(course))


def closing_seconds(course: Course) -> float:
    """Return what a confirmation takes, with the training that may follow."""
    return min(course.budget.left, course.confirm_seconds + training_ahead(course))
