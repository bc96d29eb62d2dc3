"""What a CUDA device does that this one does not: autocast's lists of FP32 operations, TF32 and 16-bit products.

CPU autocast runs softmax, norms, powers and sums in the low format; CUDA widens their operands to FP32 first (PyTorch's
list in `aten/src/ATen/autocast_mode.h`). TF32 rounds the operands of FP32 products to 10 fraction bits, in the backward
too. Products of 16-bit operands are summed in FP32 and rounded once. A training step in a 16-bit format takes a CPU
without instructions for it 10 to 19 times as long as one in FP32 (benchmarks/results/emulated.json), so they are
computed in FP32 there: a product of two such values is exact in FP32, and only the order of summation differs. Within
`target_lists` functions called on this device do the same. Not modelled: the inside of fused attention, the order of
accumulation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoprec.formats import TF32, Format, layout
from autoprec.runtime.cpu import UNITS, cpu_instructions
from autoprec.runtime.emulate import round_to, torch_dtype

__all__ = ["RMS_NORM_WIDENED", "WIDENED", "emulated_product", "products_in_fp32", "target_lists"]

#: on CUDA's list from 2.12 on (pytorch/pytorch#188955); an H200 with 2.11 left it in BF16
RMS_NORM_WIDENED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
#: autocast's `fp32` and `fp32_set_opt_dtype` lists of CUDA, as functions and methods are called in Python
WIDENED = frozenset(
    {
        "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist",
        "cosine_embedding_loss", "cosine_similarity", "cosh", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv",
        "exp", "expm1", "gaussian_nll_loss", "group_norm", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss",
        "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "margin_ranking_loss", "mse_loss",
        "multi_margin_loss", "multilabel_margin_loss", "native_layer_norm", "nll_loss", "norm", "poisson_nll_loss",
        "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss",
        "softmax", "softmin", "softplus", "sum", "tan", "triplet_margin_loss", "vector_norm",
    }
    | ({"rms_norm"} if RMS_NORM_WIDENED else set())
)  # fmt: skip
#: functions whose operands a tensor core takes in TF32, BF16 or FP16
_PRODUCTS = frozenset(
    {
        "__matmul__", "addbmm", "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul", "mm",
    }
)  # fmt: skip
_LOW = (torch.bfloat16, torch.float16)
_PLAIN = {Tensor, torch.nn.Parameter}
_active: ContextVar[bool] = ContextVar("target_lists", default=False)
_product: ContextVar[torch.dtype | None] = ContextVar("emulated_product", default=None)


@contextlib.contextmanager
def target_lists(tf32: bool) -> Iterator[None]:
    """Run a block as CUDA would; inside another such block nothing changes. A compiler sees nothing of it."""
    if torch.compiler.is_compiling() or _active.get():
        yield
        return
    token = _active.set(True)
    try:
        with _Lists(tf32):
            yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def products_in_fp32() -> Iterator[None]:
    """Compute the 16-bit products that this CPU is slow at in FP32, with the same results but for the order of sums."""
    if not _slow():
        yield
        return
    with _Products():
        yield


class _Products(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Widens what CUDA's autocast widens, and rounds products to TF32 where that is on."""

    def __init__(self, tf32: bool) -> None:
        super().__init__()
        self.tf32 = tf32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WIDENED and (first := _first(args)) is not None and torch.is_autocast_enabled(first.device.type):
            return func(*_mapped(args, _widened), **{key: _mapped(value, _widened) for key, value in kwargs.items()})
        if self.tf32 and name in _PRODUCTS and (first := _first(args)) is not None:
            if _operand_dtype(first) is torch.float32:
                result = func(*_operands(name, args), **{k: _mapped(v, _rounded) for k, v in kwargs.items()})
                return _GradientRounded.apply(result)  # type: ignore[no-untyped-call]
        return _computed(func, args, kwargs)


@functools.cache
def _slow() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes for which this CPU has no instructions."""
    known = set(cpu_instructions())
    return frozenset(torch_dtype(layout(Format(choice))) for choice, units in UNITS.items() if not units & known)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function, in FP32 where it is a product of operands in a dtype that this CPU is slow at.

    Tensors of other types than PyTorch's own, as packed weights are, know themselves how they are multiplied.
    """
    if getattr(func, "__name__", "") in _PRODUCTS and (first := _first(args)) is not None:
        dtype, plain = _operand_dtype(first), all(type(t) in _PLAIN for t in _tensors(args))
        if plain and first.device.type == "cpu" and dtype in _slow() and kwargs.get("out") is None:
            return _in_fp32(func, args, kwargs, dtype)
    return func(*args, **kwargs)


def _operand_dtype(first: Tensor) -> torch.dtype:
    """Return the dtype of a product's operands, told by the first of them."""
    kind = first.device.type
    if torch.is_autocast_enabled(kind) and first.dtype in (torch.float32, *_LOW):
        return torch.get_autocast_dtype(kind)
    return first.dtype


def _in_fp32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return a product of operands in a 16-bit dtype, summed in FP32 and rounded once; so are its gradients."""

    def exact(value: Tensor) -> Tensor:
        return value.to(dtype).float() if value.is_floating_point() else value

    wide, named = _mapped(args, exact), {key: _mapped(value, exact) for key, value in kwargs.items()}
    token = _product.set(dtype)
    try:
        with torch.autocast("cpu", enabled=False):
            result: Tensor = func(*wide, **named)
    finally:
        _product.reset(token)
    return result.to(dtype)


def emulated_product() -> torch.dtype | None:
    """Return the dtype that the product under way stands for, which is computed in FP32; None outside of such."""
    return _product.get()


class _Rounded(torch.autograd.Function):
    """Rounds to TF32; the gradient passes, as the kernel's own products are rounded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return round_to(values, TF32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _GradientRounded(torch.autograd.Function):
    """Passes values on and rounds their gradient, an operand of the products of the backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return round_to(grads[0], TF32)


def _operands(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with the operands of the product rounded: what is added to it is not."""
    first = 1 if name in ("addmm", "baddbmm", "addbmm") else 0
    last = first + 2 if name != "einsum" else len(args)
    return tuple(_mapped(arg, _rounded) if first <= i < last else arg for i, arg in enumerate(args))


def _rounded(value: Tensor) -> Tensor:
    if value.dtype is not torch.float32:
        return value
    result: Tensor = _Rounded.apply(value)  # type: ignore[no-untyped-call]
    return result


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _LOW else value


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _first(args: Any) -> Tensor | None:
    """Return the first tensor of some arguments, of a list among them as well."""
    return next(_tensors(args), None)


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)
