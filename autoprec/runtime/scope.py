"""Scopes: modules whose class was swapped for a subclass that runs the old forward in a given precision.

A swap changes neither parameters, names, hooks nor the object itself, and survives `torch.compile`, activation
checkpointing, `deepcopy`, pickling, PEFT, DDP and FSDP2; wrappers, patched `forward` attributes and hooks that
enter contexts each break at least one of these. Every autocast region names its dtype and turns the weight
cache off, because that cache is keyed by weight alone: a weight used in two formats would get a stale cast.

| scope | on | does |
|---|---|---|
| AmbientScope | the root | autocast in the ambient format, or autocast off |
| UnitScope | a module that holds a unit | autocast in the unit's format; FP32: autocast off and float inputs |
| GemmScope | one leaf | casts input and weight, computes with autocast off |
| Fp8Scope | one leaf | FP8 matmul, result in the ambient format |
| AttentionScope | MultiheadAttention | FP8 projections, attention between them in the ambient format |
| ExpertsScope | experts in 3-D parameters | casts the operands of every product, which no autocast list has in full |
| QuantizedScope | a packed linear layer | casts its input and makes its kernel compute in the unit's format |
| TargetScope | the root, each block | what CUDA widens to FP32 and rounds to TF32, where a plan for CUDA is emulated |
| LookupScope | an embedding | rounds the looked-up values, hands them on in the stream's format |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprec.formats import Fp8Family, Fp8Recipe
from autoprec.runtime.fp8 import KeptScale, fp8_emulated_matmul, fp8_grouped_matmul, fp8_matmul
from autoprec.runtime.integrity import check_once
from autoprec.runtime.products import CastProducts, Grouped, Product, fp8_attention
from autoprec.runtime.target import target_lists

__all__ = [
    "AmbientScope",
    "AttentionScope",
    "ExpertsScope",
    "Fp8Scope",
    "GemmScope",
    "LookupScope",
    "QuantizedScope",
    "Scope",
    "TargetScope",
    "UnitScope",
    "enter_scope",
    "leave_scope",
]

Forward = Callable[..., Any]

#: what an FP32 scope widens; FP64 stays
_LOW = frozenset({torch.float16, torch.bfloat16})


class Scope:
    """What all scopes share: the class they stand on, and a way back from a pickle."""

    _autoprec_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        kinds, base = _layers(type(self))
        return _rebuild, (kinds, base), self.__getstate__()

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the base class's `forward` of `module` in this scope's precision."""
        raise TypeError(f"{cls.__name__} is no scope by itself")


class AmbientScope(Scope):
    """The root's scope; `_autoprec_ambient` is the autocast dtype, None for autocast off."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_once(module)
        with _autocast(_device_type(module), module._autoprec_ambient):
            return forward(module, *args, **kwargs)


class TargetScope(Scope):
    """Runs operations as CUDA does (`target_lists`); `_autoprec_tf32` says whether FP32 products are TF32's.

    On each block beside the root, because checkpointing runs blocks again by themselves.
    """

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with target_lists(module._autoprec_tf32):
            return forward(module, *args, **kwargs)


class UnitScope(Scope):
    """A unit's container; `_autoprec_dtype` its format, `_autoprec_stream` the dtype of what it hands on, or None."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = module._autoprec_dtype
        if dtype is torch.float32:
            with _autocast(_device_type(module), None):
                named = _cast(kwargs, dtype, _LOW) if kwargs else kwargs
                result = forward(module, *_cast(args, dtype, _LOW), **named)
        else:
            with _autocast(_device_type(module), dtype):
                result = forward(module, *args, **kwargs)
        return _cast(result, module._autoprec_stream) if module._autoprec_stream is not None else result


class GemmScope(Scope):
    """A linear or convolution leaf that casts its operands to `_autoprec_dtype` itself."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, dtype = _only_input(args, kwargs), module._autoprec_dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        with _autocast(x.device.type, None):
            if isinstance(module, nn.Linear):
                result = F.linear(x.to(dtype), module.weight.to(dtype), bias)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                result = module._conv_forward(x.to(dtype), module.weight.to(dtype), bias)
            else:
                result = _affine(x.to(dtype), module.weight.to(dtype), bias)
        return result if module._autoprec_stream is None else result.to(module._autoprec_stream)


class Fp8Scope(Scope):
    """A linear leaf in FP8; `_autoprec_dtype` is the dtype of its result, and of x before it is scaled."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _only_input(args, kwargs)
        weight_io = module.weight.t() if isinstance(module, nn.Linear) else module.weight
        result = _fp8_product(module)(x, weight_io)
        if module.bias is not None:
            result = result + module.bias.to(result.dtype)
        return result if module._autoprec_stream is None else result.to(module._autoprec_stream)


