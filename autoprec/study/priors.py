"""What is known of each unit's drop and time before any trial, as beliefs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autoprec.errors import StudyError, closest
from autoprec.formats import Format, layout
from autoprec.records import Estimate, Origin, SensitivityProfile
from autoprec.study.belief import Belief
from autoprec.study.chain import ChainUnit, Choice

__all__ = ["Names", "Prior", "drop_belief", "time_belief"]

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.int8]
Prior: TypeAlias = SensitivityProfile | Mapping[str, Mapping[str, float | Estimate]] | None

#: of a drop given as a bare value: standard deviation of its logarithm (replay is within 1.25 times for half of units)
_BARE = 0.35
#: of a drop of which nothing is known: that of units of one format, and that of the format as a whole (drops of units
#: of a model span two orders of magnitude in docs/sensitivity.md, models differ by more)
_UNKNOWN, _UNKNOWN_FORMAT = 1.5, 3.0
#: error of the logarithms of all drops of a format together
_TOGETHER = 0.15
#: factors by which priors may be too sure of themselves, and what a sum of drops has beside its parts (SmolLM2: within
#: 17 % for random sets)
_WIDTHS, _NOISES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.02, 0.05, 0.1, 0.2)
#: of a time given as a bare value; and of times a format saves, all together
_BARE_TIME, _TOGETHER_TIME = 0.1, 0.1
#: of times, what sums have beside their parts, as a share of the step
_TIME_NOISES = (1e-4, 1e-3, 5e-3, 2e-2)


@dataclass(frozen=True, eq=False)
class Names:
    """Units and their formats in one order; a part is a pair of both, flat [P]; `costly` are parts that add anything.

    FP32 is what others are counted from: it drops nothing, and its time is in the constant. Of a unit without it, every
    format adds to the constant. `free` are the indices of the formats that a unit may be given.
    """

    formats: Mapping[str, tuple[Format, ...]]
    free: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, units: Mapping[str, Sequence[str]], barred: Mapping[str, Collection[str]]) -> Names:
        """Check and take over the units, and of some the formats that they are not to be given.

        Raises:
            StudyError: no units, a unit without formats or with one twice, all of its formats barred, a bar of a unit
                or format that is not there, or an unknown format.
        """
        if not units:
            raise StudyError("a sampler needs units to choose formats for; none were given")
        found: dict[str, tuple[Format, ...]] = {}
        for name, formats in units.items():
            try:
                own = tuple(Format(f) for f in formats)
            except ValueError as error:
                raise StudyError(f"unit '{name}': {error}. Choose from {', '.join(Format)}.") from None
            if not own or len(set(own)) < len(own):
                raise StudyError(f"unit '{name}' takes {list(map(str, formats))}; give each unit one or more formats")
            found[name] = own
        if strange := [name for name in barred if name not in found]:
            raise StudyError(f"barred names unit '{strange[0]}', which is not there{closest(strange[0], found)}")
        for name, bars in barred.items():
            if unknown := [f for f in bars if f not in found[name]]:
                raise StudyError(f"barred names {unknown[0]} of unit '{name}', which takes {', '.join(found[name])}")
        free = {n: tuple(k for k, f in enumerate(fs) if f not in barred.get(n, ())) for n, fs in found.items()}
        if nothing := [name for name, left in free.items() if not left]:
            raise StudyError(f"all formats of unit '{nothing[0]}' are barred; leave it one")
        return cls(found, free)

    @cached_property
    def parts(self) -> list[tuple[str, Format]]:
        """All pairs of unit and format."""
        return [(name, f) for name, formats in self.formats.items() for f in formats]

    @cached_property
    def costly(self) -> npt.NDArray[np.bool_]:
        """Which parts are not FP32 [P]; it drops nothing, and times are counted from it."""
        return np.array([f is not Format.FP32 for _, f in self.parts])

    @cached_property
    def _starts(self) -> npt.NDArray[np.intp]:
        return np.cumsum([0, *(len(f) for f in self.formats.values())])[:-1]

    def few(self) -> list[str]:
        """Return some names, for a message."""
        names = list(self.formats)
        return names if len(names) < 4 else [*names[:3], "…"]

    def picks(self, params: Mapping[str, Any]) -> bytes | None:
        """Return the index of each unit's format, a byte each; None where a unit lacks one of its own."""
        try:
            return bytes(formats.index(params[name]) for name, formats in self.formats.items())
        except (KeyError, ValueError):
            return None

    def hot(self, picks: Picks) -> Array:
        """Return picks [N, units] as rows of 0 and 1 [N, P]."""
        rows = np.zeros((len(picks), len(self.parts)))
        np.put_along_axis(rows, self._starts + picks.astype(np.intp), 1.0, axis=1)
        return rows

    def chain(self, log_drops: Array, times: Array) -> list[ChainUnit]:
        """Return the units with what they may choose from, by drops and times of the costly parts.

        Times are made not negative.
        """
        drop, time = np.zeros(len(self.parts)), np.zeros(len(self.parts))
        drop[self.costly], time[self.costly] = np.exp(log_drops), times
        units, at = [], 0
        for name, formats in self.formats.items():
            own = [at + k for k in self.free[name]]
            at += len(formats)
            least = float(time[own].min())
            chosen = (formats[k] for k in self.free[name])
            choices = zip(chosen, drop[own].tolist(), (time[own] - least).tolist(), strict=True)
            units.append(ChainUnit(name, tuple(Choice(f, d, t) for f, d, t in choices)))
        return units

    def of_chain(self, picks: Picks) -> Picks:
        """Return picks [N, units] among what may be chosen as picks among all formats."""
        table = np.zeros((len(self.free), max(map(len, self.free.values()))), dtype=np.int8)
        for row, free in zip(table, self.free.values(), strict=True):
            row[: len(free)] = free
        found: Picks = table[np.arange(len(table)), picks]
        return found


