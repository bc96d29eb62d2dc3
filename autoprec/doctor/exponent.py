"""How large values are, as a histogram of their exponents: enough to say at any loss scale what FP16 would do to
them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprec.formats import FP16

__all__ = ["Sizes", "suggested_scale"]

_BIAS = 127
#: room left above the largest gradient seen, as in the sensitivity probe: other batches have larger ones
_HEADROOM = 8.0
_LARGEST_SCALE = 2.0**24
#: values of a tensor that are looked at; shares need no more, and the largest value is of all
_VALUES = 1 << 18


@dataclass(slots=True, eq=False)
class Sizes:
    """Non-zero finite |values| by FP32 exponent field, and the largest; infinite where one was not finite."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    largest: float = 0.0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        flat = tensor.detach().float().reshape(-1)
        if not flat.numel():
            return
        low, high = torch.aminmax(flat)
        top = float(torch.maximum(-low, high))
        self.largest = max(self.largest, top if math.isfinite(top) else math.inf)
        step = max(1, flat.numel() // _VALUES)
        fields = (flat[::step].contiguous().view(torch.int32) >> 23) & 0xFF
        self.counts += torch.bincount(fields, minlength=256).cpu()

    def join(self, other: Sizes) -> None:
        """Add another's counts."""
        self.counts += other.counts
        self.largest = max(self.largest, other.largest)

    def under(self, limit: float, scale: float = 1.0) -> float | None:
        """Return the share of non-zero values that are under a power of two once multiplied by `scale`."""
        total = int(self.counts[1:255].sum())
        if total == 0:
            return None
        last = min(255, max(1, round(math.log2(limit / scale)) + _BIAS))
        return float(self.counts[1:last].sum()) / total

    def flushed(self, scale: float = 1.0) -> float | None:
        """Return the share that FP16 rounds to zero: under half of its smallest value."""
        return self.under(FP16.smallest_subnormal / 2, scale)

    def subnormal(self, scale: float = 1.0) -> float | None:
        """Return the share under FP16's smallest normal value, which lose bits or all."""
        return self.under(FP16.smallest_normal, scale)


def suggested_scale(largest: float) -> float | None:
    """Return a power of two that keeps the largest gradient below FP16's maximum, with room; None for no gradient."""
    if not 0 < largest < math.inf:
        return None
    return min(max(2.0 ** math.floor(math.log2(FP16.max / (_HEADROOM * largest))), 1.0), _LARGEST_SCALE)