class AttentionScope(Scope):
    """A MultiheadAttention with its projections in FP8; `_autoprec_dtype` is the dtype of their results."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        low = None if module._autoprec_dtype is torch.float32 else module._autoprec_dtype
        with _autocast(_device_type(module), low):
            result, weights = fp8_attention(module, _fp8_product(module), *args, **kwargs)
        return (result if module._autoprec_stream is None else result.to(module._autoprec_stream)), weights


class ExpertsScope(Scope):
    """Experts held as 3-D parameters: every product in `_autoprec_dtype`, or in FP8 where there is a recipe."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype, recipe = module._autoprec_dtype, module._autoprec_recipe
        if dtype is torch.float32 and recipe is None:
            args, kwargs = _cast(args, dtype, _LOW), _cast(kwargs, dtype, _LOW)
        products = CastProducts(dtype, _fp8_product(module), _fp8_grouped(module)) if recipe else CastProducts(dtype)
        with _autocast(_device_type(module), None), products:
            result = forward(module, *args, **kwargs)
        return _cast(result, module._autoprec_stream) if module._autoprec_stream is not None else result


class QuantizedScope(Scope):
    """A linear layer with a packed weight, computing in `_autoprec_dtype`."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, bias, dtype = _only_input(args, kwargs), module.bias, module._autoprec_dtype
        # the last would repack the weight in place for a kernel of BF16 alone, which nothing could undo
        wanted = {"compute_dtype": dtype, "compute_type_is_set": True, "support_avx512bf16_for_cpu": False}
        held = {key: vars(module)[key] for key in wanted if key in vars(module)}
        data = None if bias is None else bias.data
        vars(module).update({key: wanted[key] for key in held})
        try:
            with _autocast(x.device.type, None):
                result = forward(module, x.to(dtype))
        finally:
            vars(module).update(held)
            if data is not None:
                bias.data = data  # such layers cast their bias in place
        return result if module._autoprec_stream is None else result.to(module._autoprec_stream)


class LookupScope(Scope):
    """An embedding whose looked-up values are rounded to `_autoprec_dtype` and handed on as `_autoprec_stream`."""

    @classmethod
    def run(cls, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(module, *args, **kwargs).to(module._autoprec_dtype).to(module._autoprec_stream)


def enter_scope(
    module: nn.Module,
    kind: type[Scope],
    **settings: torch.dtype | Fp8Recipe | Fp8Family | KeptScale | bool | str | None,
) -> None:
    """Swap `module.__class__` for its `kind` of scope with the given settings."""
    for name, value in settings.items():
        module.__dict__[f"_autoprec_{name}"] = value
    module.__class__ = _scoped(kind, type(module))


def leave_scope(module: nn.Module) -> None:
    """Undo all `enter_scope` of `module`; what others swapped its class for since, as FSDP2 does, stays."""
    own: Any = type(module)
    module.__class__ = _unscoped(own)
    for name in [n for n in module.__dict__ if n.startswith("_autoprec_")]:
        del module.__dict__[name]


@functools.cache
def _unscoped(cls: type) -> type:
    if not issubclass(cls, Scope):
        return cls
    if "_autoprec_base" in cls.__dict__:
        return _unscoped(cls.__dict__["_autoprec_base"])
    # a class made over ours: the same over the class below
    body = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__", "__doc__")}
    return type(cls.__name__, tuple(_unscoped(base) for base in cls.__bases__), body)


#: the subclasses made so far: equal modules must share one class, or compiled code would not be shared
_SCOPED: dict[tuple[type[Scope], type[nn.Module]], type[nn.Module]] = {}


def _scoped(kind: type[Scope], base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` that runs in `kind`; it keeps the name, which savers write into files."""
    if (kind, base) in _SCOPED:
        return _SCOPED[kind, base]

    @functools.wraps(base.forward)  # keeps the signature, by which trainers choose a batch's columns
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(
            self, kind
        ):  # a wrapper took this forward while the plan was in force, which was removed since
            return base.forward(self, *args, **kwargs)
        return kind.run(self, base.forward, args, kwargs)  # looked up now: a class may be patched between two plans

    @functools.wraps(base.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        cls: Any = type(self)
        self.__class__ = _unscoped(cls)  # adapters make layers of a layer's own class; no plan knows of them

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    body = {"__init__": init, "forward": forward, "_autoprec_base": base, **names}
    made = cast("type[nn.Module]", type(base.__name__, (kind, base), body))
    return _SCOPED.setdefault((kind, base), made)


def _layers(scoped: type) -> tuple[tuple[type[Scope], ...], type]:
    """Return the kinds of scope of a class, innermost first, and the class below them all."""
    kinds: list[type[Scope]] = []
    while issubclass(scoped, Scope):
        kinds.insert(0, scoped.__bases__[0])
        scoped = scoped._autoprec_base
    return tuple(kinds), scoped


def _rebuild(kinds: tuple[type[Scope], ...], base: type[nn.Module]) -> nn.Module:
    for kind in kinds:
        base = _scoped(kind, base)
    return base.__new__(base)


def _fp8_product(module: Any) -> Product:
    """Return x, weight [in, out] -> FP8 product with the module's settings, result in its dtype."""
    dtype, recipe = module._autoprec_dtype, module._autoprec_recipe

    def product(x: Tensor, weight_io: Tensor) -> Tensor:
        with _autocast(x.device.type, None):
            if module._autoprec_emulate:
                kept = getattr(module, "_autoprec_kept", None)
                return fp8_emulated_matmul(x.to(dtype), weight_io, recipe, module._autoprec_family, kept)
            return fp8_matmul(x.to(dtype), weight_io, recipe)

    return product


def _fp8_grouped(module: Any) -> Grouped:
    """Return the grouped product with the module's settings; experts call it with autocast off."""
    recipe, family, emulate = module._autoprec_recipe, module._autoprec_family, module._autoprec_emulate

    def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return fp8_grouped_matmul(x, weight, ends, recipe, family, emulate=emulate)

    return grouped


def _autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    """Return a context in which autocast is on in a dtype, or off (None)."""
    if torch.compiler.is_compiling():
        if dtype is None:
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, dtype=dtype, cache_enabled=False)
    return _Region(device_type, dtype)


