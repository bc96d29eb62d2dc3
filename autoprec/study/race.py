"""Whether a plan's drop is within a limit, told from few skewed batches with a look after each.

A drop's logarithm is taken as normal between batches, and the mean's generalized pivotal quantity (Krishnamoorthy and
Mathew 2003) is integrated numerically, so that no random number decides. A t interval stands beside it, and the more
cautious of both counts: one batch far off moves a mean of logarithms too little. Few batches without an outlier cannot
tell that there are none, so how far batches differ is learnt from plans measured before as well (`Spread`).

Looks are paid for by spending the level over them (Lan and DeMets 1983): boundaries of a random walk, found by
recursion and applied to the p-values. `benchmarks/bench_verdict.py` shows what holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from scipy.optimize import brentq

from autoprec.errors import UsageError
from autoprec.quantities import number

__all__ = [
    "FIRST_LOOK",
    "FLOOR",
    "Answer",
    "Bounds",
    "Spread",
    "checked",
    "difference",
    "drop_bounds",
    "evidence",
    "judge",
    "look",
    "look_levels",
]

Array = npt.NDArray[np.float64]

#: batches before the first look: with fewer nothing but the prior would speak
FIRST_LOOK = 4
#: the share of a level spent by the last planned look, and the power of time by which it grows: late looks, where a
#: plan at half the limit is decided, get most (by simulation: exponents of 3 to 5 accept it as often within 0.02)
_PLANNED, _POWER = 0.98, 4.0
#: drops are raised to this share of the limit, so that a zero has a logarithm; it costs a plan 1 % at most
FLOOR = 0.01
#: points of the recursion's grid, and of the integral over the variance with the probability left out on either side
_GRID, _NODES, _OUTSIDE = 400, 64, 1e-12


class Answer(StrEnum):
    """What looks at a plan's drops say of its mean drop and the limit."""

    WITHIN = "within"
    ABOVE = "above"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviation of a drop's logarithm between batches, as known beforehand; `weight` counts as batches seen.

    The default is for when nothing is known: of four recorded models the one with the largest spread (MiniLM, 0.94).
    """

    log_sd: float = 0.94
    weight: float = 6.0

    @classmethod
    def of(cls, earlier: Iterable[Sequence[float]], own: Sequence[float] = ()) -> Spread:
        """Learn it from drops, batch by batch, of plans of the same model measured before on other batches.

        Args:
            earlier: drops of all these plans; their spreads are averaged.
            own: those of the plan in question. The larger spread counts, own or average: a plan that varies more than
                the others is the one that deceives.

        Plans seen on the same batches share much of their noise, so the weight grows with the batches, not the plans:
        half as much again as one plan tells (of recorded drops it is three times or more), and no more than 12, because
        plans differ in spread. Lists that are too short, not finite or all zero are left out; none left: the default.
        """
        used = [log for log in map(_logs, earlier) if log.size > 1]
        variances = (
            [sum(float(np.square(y - y.mean()).sum()) for y in used) / sum(y.size - 1 for y in used)] if used else []
        )
        alone = _logs(own)
        if alone.size > 1:
            variances.append(float(alone.var(ddof=1)))
        if not variances:
            return cls()
        batches = max(y.size for y in (*used, alone))
        # rounding to a format is never the same on all batches: below 1 % a spread would divide by nothing
        return cls(max(math.sqrt(max(variances)), 0.01), min(12.0, 1.5 * (batches - 1)))


def _logs(drops: Sequence[float]) -> Array:
    """Return logarithms of drops, those near zero raised; empty where there are none to be had."""
    found = np.asarray(drops, dtype=float)
    if found.size == 0 or not np.isfinite(found).all() or found.mean() <= 0:
        return np.empty(0)
    logs: Array = np.log(np.maximum(found, FLOOR * found.mean()))
    return logs


@dataclass(frozen=True, slots=True)
class Bounds:
    """Mean drop over batches and a bound on each side, in the drop's own unit; each may fail with `level`."""

    mean: float
    lower: float
    upper: float
    batches: int
    level: float


