"""What of a space was measured: assignments by a key that compares and counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from autoprec.formats import Format
from autoprec.records import Measurement
from autoprec.study.course import Course

__all__ = ["Key", "key_of", "seen", "usable"]

#: units with their formats, sorted
Key: TypeAlias = tuple[tuple[str, str], ...]


def key_of(assignment: Mapping[str, Format]) -> Key:
    """Return what two equal assignments share."""
    return tuple(sorted((name, str(choice)) for name, choice in assignment.items()))


def seen(course: Course) -> dict[Key, Measurement]:
    """Return what was measured of the space: trials, and the baselines that stand for one."""
    inside = {b.name for b in course.plans.baselines if course.standing_for(b.plan) is not None}
    return {
        key_of(row.measurement.assignment): row.measurement
        for row in course.ledger.rows
        if (row.trial is not None and not row.gone) or row.measurement.name in inside
    }


def usable(course: Course, keys: Iterable[Key]) -> int:
    """Count the assignments that heed the vetoes, as those that `course.size` counts."""
    vetoes = {(veto.unit, str(veto.format)) for veto in course.vetoes}
    return sum(vetoes.isdisjoint(key) for key in set(keys))
