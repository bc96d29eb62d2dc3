"""Plans tried one after another on unseen batches until one is shown to be within the limit; errors are shared out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autoprec.errors import UsageError
from autoprec.quantities import number
from autoprec.study.race import FIRST_LOOK, FLOOR, Answer, Bounds, Spread, checked, drop_bounds, look

__all__ = ["Candidate", "Confirmation", "Try", "Unmeasurable", "attempts", "confirm", "spending"]

#: what all confirmations together may wrongly accept, and the first one's part of it; the rest is halved on
_TOTAL, _FIRST = 0.05, 0.7


def spending(k: int) -> float:
    """Return the level of the k-th confirmation tried: 3.5 %, then 0.75 %, halved from one to the next.

    A plan over the limit is chosen only if its own bounds are wrong, so the probability of that is no more than the
    sum of all levels, 5 %, however many are tried and whatever noise they share. Beginning with 5 % and halving would
    add up to 10 %. The first gets more than half because it is the plan one wants, the fastest: 3.5 % is what accepts
    one at half the limit 9 times in 10 within 16 batches, where drops vary by 70 %.
    """
    return _TOTAL * _FIRST if k == 0 else _TOTAL * (1 - _FIRST) * math.ldexp(1.0, -k)


class Unmeasurable(Exception):
    """A candidate's drop on a batch cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to confirm: `drop` measures it on batch 0, 1, ...; `spread` is best learnt with its own earlier drops.

    `also` is asked once the drop is within the limit: why the plan is not to be chosen all the same, or None.
    """

    name: str
    drop: Callable[[int], float]
    spread: Spread = Spread()
    also: Callable[[], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """One plan's confirmation: what it came to, on how many batches and at which level, and why where it failed."""

    name: str
    answer: Answer
    bounds: Bounds | None
    batches: int
    level: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Confirmation:
    """All plans tried, in order; the last one is `accepted` unless that is None."""

    tries: tuple[Try, ...]

    @property
    def accepted(self) -> Try | None:
        last = self.tries[-1] if self.tries else None
        return last if last is not None and last.answer is Answer.WITHIN else None


def confirm(
    candidates: Iterable[Candidate], limit: float, batches: int, *, weights: Sequence[float] | None = None
) -> Confirmation:
    """Return what came of `attempts`, all of them at once."""
    return Confirmation(tuple(attempts(candidates, limit, batches, weights=weights)))


def attempts(
    candidates: Iterable[Candidate],
    limit: float,
    batches: int,
    *,
    weights: Sequence[float] | None = None,
    unit: str = "nats",
) -> Iterator[Try]:
    """Try plans in order, on batches that neither probe nor search has used, until one is shown to be within the limit.

    Each try is handed out as it ends, so that none is lost where a later one breaks off.

    Args:
        candidates: the one wanted most first. Each is measured batch by batch, in order, and no more once the answer
            is had; later ones are not touched.
        limit: of the mean drop, in the drop's unit.
        batches: how many there are.
        weights: counted positions of all `batches`, which are to be known beforehand; default: equal.
        unit: of drops, for what is said of them.

    Raises:
        UsageError: the limit is not a number above 0.
    """
    weigh = [1.0] * batches if weights is None else weights
    if len(weigh) != batches:
        raise UsageError(f"{batches} batches have {len(weigh)} weights; give one weight a batch.")
    for k, candidate in enumerate(candidates):
        found = _try(candidate, checked(limit), spending(k), weigh, unit)
        yield found
        if found.answer is Answer.WITHIN:
            return


def _try(candidate: Candidate, limit: float, level: float, weights: Sequence[float], unit: str) -> Try:
    name, spread, planned = candidate.name, candidate.spread, sum(w > 0 for w in weights)
    drops, weigh, answer = np.empty(0), np.empty(0), Answer.OPEN
    for batch, weight in enumerate(weights):
        if weight <= 0:
            continue
        try:
            drops, weigh = np.append(drops, candidate.drop(batch)), np.append(weigh, weight)
        except Unmeasurable as error:
            return Try(name, Answer.ABOVE, None, len(drops), level, f"on unseen batch {batch}: {error}")
        if not np.isfinite(drops[-1]):
            return Try(name, Answer.ABOVE, None, len(drops), level, f"its drop on batch {batch} is not finite")
        # giving up too early loses one plan, so 5 % will do there whatever is left for accepting
        answer = look(drops, limit, weigh, spread, planned, level, _TOTAL)
        if answer is not Answer.OPEN:
            break
    bounds = drop_bounds(
        drops.tolist(), level=level, weights=weigh.tolist(), spread=spread, planned=planned, floor=FLOOR * limit
    )
    if answer is Answer.WITHIN and candidate.also is not None and (reason := candidate.also()):
        return Try(name, Answer.ABOVE, bounds, len(drops), level, reason)
    return Try(name, answer, bounds, len(drops), level, _reason(answer, bounds, limit, len(drops), unit))


def _reason(answer: Answer, bounds: Bounds | None, limit: float, batches: int, unit: str) -> str | None:
    if answer is Answer.WITHIN:
        return None
    if bounds is None:
        return f"{batches} batches are too few to tell; give at least {FIRST_LOOK}"
    if answer is Answer.ABOVE:
        mean = f"{number(bounds.mean)} {unit} on {batches} batches"
        return f"its mean drop, {mean}, is above the limit of {number(limit)} {unit}"
    upper = f"{number(bounds.upper)} {unit}"
    return f"{batches} batches do not tell: its drop may be up to {upper}, the limit is {number(limit)} {unit}"
