"""How far the largest weights of a unit stand out, read from the weights themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoprec.records import ModelProfile
from autoprec.runtime.identity import canonical_modules

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["weight_outliers"]


def weight_outliers(model: nn.Module, profile: ModelProfile) -> dict[str, float]:
    """Return by unit the largest |weight| of a matrix over the root mean square of that matrix, the most of any.

    Left out are units without a matrix that is not all zero, and those with one that tells nothing: on the meta device,
    packed, sharded, or stored in 8 bits or fewer. Every weight is read twice.
    """
    modules, found = canonical_modules(model), {}
    for unit in profile.units:
        own = [p.detach() for name in unit.modules for p in modules[name].parameters(recurse=False) if p.dim() >= 2]
        shares = [_outlier(weight) for weight in own]
        known = [share for share in shares if share is not None]
        if len(known) == len(shares) and max(known, default=0.0) > 0:
            found[unit.name] = max(known)
    return found


def _outlier(weight: Tensor) -> float | None:
    """Return the largest |weight| over the root mean square, 0 where all are zero; None where there are no numbers."""
    import torch
    from torch.linalg import vector_norm

    plain = type(weight) is torch.Tensor and not weight.is_meta  # packed and sharded weights are subclasses
    if not plain or not weight.dtype.is_floating_point or weight.element_size() < 2:
        return None
    largest = vector_norm(weight, float("inf"), dtype=torch.float32)
    square = vector_norm(weight, dtype=torch.float32)
    share = float(largest * weight.numel() ** 0.5 / square) if square > 0 else 0.0
    return share if share < float("inf") else None  # nor where one is not finite
