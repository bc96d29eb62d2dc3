"""How far the largest weights of a unit stand out, read from the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from autoprec.records import ModelProfile

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["weight_outliers"]


def weight_outliers(model: nn.Module, profile: ModelProfile) -> dict[str, float]:
    """Return by unit the largest |weight| of a matrix over the root mean square of that matrix, the most of any.

    Left out are units without a matrix, and those with one that tells nothing: on the meta device, packed, sharded,
    stored in 8 bits or fewer, or all zero. Every weight is read twice.
    """
    found = {}
    for unit in profile.units:
        shares = [_outlier(weight) for name in unit.modules for weight in _matrices(model, name)]
        known = [share for share in shares if share is not None]
        if known and len(known) == len(shares):
            found[unit.name] = max(known)
    return found


def _matrices(model: nn.Module, name: str) -> Iterator[Tensor]:
    module = model.get_submodule(name)
    yield from (p.detach() for p in module.parameters(recurse=False) if p.dim() >= 2)


def _outlier(weight: Tensor) -> float | None:
    """Return the largest |weight| over the root mean square; None where there are no numbers to look at."""
    import torch
    from torch.linalg import vector_norm

    plain = type(weight) is torch.Tensor and not weight.is_meta  # packed and sharded weights are subclasses
    if not plain or not weight.dtype.is_floating_point or weight.element_size() < 2:
        return None
    largest = vector_norm(weight, float("inf"), dtype=torch.float32)
    square = vector_norm(weight, dtype=torch.float32)
    share = float(largest * weight.numel() ** 0.5 / square)
    return share if 0 < share < float("inf") else None
