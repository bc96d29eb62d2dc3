"""The scales of FP8 tensors, kept for examples that are replayed apart from their batch, or with other batches.

A tensorwise scale goes by the largest magnitude in the batch, so how an example is rounded hangs on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autoprec.formats import Format
from autoprec.probe.sites import Site
from autoprec.runtime.emulate import row_largest
from autoprec.runtime.fp8 import KeptScale
from autoprec.runtime.scope import Fp8Scope

__all__ = ["BatchScales", "batch_scales", "largest_inputs"]

Largest = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BatchScales:
    """Where the examples of a batch come from: how many from each batch as given, and what those were scaled by.

    `largest` is by leaf, for each example here: its own largest input, and that of its batch as given.
    """

    parts: tuple[int, ...] = ()
    largest: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, leaf: str) -> KeptScale | None:
        """Return what a leaf scales by; None for what goes into it."""
        if leaf in self.largest:
            return KeptScale(self.parts, *self.largest[leaf])
        return KeptScale(self.parts) if len(self.parts) > 1 else None


@contextmanager
def largest_inputs(sites: Sequence[Site], modules: Mapping[str, nn.Module], rows: int) -> Iterator[dict[str, Tensor]]:
    """Note by example the largest magnitude [rows] that goes into each leaf with one scale, while the block runs.

    Leaves that run more than once, or whose input does not have the examples as its first dimension, are left out.
    """
    found: dict[str, Tensor] = {}
    mixed: set[str] = set()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if given is None or name in found or len(given) != rows or given.dim() < 2:
            mixed.add(name)
        else:
            found[name] = row_largest(given.detach())

    swaps = [swap for site in sites for swap in site.swaps.get(Format.FP8, ()) if swap.kind is Fp8Scope]
    leaves = {swap.module: modules[swap.module] for swap in swaps}
    handles = [m.register_forward_pre_hook(partial(note, n), with_kwargs=True) for n, m in leaves.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name in mixed:
            found.pop(name, None)


def batch_scales(
    found: Sequence[Largest], given: Sequence[int], examples: npt.NDArray[np.intp], rows: Sequence[int]
) -> list[BatchScales]:
    """Return the scales of batches that were put together from some examples of others.

    Args:
        found: what `largest_inputs` noted of each batch, in the order of the examples; empty: nothing.
        given: examples of each batch as given.
        examples: number among all of each example taken, in their order.
        rows: examples of each batch put together.
    """
    origins = np.repeat(np.arange(len(given)), given)[examples].tolist()
    scales = [BatchScales(tuple(np.unique(part, return_counts=True)[1].tolist())) for part in _split(origins, rows)]
    taken = torch.from_numpy(examples)
    largest: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in rows]
    for name in set.intersection(*(set(part) for part in found)) if found else ():
        own = torch.cat([part[name] for part in found])
        batch = torch.cat([part.max().expand(len(part)) for part in own.split(list(given))])
        pairs = zip(own[taken].split(list(rows)), batch[taken].split(list(rows)), strict=True)
        for index, pair in enumerate(pairs):
            largest[index][name] = pair
    return [BatchScales(s.parts, known) for s, known in zip(scales, largest, strict=True)]


def _split(values: Sequence[int], rows: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for count in rows:
        yield values[start : start + count]
        start += count
