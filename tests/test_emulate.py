"""Rounding against an independent party (ml_dtypes) and against torch's own casts, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from autoprec.formats import BF16, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FP16, TF32, Fp8Family, Fp8Recipe, NumberFormat
from autoprec.runtime.emulate import fp8_quantize, round_to, torch_dtype
from autoprec.runtime.fp8 import fp8_emulated_matmul

INDEPENDENT: dict[str, type] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
FP8 = [E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ]


def every_code_16(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit dtype, as FP32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()


def neighbours(layout: NumberFormat) -> torch.Tensor:
    """Values just beside every midpoint between two codes of an 8-bit layout, where rounding decides."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(layout)).float()
    finite = codes[codes.isfinite()].sort().values.unique()
    middle = (finite[1:] + finite[:-1]) / 2
    up, down = torch.full_like(middle, torch.inf), torch.full_like(middle, -torch.inf)
    return torch.cat([middle, torch.nextafter(middle, up), torch.nextafter(middle, down), finite])


def independent(values: torch.Tensor, layout: NumberFormat) -> npt.NDArray[np.float32]:
    clamped = values.clamp(-layout.max, layout.max) if layout.bits == 8 else values
    with np.errstate(over="ignore", invalid="ignore"):
        return clamped.numpy().astype(INDEPENDENT[layout.name]).astype(np.float32)


def assert_same_bits(ours: torch.Tensor, theirs: npt.NDArray[np.float32]) -> None:
    """Equal bit for bit, signs of zero included; any NaN equals any NaN."""
    mine = ours.numpy()
    wrong = ~((mine.view(np.int32) == theirs.view(np.int32)) | (np.isnan(mine) & np.isnan(theirs)))
    assert not wrong.any(), f"{wrong.sum()} differ, first {mine[wrong][:3]} against {theirs[wrong][:3]}"


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [BF16, FP16, *FP8], ids=lambda f: f.name)
def test_every_16_bit_value_rounds_as_the_independent_party_does(layout: NumberFormat, source: torch.dtype) -> None:
    values = every_code_16(source)
    assert_same_bits(round_to(values, layout), independent(values, layout))


@pytest.mark.parametrize("layout", FP8, ids=lambda f: f.name)
def test_every_fp8_code_and_every_midpoint(layout: NumberFormat) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(layout)).float()
    finite = codes[codes.isfinite()]
    assert torch.equal(round_to(finite, layout), finite)
    assert_same_bits(round_to(neighbours(layout), layout), independent(neighbours(layout), layout))


@pytest.mark.parametrize("layout", FP8, ids=lambda f: f.name)
def test_fp8_saturates_and_keeps_nan(layout: NumberFormat) -> None:
    values = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    rounded = round_to(values, layout)
    assert rounded[:4].tolist() == [layout.max, -layout.max, layout.max, -layout.max]
    assert rounded[4].isnan()


def test_tf32_keeps_ten_fraction_bits_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * torch.exp2(torch.randint(-100, 100, (100_000,)).float())
    rounded = round_to(values, TF32)
    mantissa, exponent = torch.frexp(values.double())
    # the same in FP64 arithmetic: torch.round goes to even
    expected = torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)
    assert torch.equal(rounded.double(), expected)
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, torch.inf, -torch.inf])
    assert round_to(ties, TF32).tolist() == [1.0, 1 + 2**-9, torch.inf, -torch.inf]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("reduce_dim", [None, 0, 1])
def test_fp8_scale_uses_the_whole_range(reduce_dim: int | None, power_of_two: bool) -> None:
    values = torch.randn(32, 48) * 1e-3
    rounded, scale = fp8_quantize(values, E4M3FN, reduce_dim=reduce_dim, power_of_two=power_of_two)
    top = rounded.abs().amax() if reduce_dim is None else rounded.abs().amax(dim=reduce_dim)
    # a power-of-two scale may leave up to one binade unused; otherwise the largest value lands on the maximum
    assert (top >= (224 if power_of_two else 448)).all()
    # half a step of E4M3 is 2**-4 relative for normal values
    normal = (values * scale).abs() >= E4M3FN.smallest_normal
    assert ((rounded / scale - values).abs() <= values.abs() * 2**-4)[normal].all()


def test_zero_tensor_has_a_finite_scale() -> None:
    rounded, scale = fp8_quantize(torch.zeros(4, 4), E4M3FN)
    assert scale.isfinite() and not rounded.any()


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_emulated_matmul_agrees_with_torchao(recipe: Fp8Recipe) -> None:
    """torchao's own CPU path is the independent party: forward and both gradients."""
    torchao_float8 = pytest.importorskip("torchao.float8")
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 96, bias=False).to(torch.bfloat16)
    reference = torch.nn.Linear(64, 96, bias=False).to(torch.bfloat16)
    reference.load_state_dict(linear.state_dict())
    config = torchao_float8.Float8LinearConfig.from_recipe_name(recipe.value)
    holder = torchao_float8.convert_to_float8_training(torch.nn.Sequential(reference), config=config)
    x = torch.randn(3, 16, 64, dtype=torch.bfloat16)
    grad = torch.randn(3, 16, 96, dtype=torch.bfloat16) * 1e-3
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fp8_emulated_matmul(mine, linear.weight.t(), recipe)
    y_ref = holder(theirs)
    y.backward(grad)
    y_ref.backward(grad)
    assert mine.grad is not None and theirs.grad is not None
    assert linear.weight.grad is not None and reference.weight.grad is not None
    for ours, other in ((y, y_ref), (mine.grad, theirs.grad), (linear.weight.grad, reference.weight.grad)):
        # same products; sums in another order may round the bf16 result to the neighbour: one bf16 step is 2**-7
        a, b = ours.detach().float(), other.detach().float()
        gap = (a - b).abs() / b.abs().clamp(min=1e-2 * float(b.abs().max()))
        assert float(gap.max()) <= 2**-7, f"largest relative gap {float(gap.max()):.2e}"
        assert float((gap > 0).float().mean()) < 0.05


def test_fnuz_and_ocp_differ() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 32), torch.randn(32, 16)
    ocp = fp8_emulated_matmul(x, weight, Fp8Recipe.TENSORWISE, Fp8Family.OCP)
    fnuz = fp8_emulated_matmul(x, weight, Fp8Recipe.TENSORWISE, Fp8Family.FNUZ)
    assert not torch.equal(ocp, fnuz)
    # both are FP8 products of the same operands: their relative gap is within two E4M3 roundings of each factor
    assert float((ocp - fnuz).norm() / ocp.norm()) < 4 * 2**-4
