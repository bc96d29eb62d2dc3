"""Our rows of format facts against torch, against ml_dtypes, and against the bit patterns themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from autoprec.formats import (
    BF16,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FP16,
    FP32,
    NUMBER_FORMATS,
    TF32,
    Format,
    Fp8Family,
    Fp8Recipe,
    NumberFormat,
    layout,
)

STORED = [f for f in NUMBER_FORMATS.values() if f.torch_name is not None]
NAMES = [f.name for f in STORED]
#: formats whose every code can be looked at
SMALL = [f for f in STORED if f.bits <= 16]

ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


def dtype(row: NumberFormat) -> torch.dtype:
    found = getattr(torch, str(row.torch_name))
    assert isinstance(found, torch.dtype)
    return found


def all_values(row: NumberFormat) -> torch.Tensor:
    """Return the finite values of all codes, sorted, each once, in float64."""
    whole = {8: torch.uint8, 16: torch.int16}[row.bits]
    codes = torch.arange(2**row.bits, dtype=torch.int64).to(whole)
    values = codes.view(dtype(row)).double()
    finite: torch.Tensor = values[torch.isfinite(values)].unique()
    return finite


@pytest.mark.parametrize("row", STORED, ids=NAMES)
def test_facts_agree_with_torch(row: NumberFormat) -> None:
    theirs = torch.finfo(dtype(row))
    assert row.max == theirs.max
    assert -row.max == theirs.min
    assert row.bits == theirs.bits
    assert row.smallest_normal == theirs.smallest_normal
    if row is not E5M2FNUZ:  # torch is wrong there: test_eps_of_e5m2fnuz
        assert row.eps == theirs.eps


@pytest.mark.parametrize("name", ML_DTYPES)
def test_facts_agree_with_ml_dtypes(name: str) -> None:
    row, theirs = NUMBER_FORMATS[name], ml_dtypes.finfo(ML_DTYPES[name])
    assert row.max == float(theirs.max)
    assert row.eps == float(theirs.eps)
    assert row.smallest_normal == float(theirs.smallest_normal)
    assert row.smallest_subnormal == float(theirs.smallest_subnormal)
    assert row.mantissa_bits == theirs.nmant
    assert row.exponent_bits == theirs.nexp


@pytest.mark.parametrize(("row", "kind"), [(FP16, np.float16), (FP32, np.float32)], ids=["fp16", "fp32"])
def test_facts_agree_with_numpy(row: NumberFormat, kind: type[np.floating]) -> None:
    theirs = np.finfo(kind)
    assert row.max == float(theirs.max)
    assert row.eps == float(theirs.eps)
    assert row.smallest_normal == float(theirs.smallest_normal)
    assert row.smallest_subnormal == float(theirs.smallest_subnormal)
    assert (row.mantissa_bits, row.exponent_bits) == (theirs.nmant, theirs.nexp)


@pytest.mark.parametrize("row", SMALL, ids=[f.name for f in SMALL])
def test_facts_agree_with_the_codes(row: NumberFormat) -> None:
    values = all_values(row)
    positive = values[values > 0]
    assert row.max == positive.max()
    assert row.smallest_subnormal == positive.min()
    above_one = positive[positive > 1].min()
    assert row.eps == above_one - 1
    # the first value where the step doubles is twice the smallest normal one: below, the step is constant
    steps = positive.diff()
    first_wide = positive[:-1][steps > row.smallest_subnormal].min()
    assert row.smallest_normal == first_wide / 2


@pytest.mark.parametrize("row", SMALL, ids=[f.name for f in SMALL])
def test_specials_agree_with_the_codes(row: NumberFormat) -> None:
    assert bool(torch.isinf(torch.tensor([float("inf")]).to(dtype(row)).float())) == row.has_inf
    if row.bits == 8:
        codes = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(dtype(row)).float()
        specials = int((~torch.isfinite(codes)).sum())
        # IEEE keeps the top exponent of both signs; E4M3FN one NaN a sign; FNUZ only the code of negative zero
        assert specials == {"e5m2": 8, "e4m3fn": 2, "e4m3fnuz": 1, "e5m2fnuz": 1}[row.name]


def test_eps_of_e5m2fnuz() -> None:
    # torch.finfo says 0.125 for both FNUZ formats. With two fraction bits the step above 1 is a quarter: so say the
    # codes of torch's own dtype, and so says ml_dtypes. torch's table has e4m3fnuz's eps there, and our row is right.
    values = all_values(E5M2FNUZ)
    assert E5M2FNUZ.eps == 0.25
    assert values[values > 1].min() - 1 == 0.25
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e5m2fnuz).eps) == 0.25
    assert torch.finfo(torch.float8_e5m2fnuz).eps == 0.125, "torch has corrected its table: drop the exception above"


def test_spot_values_from_the_standards() -> None:
    # OCP 8-bit Floating Point Specification 1.0, table 2
    assert (E4M3FN.max, E5M2.max) == (448.0, 57344.0)
    assert (E4M3FN.smallest_normal, E5M2.smallest_normal) == (2.0**-6, 2.0**-14)
    assert (E4M3FN.smallest_subnormal, E5M2.smallest_subnormal) == (2.0**-9, 2.0**-16)
    assert (E4M3FNUZ.max, E5M2FNUZ.max) == (240.0, 57344.0)
    # IEEE 754-2019, table 3.5
    assert FP16.max == 65504.0
    assert FP32.bias == 127


def test_tf32_has_the_range_of_fp32_and_the_fraction_of_fp16() -> None:
    assert TF32.smallest_normal == FP32.smallest_normal == BF16.smallest_normal
    assert TF32.eps == FP16.eps
    assert TF32.bits == 19
    assert TF32.torch_name is None


def test_printed_form() -> None:
    assert [str(f) for f in (BF16, E4M3FN)] == ["bf16 1-8-7", "e4m3fn 1-4-3"]


@pytest.mark.parametrize(
    ("choice", "gradient", "family", "recipe", "expected"),
    [
        (Format.FP32, True, Fp8Family.FNUZ, Fp8Recipe.ROWWISE, FP32),
        (Format.BF16, False, Fp8Family.OCP, Fp8Recipe.TENSORWISE, BF16),
        (Format.FP16, True, Fp8Family.OCP, Fp8Recipe.TENSORWISE, FP16),
        (Format.FP8, False, Fp8Family.OCP, Fp8Recipe.TENSORWISE, E4M3FN),
        (Format.FP8, True, Fp8Family.OCP, Fp8Recipe.TENSORWISE, E5M2),
        (Format.FP8, False, Fp8Family.FNUZ, Fp8Recipe.TENSORWISE, E4M3FNUZ),
        (Format.FP8, True, Fp8Family.FNUZ, Fp8Recipe.TENSORWISE, E5M2FNUZ),
        (Format.FP8, True, Fp8Family.OCP, Fp8Recipe.ROWWISE, E4M3FN),
        (Format.FP8, True, Fp8Family.FNUZ, Fp8Recipe.ROWWISE, E4M3FNUZ),
    ],
)
def test_layout(choice: Format, gradient: bool, family: Fp8Family, recipe: Fp8Recipe, expected: NumberFormat) -> None:
    assert layout(choice, gradient=gradient, family=family, recipe=recipe) is expected