def drop_belief(names: Names, prior: Prior, floor: float) -> Belief:
    """Return the belief about the logarithms of drops, of parts that are not FP32."""
    parts = [part for part, costly in zip(names.parts, names.costly, strict=True) if costly]
    means, spreads = np.empty(len(parts)), np.empty(len(parts))
    table = _table(names, prior, "drop")
    for index, (unit, choice) in enumerate(parts):
        given = table.get(unit, {}).get(choice)
        if given is None:
            # a drop goes with the square of the rounding error; by which factor, the spread leaves open
            means[index] = 2 * math.log(_unit_roundoff(choice))
            spreads[index] = _UNKNOWN
        else:
            means[index] = math.log(max(given.value, floor * 1e-3))
            spreads[index] = _log_spread(given, floor)
    known = np.array([choice in table.get(unit, {}) for unit, choice in parts])
    shared = _by_format(parts) * np.where(known, _TOGETHER, _UNKNOWN_FORMAT)[:, None]
    return Belief(means, spreads, shared, floor, _WIDTHS, _NOISES)


def time_belief(names: Names, prior: Prior, scale: float) -> Belief:
    """Return the belief about a constant and what parts that are not FP32 add to it; `scale` is a usual step's time."""
    parts = [part for part, costly in zip(names.parts, names.costly, strict=True) if costly]
    table = _table(names, prior, "time")
    means, spreads, known = np.zeros(len(parts)), np.empty(len(parts)), np.zeros(len(parts), dtype=bool)
    usual = scale / len(names.formats)
    widest = {u: table.get(u, {}).get(Format.FP32) for u, formats in names.formats.items() if Format.FP32 in formats}
    base = sum(w.value for w in widest.values() if w is not None)
    for index, (unit, choice) in enumerate(parts):
        given, wide = table.get(unit, {}).get(choice), widest.get(unit)
        known[index] = given is not None and (wide is not None or unit not in widest)
        if given is not None and known[index]:
            means[index] = given.value - (wide.value if wide else 0.0)
            reach = max(given.high - given.low, 0.0) / 3.92
            spreads[index] = max(reach, _BARE_TIME * abs(means[index]), 1e-3 * usual)
        else:
            spreads[index] = usual / 2
    shared = _by_format(parts) * np.where(known, _TOGETHER_TIME * np.abs(means), usual / 2)[:, None]
    constant = np.zeros((1, shared.shape[1]))
    return Belief(
        np.concatenate([[base or scale], means]),
        np.concatenate([[10 * max(scale, base)], spreads]),
        np.concatenate([constant, shared]),
        None,
        (1.0, 4.0),
        [n * scale for n in _TIME_NOISES],
    )


def _table(names: Names, prior: Prior, what: str) -> dict[str, dict[Format, Estimate]]:
    """Return a prior as estimates by unit and format.

    Raises:
        StudyError: a unit or format that is not there, or a value that is none.
    """
    found: dict[str, dict[Format, Estimate]] = {}
    if prior is None:
        return found
    if isinstance(prior, SensitivityProfile):
        for row in prior.drops:
            if row.format in names.formats.get(row.unit, ()):
                found.setdefault(row.unit, {})[row.format] = row.drop
        return found
    for unit, values in prior.items():
        if unit not in names.formats:
            raise StudyError(f"the {what} prior names unit '{unit}', which is not there{closest(unit, names.formats)}")
        for choice, value in values.items():
            own = (
                value
                if isinstance(value, Estimate)
                else Estimate(float(value), float(value), float(value), Origin.PREDICTED)
            )
            if not (math.isfinite(own.value) and own.value >= 0):
                raise StudyError(f"the {what} prior of unit '{unit}' in {choice} is {own.value}; it is 0 or more")
            found.setdefault(unit, {})[Format(choice)] = own
    return found


def _log_spread(given: Estimate, floor: float) -> float:
    """Return the standard deviation of log drop that an interval stands for."""
    if not given.high > given.low:
        return _BARE
    return max((math.log(given.high + floor) - math.log(max(given.low, 0.0) + floor)) / 3.92, 0.02)


def _by_format(parts: Sequence[tuple[str, Format]]) -> Array:
    kinds = list(dict.fromkeys(f for _, f in parts))
    return np.array([[float(f is kind) for kind in kinds] for _, f in parts]).reshape(len(parts), len(kinds))


def _unit_roundoff(choice: Format) -> float:
    return 2.0 ** -(layout(choice).mantissa_bits + 1)
