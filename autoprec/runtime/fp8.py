"""FP8 matmuls of a linear leaf: real ones through torchao, emulated ones with the same rounding and none of the speed.

Forward `y = x·w`: x and w in E4M3, the sum in FP32, y rounded to the output dtype. Backward: the incoming
gradient in E5M2 (recipe `tensorwise`) or E4M3 (`rowwise`), both products rounded to the dtype of their gradient.
`tensorwise` has one scale a tensor; `rowwise` one power-of-two scale for each row of each operand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from autoprec.formats import Format, Fp8Family, Fp8Recipe, NumberFormat, layout
from autoprec.runtime.emulate import fp8_quantize, row_largest

__all__ = ["KeptScale", "fp8_emulated_matmul", "fp8_grouped_matmul", "fp8_matmul", "fp8_missing"]

#: tensor cores take FP8 operands in groups of 16 bytes
_ALIGNMENT = 16


def fp8_missing(device: torch.device) -> str | None:
    """Return why FP8 matmuls cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 matmul in PyTorch"
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        if not arch.startswith(("gfx942", "gfx95", "gfx12")):
            return f"FP8 needs gfx942 or newer; this is {arch}"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = torch.cuda.get_device_name(device)
        return f"FP8 needs compute capability 8.9 or newer; this is an {name} ({have})"
    if find_spec("torchao") is None:
        return "torchao is not installed; pip install 'autoprec[fp8]'"
    return None


def fp8_misaligned(inputs: int, outputs: int) -> str | None:
    """Return why a leaf of these feature counts has no FP8 kernel, or None if it has."""
    if inputs % _ALIGNMENT or outputs % _ALIGNMENT:
        return f"FP8 kernels need multiples of {_ALIGNMENT}, and this leaf is {inputs}x{outputs}"
    return None


@functools.lru_cache(maxsize=4)
def _torchao(recipe: Fp8Recipe) -> tuple[Any, Any, Any]:
    """Return torchao's matmul function with its two configurations for `recipe`."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = Float8LinearConfig.from_recipe_name(recipe.value)
    products = [
        ScaledMMConfig(config.emulate, gemm.use_fast_accum, False, config.pad_inner_dim)
        for gemm in (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    ]
    return matmul_with_hp_or_float8_args, LinearMMConfig(*products), config


def fp8_matmul(x: Tensor, weight_io: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Return `x @ weight_io` in FP8 on the device's FP8 units.

    Args:
        x: [..., in], in the dtype the result shall have.
        weight_io: [in, out] (an `nn.Linear`'s weight transposed).
    """
    function, products, config = _torchao(recipe)
    # a function's own result may be changed in place, a view that it made may not: so shapes are changed outside
    result: Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight_io, products, config)
    return result.reshape(*x.shape[:-1], -1)


