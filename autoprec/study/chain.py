"""Least drop for every time, over all assignments of formats to a chain of units, by dynamic programming.

A multiple-choice knapsack whose neighbours pay for casts between them. Units are taken one after the other; of all
partial assignments that end in the same format only those are kept that no other beats in time and drop (and memory,
where that is an axis). One pass gives the whole front. Units that must share a format although others stand between
them (`tied`) are carried in the state until the last of them is passed.

Where more than `max_states` partial assignments remain, each stretch of them keeps the one nearest the hull, and
`exact` is false. Then the Lagrangian relaxation (for each price of drop the best assignment, by the same recursion)
fills in the convex hull of the front, and still bounds from below what any assignment can reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from autoprec.errors import StudyError
from autoprec.formats import Format

__all__ = ["Border", "Chain", "ChainUnit", "Choice", "Hull", "distinct", "unbeaten"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Picks = TypeVar("Picks", Indices, npt.NDArray[np.int8])
#: a cost wherever two neighbours differ; or for each pair of neighbours a cost by formats (the earlier's, the later's)
Border = float | Sequence[Mapping[tuple[Format, Format], float]]
#: a state between two units: the format of the last, and those of ties that are still open
_Key = tuple[Format | None, tuple[tuple[str, Format], ...]]

#: partial assignments handled in all, which is about a second of work
_WORK = 3_000_000
_FEWEST_STATES = 64
#: states that tied units may multiply to
_MOST_KEYS = 4096
#: prices of drop for which the relaxation is solved at first, and rounds of further ones
_PRICES, _ROUNDS = 64, 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What a unit costs in one format: drop (nats), time and, where memory is an axis, bytes."""

    format: Format
    drop: float
    time_ms: float
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class ChainUnit:
    """A unit of the chain with what it may choose from; units of one `tied` label take the same format.

    A fixed unit has one choice.
    """

    name: str
    choices: tuple[Choice, ...]
    tied: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Hull:
    """The relaxation of a chain: for `prices` of drop the least of time + price × drop, and assignments [P, units].

    `least_drop` is the least that any assignment has.
    """

    prices: Array
    values: Array
    least_drop: float
    corners: npt.NDArray[np.intp]

    def least_ms(self, drop: float) -> float:
        """Return a time that no assignment of at most this drop can beat."""
        return float(np.max(self.values - self.prices * drop)) if drop >= self.least_drop else math.inf


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """The ways into the states of one unit: [keys, ways] indices of the state before (-1: none) and of the choice.

    `cost` is time, drop and bytes of each way [3, keys, ways].
    """

    before: Indices
    choice: Indices
    cost: Array


