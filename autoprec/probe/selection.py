"""Which examples to replay where each has a single output and there is no time for all: those the drop depends on.

A confident classifier loses next to nothing on most examples, so the drop of a whole set hangs on a few. Examples are
drawn with a probability that goes with the curvature of the drop at their output, tr F = Σ p (1 − p), and count by its
inverse (Horvitz and Thompson 1952), so that every estimate stays unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autoprec.probe.batches import Batch, picked
from autoprec.probe.directions import curvature
from autoprec.probe.readout import Readout, ReadoutKind

__all__ = ["Selection", "has_one_output", "select", "thinned"]

Array = npt.NDArray[np.float64]

#: of the chance to be drawn, what goes to all alike: an example without curvature may still move
_EVEN = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Batches of the examples drawn, and for each of them what its examples stand for (one over their chance).

    `examples` numbers those drawn among all that they were drawn from.
    """

    batches: tuple[Batch, ...]
    stands_for: tuple[Array, ...]
    examples: npt.NDArray[np.intp]


def has_one_output(read: Readout) -> bool:
    """Say whether an example has one distribution as its output, and all examples count."""
    alone = read.kind is not ReadoutKind.VALUES and read.predictions.shape[1] == 1
    return alone and bool(read.counted.all())


def select(batches: Sequence[Batch], reads: Sequence[Readout], count: int, seed: int) -> Selection:
    """Draw `count` examples, each batch's in its order; batches of which none is drawn are left out."""
    bends = [curvature(read).sum(dim=1).double().cpu().numpy() for read in reads]
    chances = np.split(_chances(np.concatenate(bends), count), np.cumsum([len(b) for b in bends])[:-1])
    return _drawn(batches, [np.ones(len(bend)) for bend in bends], chances, seed)


def thinned(batches: Sequence[Batch], stands_for: Sequence[Array], count: int, seed: int) -> Selection:
    """Draw `count` of the examples, all with one chance; those left stand for the others, too."""
    chance = min(count / sum(map(len, stands_for)), 1.0)
    return _drawn(batches, stands_for, [np.full(len(s), chance) for s in stands_for], seed)


def _drawn(batches: Sequence[Batch], stands_for: Sequence[Array], chances: Sequence[Array], seed: int) -> Selection:
    """Draw systematically: an example is drawn where the running sum of chances passes the next whole number."""
    generator = np.random.default_rng(seed)
    found: list[tuple[Any, Array]] = []
    kept: list[npt.NDArray[np.bool_]] = []
    start = float(generator.random())
    for batch, stands, chance in zip(batches, stands_for, chances, strict=True):
        reached = start + np.cumsum(chance)
        drawn = np.floor(reached + 1e-9) > np.floor(np.concatenate([[start], reached[:-1]]) + 1e-9)
        start = float(reached[-1])
        if drawn.any():
            found.append((picked(batch, torch.from_numpy(np.flatnonzero(drawn))), stands[drawn] / chance[drawn]))
        kept.append(drawn)
    return Selection(tuple(b for b, _ in found), tuple(s for _, s in found), np.flatnonzero(np.concatenate(kept)))


def _chances(bends: Array, count: int) -> Array:
    """Return chances in proportion to the curvature, none above 1, that sum up to `count`."""
    share = (1 - _EVEN) * bends / max(bends.sum(), 1e-300) + _EVEN / len(bends)
    chance: Array = np.zeros_like(share)
    sure = np.zeros(len(share), dtype=bool)
    while True:
        chance[~sure] = (count - sure.sum()) * share[~sure] / max(share[~sure].sum(), 1e-300)
        chance[sure] = 1.0
        over = chance > 1.0
        if not over.any():
            return chance
        sure |= over
