"""Whether steps timed in pairs show one side to be faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["SAME", "Pace", "Speed", "pace"]

Array = npt.NDArray[np.float64]

#: pairs of steps for a pace at all and for one by ranks, blocks of fewer, and the level of each side of its interval
#: (half of 1 %: "faster" is to be wrong at most once in a hundred, on machines whose noise is not quite independent)
_PAIRS, _RANKS, _BLOCKS, _PACE_LEVEL = 8, 20, 10, 0.005
#: two step times whose ratio is within this count as the same: shared machines are noisy
SAME = 1.02


class Speed(StrEnum):
    """A plan's step time beside the reference's; `same` means within 2 %, or not told apart by the pairs there are."""

    FASTER = "faster"
    SAME = "same"
    SLOWER = "slower"


@dataclass(frozen=True, slots=True)
class Pace:
    """Reference time / plan time, with its 99 % interval (None under 8 pairs) and what to call it."""

    ratio: float
    interval: tuple[float, float] | None
    answer: Speed
    pairs: int


def pace(reference_s: Sequence[float], plan_s: Sequence[float]) -> Pace:
    """Tell a plan's pace from seconds of steps timed in pairs, the order alternating from pair to pair.

    From 20 pairs on: the median of the pairs' ratios, its interval by ranks, because single steps of a shared machine
    can take ten times as long. What neighbours share makes pairs count for less, as told by signs around the median.
    Fewer pairs have no ranks to spare for that: two in a row, one of each order, are averaged as logarithms, and the
    interval is t over up to ten blocks of these.

    Not promised: more than one look. A ratio under 2 % is `same` however narrow its interval.
    """
    logs = np.log(np.asarray(reference_s, dtype=float)) - np.log(np.asarray(plan_s, dtype=float))
    if len(logs) < _PAIRS:
        return Pace(math.exp(float(np.median(logs))), None, Speed.SAME, len(logs))
    low, middle, high = (math.exp(x) for x in (_by_ranks(logs) if len(logs) >= _RANKS else _by_blocks(logs)))
    answer = Speed.SAME
    if low > 1.0 and middle > SAME:
        answer = Speed.FASTER
    elif high < 1.0 and middle < 1 / SAME:
        answer = Speed.SLOWER
    return Pace(middle, (low, high), answer, len(logs))


def _by_ranks(logs: Array) -> tuple[float, float, float]:
    """Return the median and the ends of its interval, by ranks of as many independent pairs as would tell as much."""
    ordered, middle = np.sort(logs), float(np.median(logs))
    signs = np.sign(logs - middle)
    shared = max(0.0, float((signs[1:] * signs[:-1]).mean()))
    count = int(len(logs) / (1 + 2 * shared))
    rank = int(len(logs) * int(stats.binom.ppf(_PACE_LEVEL, count, 0.5)) / count)
    if rank < 1:  # pairs so much alike that hardly any is left
        return -math.inf, middle, math.inf
    return float(ordered[rank - 1]), middle, float(ordered[-rank])


def _by_blocks(logs: Array) -> tuple[float, float, float]:
    """Return the mean of block medians and the ends of its t interval."""
    doubles = logs[len(logs) % 2 :].reshape(-1, 2).mean(axis=1)
    blocks = np.array([np.median(part) for part in np.array_split(doubles, min(_BLOCKS, len(doubles)))])
    middle, count = float(blocks.mean()), len(blocks)
    half = float(stats.t.isf(_PACE_LEVEL, count - 1)) * float(blocks.std(ddof=1)) / math.sqrt(count)
    return middle - half, middle, middle + half