class Chain:
    """A chain as steps between numbered states; a state is the last unit's format and those of open ties."""

    def __init__(self, units: tuple[ChainUnit, ...], border_ms: Border) -> None:
        if not isinstance(border_ms, int | float) and len(border_ms) != len(units) - 1:
            raise StudyError(f"{len(units)} units have {len(units) - 1} borders; {len(border_ms)} were given")
        self.units, self.border = units, border_ms
        self.last = {u.tied: i for i, u in enumerate(units) if u.tied is not None}
        self.steps: list[_Step] = []
        keys: list[_Key] = [(None, ())]
        for index in range(len(units)):
            step, keys = self._step(index, keys)
            self.steps.append(step)
        self._tables = [np.array([[c.drop, c.time_ms, c.bytes] for c in unit.choices]) for unit in units]
        self._casts = [self._cast_table(index) for index in range(1, len(units))] if self.border else []

    def _cast_table(self, index: int) -> Array:
        """Return what a cast before a unit costs, by the choices of both its sides."""
        before, unit = self.units[index - 1], self.units[index]
        return np.array([[self._border(index, a.format, b.format) for b in unit.choices] for a in before.choices])

    def _step(self, index: int, before: list[_Key]) -> tuple[_Step, list[_Key]]:
        unit = self.units[index]
        ways: dict[_Key, list[tuple[int, int, float]]] = {}
        for row, (previous, ties) in enumerate(before):
            for k, choice in enumerate(unit.choices):
                after = dict(ties)
                if unit.tied is not None:
                    if after.setdefault(unit.tied, choice.format) is not choice.format:
                        continue
                    if self.last[unit.tied] == index:
                        del after[unit.tied]
                key = (choice.format, tuple(sorted(after.items())))
                ways.setdefault(key, []).append((row, k, self._border(index, previous, choice.format)))
        if not ways:
            raise StudyError(f"the units tied as '{unit.tied}' have no format in common; '{unit.name}' is the last")
        if len(ways) > _MOST_KEYS:
            raise StudyError(f"more than {_MOST_KEYS} combinations of tied units are open at unit '{unit.name}'")
        shape = len(ways), max(map(len, ways.values()))
        rows, picks, added = np.full(shape, -1), np.zeros(shape, dtype=np.intp), np.zeros(shape)
        for row, found in enumerate(ways.values()):
            rows[row, : len(found)], picks[row, : len(found)], added[row, : len(found)] = zip(*found, strict=True)
        cost = np.array([[c.time_ms, c.drop, c.bytes] for c in unit.choices]).T[:, picks]
        cost[0] += added
        return _Step(rows, picks, cost), list(ways)

    def _border(self, index: int, before: Format | None, after: Format) -> float:
        if before is None or before is after:
            return 0.0
        if isinstance(self.border, int | float):
            return float(self.border)
        return float(self.border[index - 1].get((before, after), 0.0))

    def cost(self, picks: npt.NDArray[np.intp]) -> tuple[Array, Array, Array]:
        """Return drop, time and bytes of whole assignments [P, units], summed in one order for all of them."""
        columns = np.ascontiguousarray(picks.T)
        total = np.zeros((len(picks), 3))
        for table, own in zip(self._tables, columns, strict=True):
            total += table[own]
        for casts, before, own in zip(self._casts, columns, columns[1:], strict=False):
            total[:, 1] += casts[before, own]
        drop, time_ms, size = total.T
        return drop, time_ms, size

    def states(self, memory: bool, max_states: int | None) -> tuple[npt.NDArray[np.intp], bool]:
        """Return the assignments [P, units] that remain, and whether none was left out for lack of room."""
        limit, exact = max_states or self._room(), True
        axes = 3 if memory else 2
        table = np.zeros((axes, 1, 1))  # time, drop (and bytes) of [states, partial assignments], infinite where none
        starts, trail = np.zeros(1, dtype=np.intp), []  # where a state's partial assignments begin, of all that remain
        for step in self.steps:
            width = table.shape[2]
            padded = np.concatenate([table, np.full((axes, 1, width), np.inf)], axis=1)  # row -1: no way in
            grown = (padded[:, step.before] + step.cost[:axes, ..., None]).reshape(axes, len(step.before), -1)
            # by time, of equal ones the least drop first: units of one shape have equal times, and one of them will do
            order = np.lexsort((grown[1], grown[0]), axis=1)
            grown = grown[:, np.arange(len(order))[:, None], order]
            keep = _staircase(grown[:2]) if not memory else np.stack([unbeaten(grown[:, k]) for k in range(len(order))])
            keep &= np.isfinite(grown[0])
            counts = keep.sum(axis=1)
            if counts.max() > limit:
                keep, exact = _thinned(grown[0], grown[1], keep, limit), False
                counts = np.minimum(counts, limit)
            row, place = np.nonzero(keep)
            way, column = np.divmod(order[row, place], width)
            trail.append((starts[step.before[row, way]] + column, step.choice[row, way]))
            starts = np.cumsum(counts) - counts
            table = np.full((axes, len(counts), counts.max()), np.inf)
            table[:, row, np.arange(len(row)) - starts[row]] = grown[:, row, place]
        return _traced(trail, np.arange(len(row))), exact

    def _room(self) -> int:
        work = sum(step.before.size for step in self.steps)
        return max(_FEWEST_STATES, _WORK // work)

    def relaxed(self) -> Hull:
        """Solve the relaxation for some prices.

        Between two assignments next to each other on the hull the price at which both cost the same finds what lies
        below the line through them, so prices gather where the hull has corners.
        """
        least, corners = self._cheapest(np.ones(1), time_weight=0.0)
        prices, seen, values = self._first_prices(), np.empty(0), np.empty(0)
        for _ in range(_ROUNDS):
            value, picks = self._cheapest(prices)
            values, seen = np.concatenate([values, value]), np.concatenate([seen, prices])
            corners = distinct(np.concatenate([corners, picks]))
            drop, time_ms, _ = self.cost(corners)
            order = np.lexsort((drop, time_ms))
            order = order[unbeaten(np.stack([time_ms, drop])[:, order])]
            if len(order) < 2:
                break
            prices = np.setdiff1d(-np.diff(time_ms[order]) / np.diff(drop[order]), seen)
        return Hull(seen, values, float(least[0]), corners)

    def _cheapest(self, prices: Array, time_weight: float = 1.0) -> tuple[Array, npt.NDArray[np.intp]]:
        """Return for each price the least of time_weight × time + price × drop, and an assignment that has it."""
        count, trail = len(prices), []
        column = np.arange(count)
        value = np.zeros((1, count))
        for step in self.steps:
            padded = np.concatenate([value, np.full((1, count), np.inf)])
            total = padded[step.before] + (time_weight * step.cost[0, ..., None] + step.cost[1, ..., None] * prices)
            way, row = total.argmin(axis=1), np.arange(len(total))[:, None]
            value = total[row, way, column]
            trail.append((step.before[row, way] * count + column, step.choice[row, way]))
        best = np.argmin(value, axis=0)
        return value.min(axis=0), _traced(trail, best * count + column)

    def _first_prices(self) -> Array:
        """Return prices from 'drop costs nothing' to 'drop is all that counts', evenly on a log scale."""
        gains = [
            (abs(a.time_ms - b.time_ms) + 1e-12) / abs(a.drop - b.drop)
            for u in self.units
            for a in u.choices
            for b in u.choices
            if a.drop > b.drop
        ]
        if not gains:
            return np.zeros(1)
        low, high = np.log(max(min(gains), 1e-300)) - 1, np.log(max(gains)) + 1
        return np.concatenate([[0.0], np.exp(np.linspace(low, high, _PRICES))])


def distinct(picks: Picks) -> Picks:
    """Return rows [P, units], each once, in the order of their bytes (np.unique by axis takes 30 times as long)."""
    whole = np.ascontiguousarray(picks, dtype=np.int8).view(f"V{picks.shape[1]}").ravel()
    return picks[np.unique(whole, return_index=True)[1]]


def _staircase(table: Array) -> npt.NDArray[np.bool_]:
    """Return which of [time, drop] × states × items, rising in time, have less drop than all before them."""
    drop = table[1]
    before = np.minimum.accumulate(drop, axis=1)
    keep = np.ones(drop.shape, dtype=bool)
    keep[:, 1:] = drop[:, 1:] < before[:, :-1]
    return keep


def unbeaten(table: Array) -> npt.NDArray[np.bool_]:
    """Return which of the points [axes, N], sorted by the first axis, no other beats; of equal ones the first stays."""
    if table.shape[0] == 2:
        return _staircase(table[:, None]).ravel()
    keep = np.zeros(table.shape[1], dtype=bool)
    front = np.empty((table.shape[0] - 1, 0))
    for start in range(0, table.shape[1], 512):
        block = table[1:, start : start + 512]
        alive: npt.NDArray[np.bool_] = ~np.any(np.all(front[:, None, :] <= block[:, :, None], axis=0), axis=1)
        inside = np.all(block[:, None, :] <= block[:, :, None], axis=0)
        earlier = np.tril(np.ones(inside.shape, dtype=bool), -1)
        alive &= ~np.any(inside & earlier, axis=1)
        keep[start : start + 512] = alive
        front = np.concatenate([front, block[:, alive]], axis=1)
    return keep


def _thinned(time_ms: Array, drop: Array, keep: npt.NDArray[np.bool_], limit: int) -> npt.NDArray[np.bool_]:
    """Return `keep` with at most `limit` of a row left, one for each stretch of the row's stair.

    Of a stretch that one stays which reaches furthest below the line between its ends, and so nearest the hull.
    """
    items = np.flatnonzero(keep)
    t, d = time_ms.ravel()[items], drop.ravel()[items]
    counts = keep.sum(axis=1)
    starts = np.cumsum(counts) - counts
    most = np.minimum(counts, limit)
    first = np.concatenate([s + np.arange(m) * n // m for s, n, m in zip(starts, counts, most, strict=True) if m])
    widths = np.diff(first, append=len(items))
    last = first + widths - 1
    slope = np.repeat((d[first] - d[last]) / np.maximum(t[last] - t[first], 1e-300), widths)
    excess = d + slope * t
    chosen = np.flatnonzero(excess == np.repeat(np.minimum.reduceat(excess, first), widths))
    thin = np.zeros(keep.size, dtype=bool)
    thin[items[chosen[np.searchsorted(chosen, first)]]] = True
    return thin.reshape(keep.shape)


def _traced(trail: Sequence[tuple[Indices, Indices]], ends: Indices) -> npt.NDArray[np.intp]:
    """Return the choices [P, units] that led to flat places in the last step's table."""
    picks = np.empty((len(ends), len(trail)), dtype=np.intp)
    at = ends
    for index in range(len(trail) - 1, -1, -1):
        parent, choice = trail[index]
        picks[:, index] = choice.ravel()[at]
        at = parent.ravel()[at]
    return picks