class _Region:
    """What `torch.autocast` does, without its checks of device and dtype, which cost more than a small matmul."""

    __slots__ = ("before", "device_type", "dtype", "enabled")

    def __init__(self, device_type: str, dtype: torch.dtype | None) -> None:
        self.device_type, self.dtype = device_type, dtype

    def __enter__(self) -> None:
        kind = self.device_type
        self.enabled = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, self.dtype is not None)
        if self.dtype is not None:
            self.before = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            torch.set_autocast_dtype(kind, self.dtype)
            torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.device_type, self.enabled)
        if self.dtype is not None:
            dtype, cached = self.before
            torch.set_autocast_dtype(self.device_type, dtype)
            torch.set_autocast_cache_enabled(cached)


def _device_type(module: nn.Module) -> str:
    """Return the device type of a module's first parameter; `parameters()` takes ten times as long to give it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter.device.type
    for child in module._modules.values():
        if child is not None and (found := _device_type(child)):
            return found
    return ""  # nothing to compute with, so nothing above asks


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def _affine(x: Tensor, weight_io: Tensor, bias: Tensor | None) -> Tensor:
    """Hugging Face's Conv1D: weight [in, out], written as its own addmm so that results are equal bit for bit."""
    flat = x.reshape(-1, x.shape[-1])
    result = flat @ weight_io if bias is None else torch.addmm(bias, flat, weight_io)
    return result.reshape(*x.shape[:-1], weight_io.shape[1])


def _cast(value: Any, dtype: torch.dtype, only: frozenset[torch.dtype] | None = None) -> Any:
    """Cast floating tensors (of the dtypes `only`) in nested containers; other objects, such as caches, pass."""
    if isinstance(value, Tensor):
        wanted = value.is_floating_point() if only is None else value.dtype in only
        return value.to(dtype) if wanted else value
    if isinstance(value, tuple | list):
        items = [_cast(item, dtype, only) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: _cast(item, dtype, only) for key, item in value.items()}
    if isinstance(value, dict):
        for key, item in value.items():  # a ModelOutput is changed in place: it knows its own fields
            value[key] = _cast(item, dtype, only)
    return value