def drop_bounds(
    drops: Sequence[float],
    *,
    level: float = 0.05,
    weights: Sequence[float] | None = None,
    spread: Spread | None = None,
    planned: int = 16,
    floor: float | None = None,
) -> Bounds | None:
    """Return two one-sided bounds of the mean drop, valid though one looks after every batch; None under 4 batches.

    Args:
        drops: one drop a batch, >= 0 (a negative one is rounding and counts as 0); one not finite makes all infinite.
        level: the probability that the upper bound is ever below the mean, and as much for the lower one above it.
        weights: counted positions of each batch; batches of weight 0 are left out. Default: equal.
        spread: what is known of the spread between batches.
        planned: the batches one means to look at. More may come: a fiftieth of the level is kept for those.
        floor: drops are raised to it, which the lower bound makes up for; default a hundredth of their mean.

    Not promised: bounds for batches that depend on each other, or where one batch in ten holds most of the drop and has
    not come up yet. The level is kept for log-normal drops whose spread is known or overrated, else as simulated: a
    spread learnt from other plans that is half the true one can double it.
    """
    found, weigh = counted(drops, weights)
    count = len(found)
    if not np.isfinite(found).all():
        return Bounds(math.inf, math.inf, math.inf, count, level)
    if count < FIRST_LOOK:
        return None
    mean = float(found @ weigh / weigh.sum())
    floor = FLOOR * mean if floor is None else floor
    if floor <= 0.0:
        return Bounds(mean, 0.0, 0.0, count, level)
    share = look_levels(level, planned, count)[-1]
    known = spread or Spread()

    def excess(log_limit: float, side: int) -> float:
        return float(evidence(found, math.exp(log_limit), known, weigh, floor)[side]) - share

    # e^50 either way is beyond any drop: what is not decided there is no bound
    middle = math.log(max(mean, floor))
    low, high, upper, lower = middle - 50, middle + 50, math.inf, 0.0
    if excess(high, 0) < 0 < excess(low, 0):
        upper = math.exp(brentq(excess, low, high, args=(0,)))
    if excess(low, 1) < 0 < excess(high, 1):
        lower = math.exp(brentq(excess, low, high, args=(1,)))
    return Bounds(mean, min(lower, mean), max(upper, mean), count, level)


def judge(
    drops: Sequence[float],
    limit: float,
    *,
    level: float = 0.05,
    weights: Sequence[float] | None = None,
    spread: Spread | None = None,
    planned: int = 16,
) -> Answer:
    """Return what the first look that decides says, looking after every batch from the 4th on.

    As `drop_bounds`, with the limit's own floor; a drop that is not finite is above every limit.

    Raises:
        UsageError: the limit is not a number above 0.
    """
    found, weigh = counted(drops, weights)
    for count in range(1, len(found) + 1):
        answer = look(found[:count], checked(limit), weigh[:count], spread or Spread(), planned, level, level)
        if answer is not Answer.OPEN:
            return answer
    return Answer.OPEN


def look(
    drops: Array, limit: float, weights: Array, spread: Spread, planned: int, within: float, above: float
) -> Answer:
    """Return what the look after the last of these batches says; `within` and `above` are levels of all looks."""
    count = len(drops)
    if not np.isfinite(drops[-1]):
        return Answer.ABOVE
    if count < FIRST_LOOK:
        return Answer.OPEN
    over, under = evidence(drops, limit, spread, weights)
    if over <= look_levels(within, planned, count)[-1]:
        return Answer.WITHIN
    return Answer.ABOVE if under <= look_levels(above, planned, count)[-1] else Answer.OPEN


def evidence(
    drops: Array, limit: float, spread: Spread, weights: Array | None = None, floor: float | None = None
) -> tuple[Array, Array]:
    """Return p-values of drops [..., N] against a mean of at least, and of at most, the limit; each of shape [...].

    Of one look alone. Weights enter by the number of batches of equal weight that would tell as much (Kish).
    """
    share = np.full(drops.shape[-1], 1 / drops.shape[-1]) if weights is None else weights / weights.sum()
    floor = FLOOR * limit if floor is None else floor
    count = 1 / float(np.square(share).sum())
    logs = np.log(np.maximum(drops, floor))
    log_mean = logs @ share
    squares = count * (np.square(logs - log_mean[..., None]) @ share)
    # the more a plan's batches differ beyond what was known, the less that counts: it was of other plans
    own = np.maximum(squares / (count - 1), 1e-300)
    trust = spread.weight * np.minimum(1.0, spread.log_sd**2 / own)
    freedom = trust + count - 1
    variance, weight = _variances((trust * spread.log_sd**2 + squares) / freedom, freedom)

    def standing(bound: float) -> Array:
        found: Array = (math.log(bound) - log_mean[..., None] - variance / 2) * np.sqrt(count / variance)
        return found

    mean = drops @ share
    error = np.sqrt(np.square(drops - mean[..., None]) @ share / (count - 1)) + 1e-12 * limit
    over = (special.ndtr(-standing(limit)) * weight).sum(axis=-1)
    under = (special.ndtr(standing(limit + floor)) * weight).sum(axis=-1)
    t = special.stdtr(count - 1, (mean - limit) / error)
    return np.maximum(over, t), np.maximum(under, special.stdtr(count - 1, (limit - mean) / error))


