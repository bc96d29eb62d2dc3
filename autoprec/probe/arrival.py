"""What of the times that units take one by one arrives in a step: both are evidence, weighed by how sure each is.

A unit timed by itself finds its operands where a step would not (other caches, other neighbours); a whole step says
nothing about one unit. A step's time over the reference's is taken as 1 + around + Σ effect · share, normal errors
everywhere, so what is known after some whole steps is a linear regression with a prior (Rasmussen and Williams,
Gaussian Processes for Machine Learning, 2006, section 2.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprec.formats import Format
from autoprec.records import Arrival, Estimate

__all__ = ["Part", "Run", "arrival"]

Array = npt.NDArray[np.float64]
Part = tuple[str, Format]

#: standard deviations before any whole step: of what an ambient format adds to a step (small models pay most for
#: entering it); of an effect, as a share of itself and of the unit's time (alone and in steps they were seen to differ
#: by up to half: docs/log.md)
_AROUND, _OF_EFFECT, _OF_TIME = 0.1, 0.3, 0.05
#: of a step's time over its neighbour's, on the quietest machine
_QUIET = 0.003
#: what makes a median absolute deviation a standard deviation, and a median noisier than a mean (normal errors)
_MAD, _MEDIAN = 1.4826, 1.2533


@dataclass(frozen=True, slots=True)
class Run:
    """Steps of one assignment: each one's time over that of the reference's steps of its round.

    `shares` are the FP32 times of its units in low formats as shares of the reference's step, by part.
    """

    shares: Mapping[Part, float]
    ratios: Sequence[float]


def arrival(alone: Mapping[Part, Estimate], runs: Sequence[Run]) -> Arrival:
    """Return what parts add to a step, from what they were seen to add alone and from whole steps.

    Args:
        alone: by part, its time over FP32's, less 1.
        runs: all units in FP32 inside the ambient format among them, which tells `around`.
    """
    parts = list(alone)
    doubts = [_doubt(alone[part]) for part in parts]
    mean = np.array([0.0, *(alone[part].value for part in parts)])
    spread = np.diag(np.square([_AROUND, *doubts]))
    rows = np.array([[1.0, *(run.shares.get(part, 0.0) for part in parts)] for run in runs])
    seen = np.array([statistics.median(run.ratios) - 1 for run in runs])
    if len(runs):
        gain = spread @ rows.T @ np.linalg.inv(rows @ spread @ rows.T + _noise(runs))
        mean = mean + gain @ (seen - rows @ mean)
        spread = spread - gain @ rows @ spread
        spread = (spread + spread.T) / 2
    return Arrival(
        shapes=tuple(shape for shape, _ in parts),
        formats=tuple(choice for _, choice in parts),
        mean=tuple(mean.tolist()),
        covariance=tuple(tuple(row) for row in spread.tolist()),
    )


def _doubt(own: Estimate) -> float:
    return float(np.hypot.reduce([(own.high - own.low) / 3.92, _OF_EFFECT * own.value, _OF_TIME]))


def _noise(runs: Sequence[Run]) -> Array:
    """Return the covariance of the medians of ratios, from how ratios of one assignment differ.

    A round's ratios share its reference, two steps for each one of an assignment: a third of a ratio's variance is
    common to all.
    """
    off = [
        abs(ratio - statistics.median(run.ratios)) * (len(run.ratios) / (len(run.ratios) - 1)) ** 0.5
        for run in runs
        for ratio in run.ratios
        if len(run.ratios) > 1
    ]
    one = max(_QUIET, _MAD * statistics.median(off)) if off else _OF_TIME
    own = one * _MEDIAN / np.sqrt([len(run.ratios) for run in runs])
    covariance: Array = np.outer(own, own) / 3
    covariance[np.diag_indices(len(runs))] = np.square(own)
    return covariance