class _EmulatedMatmul(torch.autograd.Function):
    """FP8's rounding in FP32 arithmetic of x [n, in]; call with autocast off."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_io: Tensor, recipe: Fp8Recipe, family: Fp8Family, amax: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_io)
        ctx.recipe, ctx.family = recipe, family
        values = layout(Format.FP8, family=family, recipe=recipe)
        return _product(x, weight_io, values, values, recipe, amax).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight_io = ctx.saved_tensors
        recipe, family = ctx.recipe, ctx.family
        values = layout(Format.FP8, family=family, recipe=recipe)
        gradients = layout(Format.FP8, gradient=True, family=family, recipe=recipe)
        (grad,) = grads
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight_io.t(), gradients, values, recipe).to(x.dtype)
        if ctx.needs_input_grad[1]:
            # rounded to the dtype of the layer's result first, as the kernel's output is, then held as the weight is
            grad_w = _product(x.t(), grad, values, gradients, recipe).to(grad.dtype).to(weight_io.dtype)
        return grad_x, grad_w, None, None, None


def _product(
    a: Tensor, b: Tensor, of_a: NumberFormat, of_b: NumberFormat, recipe: Fp8Recipe, amax: Tensor | None = None
) -> Tensor:
    """Return a[m, k] @ b[k, n], both rounded to FP8, summed in FP32 and unscaled; `amax` as in `fp8_quantize`."""
    rows = recipe is Fp8Recipe.ROWWISE
    a8, a_scale = fp8_quantize(a, of_a, reduce_dim=1 if rows else None, power_of_two=rows, amax=amax)
    b8, b_scale = fp8_quantize(b, of_b, reduce_dim=0 if rows else None, power_of_two=rows)
    return (a8 @ b8) / (a_scale * b_scale)


@dataclass(frozen=True, slots=True, eq=False)
class KeptScale:
    """What rows are scaled by that are not together with all those, or only those, of their batch.

    `parts`: rows from each batch, in their order. Where rows are missing: `largest` magnitudes [rows] as they went in,
    and those `of_batch` that each row was in.
    """

    parts: tuple[int, ...]
    largest: Tensor | None = None
    of_batch: Tensor | None = None

    def amax(self, x: Tensor) -> Tensor | None:
        """Return the largest magnitude that each row of x [rows, ...] is scaled by; None: that of x.

        Inside a unit x is not what went in without FP8, and its largest values are not known of rows that are missing.
        """
        if sum(self.parts) != len(x):
            return None
        largest = row_largest(x)
        if self.largest is not None and self.of_batch is not None and torch.equal(largest, self.largest.to(x.dtype)):
            return self.of_batch.to(x.dtype)
        return torch.cat([part.max().expand(len(part)) for part in largest.split(self.parts)])


def fp8_emulated_matmul(
    x: Tensor,
    weight_io: Tensor,
    recipe: Fp8Recipe,
    family: Fp8Family = Fp8Family.OCP,
    kept: KeptScale | None = None,
) -> Tensor:
    """Return `x @ weight_io` with FP8's rounding forward and backward, in FP32 arithmetic.

    Shapes as in `fp8_matmul`; `kept` is for one scale a tensor, forward. Its speed says nothing about FP8.
    """
    amax = kept.amax(x) if kept is not None and recipe is Fp8Recipe.TENSORWISE else None
    flat = x.reshape(-1, x.shape[-1])
    if amax is not None:
        amax = amax.repeat_interleave(len(flat) // len(x))[:, None]
    result: Tensor = _EmulatedMatmul.apply(flat, weight_io, recipe, family, amax)  # type: ignore[no-untyped-call]
    return result.reshape(*x.shape[:-1], -1)


def fp8_grouped_matmul(
    x: Tensor, weight: Tensor, ends: Tensor, recipe: Fp8Recipe, family: Fp8Family = Fp8Family.OCP, *, emulate: bool
) -> Tensor:
    """Return for each group of rows its product in FP8 with a matrix of its own, each operand with its own scale.

    Args:
        x: [rows, in], sorted by group, in the dtype the result shall have.
        weight: [groups, in, out].
        ends: [groups], the row at which each group ends; rows behind the last give zeros.
    """
    if torch.compiler.is_compiling():
        result: Tensor = _grouped(x, weight, ends, recipe.value, family.value, emulate)
        return result
    parts = [_one(x[rows], w, recipe.value, family.value, emulate) for rows, w, _ in _groups(x, weight, ends)]
    left = len(x) - sum(map(len, parts))
    return torch.cat([*parts, x.new_zeros(left, weight.shape[2])])


def _groups(x: Tensor, weight: Tensor, ends: Tensor) -> Iterator[tuple[slice, Tensor, int]]:
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end > start:
            yield slice(start, end), weight[index], index
        start = end


def _one(x: Tensor, weight_io: Tensor, recipe: str, family: str, emulate: bool) -> Tensor:
    """Return one product as a single node of autograd's graph."""
    result: Tensor
    if emulate:
        result = _EmulatedMatmul.apply(x, weight_io, Fp8Recipe(recipe), Fp8Family(family))  # type: ignore[no-untyped-call]
    else:
        function, products, config = _torchao(Fp8Recipe(recipe))
        result = function.apply(x, weight_io, products, config)
    return result


# An operator of its own, because how many rows a group has is known to no compiler: a loop over them breaks its graph.
@torch.library.custom_op("autoprec::fp8_grouped_matmul", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, ends: Tensor, recipe: str, family: str, emulate: bool) -> Tensor:
    result = x.new_zeros(x.shape[0], weight.shape[2])
    for rows, matrix, _ in _groups(x, weight, ends):
        result[rows] = _one(x[rows], matrix, recipe, family, emulate)
    return result


@torch.library.custom_op("autoprec::fp8_grouped_matmul_backward", mutates_args=())
def _grouped_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, recipe: str, family: str, emulate: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for rows, matrix, index in _groups(x, weight, ends):
        a, b = x[rows].detach().requires_grad_(), matrix.detach().requires_grad_()
        with torch.enable_grad():
            product = _one(a, b, recipe, family, emulate)
        grad_x[rows], grad_weight[index] = torch.autograd.grad(product, (a, b), grad[rows])
    return grad_x, grad_weight


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, recipe: str, family: str, emulate: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_grouped_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, recipe: str, family: str, emulate: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _grouped_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return grad_x, grad_weight, None, None, None, None


_grouped.register_autograd(_derive, setup_context=_keep)
