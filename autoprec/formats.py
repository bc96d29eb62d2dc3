"""Number formats as rows of data: what a format is, and nothing about how to compute in it.

A `NumberFormat` is one bit layout (IEEE 754 binary32 and binary16, bfloat16, TF32, and the FP8 layouts of
"OCP 8-bit Floating Point Specification" 1.0 with the FNUZ variants that AMD MI300 uses). A `Format` is what a
unit of a model can be given: FP8 stands for a pair of layouts, E4M3 forward and E5M2 for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "BF16",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FP16",
    "FP32",
    "NUMBER_FORMATS",
    "TF32",
    "Format",
    "Fp8Family",
    "Fp8Recipe",
    "NumberFormat",
    "layout",
]


class Format(StrEnum):
    """The choices of a unit, widest first."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"


class Fp8Recipe(StrEnum):
    """How FP8 scales are chosen."""

    TENSORWISE = "tensorwise"  #: one scale a tensor; E4M3 forward, E5M2 gradients
    ROWWISE = "rowwise"  #: one power-of-two scale a row; E4M3 everywhere


class Fp8Family(StrEnum):
    """Which FP8 layouts a device computes in."""

    OCP = "ocp"  #: e4m3fn and e5m2: NVIDIA from capability 8.9, AMD CDNA4
    FNUZ = "fnuz"  #: e4m3fnuz and e5m2fnuz: AMD MI300


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """One binary floating-point layout: sign, exponent, fraction."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    #: exponent of a stored exponent field e is e - bias
    bias: int
    #: the all-ones exponent field is kept for infinities and NaN
    ieee_specials: bool
    #: largest fraction field usable at the largest usable exponent field
    top_fraction: int
    has_inf: bool
    #: name of the dtype in torch, where storage exists
    torch_name: str | None

    @property
    def bits(self) -> int:
        """Width in bits (TF32 is held in 32 but carries 19)."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        field = (1 << self.exponent_bits) - (2 if self.ieee_specials else 1)
        return float(2.0 ** (field - self.bias) * (1 + self.top_fraction / 2**self.mantissa_bits))

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value."""
        return float(2.0**-self.mantissa_bits)

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero has a sign; where no other code is left, NaN takes that of negative zero."""
        return self.ieee_specials or self.top_fraction < 2**self.mantissa_bits - 1

    def __str__(self) -> str:
        return f"{self.name} 1-{self.exponent_bits}-{self.mantissa_bits}"


def _ieee(name: str, exponent: int, mantissa: int, torch_name: str | None) -> NumberFormat:
    return NumberFormat(
        name=name,
        exponent_bits=exponent,
        mantissa_bits=mantissa,
        bias=2 ** (exponent - 1) - 1,
        ieee_specials=True,
        top_fraction=2**mantissa - 1,
        has_inf=True,
        torch_name=torch_name,
    )


FP32 = _ieee("fp32", 8, 23, "float32")
TF32 = _ieee("tf32", 8, 10, None)
BF16 = _ieee("bf16", 8, 7, "bfloat16")
FP16 = _ieee("fp16", 5, 10, "float16")
E5M2 = _ieee("e5m2", 5, 2, "float8_e5m2")
#: OCP E4M3 gives up infinities and keeps one NaN code a sign, so the top exponent serves finite values up to 448
E4M3FN = NumberFormat(
    name="e4m3fn",
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    ieee_specials=False,
    top_fraction=6,
    has_inf=False,
    torch_name="float8_e4m3fn",
)
#: FNUZ: the code of negative zero is the only NaN, and the bias is one larger, so the range is half of OCP's
E4M3FNUZ = NumberFormat(
    name="e4m3fnuz",
    exponent_bits=4,
    mantissa_bits=3,
    bias=8,
    ieee_specials=False,
    top_fraction=7,
    has_inf=False,
    torch_name="float8_e4m3fnuz",
)
E5M2FNUZ = NumberFormat(
    name="e5m2fnuz",
    exponent_bits=5,
    mantissa_bits=2,
    bias=16,
    ieee_specials=False,
    top_fraction=3,
    has_inf=False,
    torch_name="float8_e5m2fnuz",
)

NUMBER_FORMATS = {f.name: f for f in (FP32, TF32, BF16, FP16, E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ)}

_PLAIN = {Format.FP32: FP32, Format.BF16: BF16, Format.FP16: FP16}


def layout(
    choice: Format,
    *,
    gradient: bool = False,
    family: Fp8Family = Fp8Family.OCP,
    recipe: Fp8Recipe = Fp8Recipe.TENSORWISE,
) -> NumberFormat:
    """Return the bit layout that `choice` uses for values, or for gradients if `gradient`."""
    if choice is not Format.FP8:
        return _PLAIN[choice]
    wide = gradient and recipe is Fp8Recipe.TENSORWISE
    if family is Fp8Family.OCP:
        return E5M2 if wide else E4M3FN
    return E5M2FNUZ if wide else E4M3FNUZ
