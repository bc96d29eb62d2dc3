"""Rounding to a number format, bit-exact, on any device.

Values are rounded to nearest, ties to even, as every cast in PyTorch does. Where torch stores the format the
cast itself is used; TF32 has no dtype and is rounded on the bits of FP32. FP8 saturates: what is larger than
the format's maximum becomes the maximum, as training kernels do (older torch casts gave NaN there).

Scales follow torchao 0.18: the largest finite value over the largest magnitude, divided in FP64 so that eager
and compiled code agree, held in FP32. What is not modelled: the order of accumulation, split-K in reduced
precision, the inside of attention kernels, and Hopper's limited accumulation of FP8 products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprec.formats import TF32, NumberFormat

__all__ = ["fp8_quantize", "round_to", "row_largest", "torch_dtype"]

#: below this magnitude a tensor counts as zero for its scale (torchao 0.18, float8_utils.EPS)
_AMAX_FLOOR = 1e-12


def torch_dtype(layout: NumberFormat) -> torch.dtype:
    """Return the dtype that stores `layout`; TF32 is stored as FP32."""
    dtype = getattr(torch, layout.torch_name or "float32")
    assert isinstance(dtype, torch.dtype)
    return dtype


def round_to(values: Tensor, layout: NumberFormat) -> Tensor:
    """Return `values` rounded to `layout`, in their own dtype and shape.

    NaN stays NaN. Infinities stay in formats that have them; FP8 layouts saturate at their maximum (also E5M2,
    as torchao does). The result is exact if the dtype of `values` can hold it, which FP32 always can.
    """
    if layout is TF32:
        return _round_tf32(values)
    if layout.bits == 8:
        clamped = values.clamp(-layout.max, layout.max)
        if values.dtype is torch.float32:
            rounded = _round_in_place(clamped, layout)
            return rounded.copysign_(values) if layout.has_negative_zero else rounded
        values = clamped
    return values.to(torch_dtype(layout)).to(values.dtype)


def _round_in_place(values: Tensor, layout: NumberFormat) -> Tensor:
    """Round FP32 values within the layout's range by adding and taking away 1.5 · 2^k, which drops the right bits.

    k makes the last place of the sum that of the layout at the value's exponent, or at its smallest normal one. Equal
    to the cast bit for bit, and three times as fast on a CPU, where torch converts FP8 one value at a time.
    """
    exponent = values.view(torch.int32) & 0x7F800000
    exponent.clamp_(min=(128 - layout.bias) << 23).add_((23 - layout.mantissa_bits) << 23)
    shift = exponent.view(torch.float32).mul_(1.5)
    return values.add_(shift).sub_(shift)


def _round_tf32(values: Tensor) -> Tensor:
    """Round FP32 bits to 10 fraction bits: add half of the 13 dropped bits (and the last kept one for ties), cut."""
    bits = values.float().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(values.isfinite(), rounded.view(torch.float32), values.float()).to(values.dtype)


def fp8_quantize(
    values: Tensor,
    layout: NumberFormat,
    *,
    reduce_dim: int | None = None,
    power_of_two: bool = False,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and round `values` to an FP8 layout.

    Args:
        values: any floating dtype; computed in FP32.
        reduce_dim: dimension of the coming matmul's sum, for one scale a row; None for one scale a tensor.
        power_of_two: round the scale down to a power of two, so that scaling itself loses nothing.
        amax: the largest magnitudes to scale by, of a shape that broadcasts; None: those of the values.

    Returns:
        the rounded scaled values in FP32, and the scale in FP32: values ≈ rounded / scale.
    """
    wide = values.float()
    if amax is None:
        amax = _largest(wide) if reduce_dim is None else wide.abs().amax(dim=reduce_dim, keepdim=True)
    scale = (layout.max / amax.double().clamp(min=_AMAX_FLOOR)).float()
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return round_to(wide * scale, layout), scale


def row_largest(values: Tensor) -> Tensor:
    """Return the largest magnitude of each row of values [rows, ...]; NaN where there is one."""
    # 10 to 25 times as fast as `vector_norm` of infinite order on a CPU with AVX2 (torch 2.13, one thread)
    return values.reshape(len(values), -1).abs().amax(dim=1)


def _largest(values: Tensor) -> Tensor:
    """Return the largest magnitude, NaN where there is one, without a copy of the values."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings in sympy

        # an expert's share of tokens is unknown while a graph is traced, and may be none when it runs
        if not statically_known_true(values.numel() > 0):
            return torch.cat((values.abs().flatten(), values.new_zeros(1))).amax()
    if values.numel() == 0:
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)
