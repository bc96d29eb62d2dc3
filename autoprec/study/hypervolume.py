"""The area that a front dominates, and what a point is expected to add to it; smaller is better on both axes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from autoprec.study.chain import unbeaten

__all__ = ["expected_gain", "front_of", "hypervolume"]

Array = npt.NDArray[np.float64]


def front_of(points: Array) -> Array:
    """Return the points [N, 2] that no other beats, the first axis rising; of equal ones, one."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    ordered = points[order]
    return ordered[unbeaten(ordered.T)] if len(ordered) else ordered


def hypervolume(points: Array, corner: Array) -> float:
    """Return the area between points [N, 2] and a corner that they beat; points beyond it count nothing."""
    front = front_of(points[(points < corner).all(axis=1)])
    if not len(front):
        return 0.0
    widths = np.diff(np.append(front[:, 0], corner[0]))
    return float((widths * (corner[1] - front[:, 1])).sum())


def expected_gain(mean: Array, deviation: Array, points: Array, corner: Array) -> Array:
    """Return for each of N candidates how much area it is expected to add to that of `points`.

    Each axis of a candidate is normal, `mean` and `deviation` [N, 2], independent of the other. In the strip between
    two neighbours of the front a candidate adds the part of the strip's width behind it times the height below the
    left neighbour, and the expectations of both are closed (Emmerich et al. 2006).
    """
    front = front_of(points[(points < corner).all(axis=1)])
    edges = np.concatenate([front[:, 0], corner[:1]])
    tops = np.concatenate([corner[1:], front[:, 1]])
    reach = _beyond(edges[None, :], mean[:, :1], deviation[:, :1])
    widths = np.diff(reach, axis=1, prepend=0.0)
    heights = _beyond(tops[None, :], mean[:, 1:], deviation[:, 1:])
    gain: Array = (widths * heights).sum(axis=1)
    return gain


def _beyond(edge: Array, mean: Array, deviation: Array) -> Array:
    """Return E max(edge − Y, 0) of normal Y."""
    scale = np.maximum(deviation, 1e-12)
    z = (edge - mean) / scale
    found: Array = scale * (z * stats.norm.cdf(z) + stats.norm.pdf(z))
    return found