def _variances(scale: Array, freedom: Array) -> tuple[Array, Array]:
    """Return nodes [..., K] and weights of what a variance may be: scale × freedom / χ²(freedom)."""
    half = freedom[..., None] / 2
    low, high = np.log(special.gammaincinv(half, _OUTSIDE) / half), np.log(special.gammainccinv(half, _OUTSIDE) / half)
    # even steps of the logarithm, in which the density falls off smoothly on both sides: the plain sum is accurate
    at = low + (high - low) * np.linspace(0.0, 1.0, _NODES)
    density = np.exp(half * (at - np.exp(at) + 1))
    return scale[..., None] * np.exp(-at), density / density.sum(axis=-1, keepdims=True)


@lru_cache(maxsize=4096)
def look_levels(level: float, planned: int, batches: int) -> tuple[float, ...]:
    """Return the level of each look, after 4, 5, ... `batches` batches, such that all looks together have `level`."""
    found: list[float] = []
    spent, values, mass = 0.0, np.zeros(1), np.ones(1)
    for count in range(FIRST_LOOK, batches + 1):
        by_now = level * _spent(count, planned)
        # the walk goes on from where it has not crossed yet
        scale = math.sqrt(FIRST_LOOK if count == FIRST_LOOK else 1)
        far = 40 * math.sqrt(count)
        bound: float = brentq(_crossing, -far, far, args=(values, mass, scale, by_now - spent))
        grid = np.linspace(-8 * math.sqrt(count), bound, _GRID)
        density = np.exp(-np.square((grid[:, None] - values) / scale) / 2) @ mass / (scale * math.sqrt(2 * math.pi))
        mass = density * (grid[1] - grid[0])
        mass[[0, -1]] /= 2
        values, spent = grid, by_now
        found.append(float(special.ndtr(-bound / math.sqrt(count))))
    return tuple(found)


def _crossing(bound: float, values: Array, mass: Array, scale: float, wanted: float) -> float:
    beyond: Array = special.ndtr((values - bound) / scale)
    return float(mass @ beyond) - wanted


def _spent(count: int, planned: int) -> float:
    """Return the share of the level spent by a look; it never reaches 1, however many come."""
    if count <= planned:
        return _PLANNED * math.pow(count / planned, _POWER)
    return _PLANNED + (1 - _PLANNED) * (1 - planned / count)


def difference(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.05, weights: Sequence[float] | None = None
) -> tuple[float, float] | None:
    """Return a t interval of the mean of a - b over batches both have seen; None under 4 batches.

    Two plans are the same where it contains 0. Not promised: validity under repeated looks, or for few batches of which
    one differs by far more than the others (the interval is then too wide rather than too narrow).
    """
    found, weigh = counted([x - y for x, y in zip(a, b, strict=True)], weights)
    if len(found) < FIRST_LOOK:
        return None
    share = weigh / weigh.sum()
    count, mean = 1 / float(np.square(share).sum()), float(found @ share)
    error = math.sqrt(float(np.square(found - mean) @ share) / (count - 1))
    half = float(stats.t.isf(level / 2, count - 1)) * error
    return mean - half, mean + half


def counted(drops: Sequence[float], weights: Sequence[float] | None) -> tuple[Array, Array]:
    """Return the drops and weights of batches that count."""
    found = np.asarray(drops, dtype=float)
    weigh = np.ones(len(found)) if weights is None else np.asarray(weights, dtype=float)
    if len(found) != len(weigh):
        raise UsageError(f"{len(found)} drops have {len(weigh)} weights; give one weight a batch.")
    return found[weigh > 0], weigh[weigh > 0]


def checked(limit: float) -> float:
    if not 0.0 < limit < math.inf:
        raise UsageError(f"a drop cannot be judged by the limit {number(limit)}; give a number above 0.")
    return limit
