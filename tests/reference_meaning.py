"""What a plan means, written slowly and plainly, with nothing of the runtime in it.

`meaning(model, plan)` is a context in which every product (matmul, convolution, scaled dot product) casts its own
operands: inside a unit's leaf to the unit's format, between the leaves of a unit that holds a module together (its
attention products) to the unit's format too, elsewhere to the ambient. An FP8 leaf rounds its operands to E4M3 and
the gradient to E5M2, each with one scale, and gives its result in the ambient; between the leaves of an FP8 unit the
ambient holds. What a lookup hands on is rounded and widened again. Everything that is no product runs as
`torch.autocast` in the ambient runs it. Classes of modules stay untouched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from autoprec.plan import Plan, PlanUnit
from autoprec.records import Role

__all__ = ["meaning"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAIRS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
ADDED = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


@contextlib.contextmanager
def meaning(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Run a forward with `model` meaning what `plan` says; call backward after the block, as after autocast."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> Any:
        running.append(module)
        if mode.between.get(id(module)) == "fp32":  # widened once, so that its gradient is summed in FP32
            return tuple(widened(a) for a in args)
        return None

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        running.pop()
        if id(module) in mode.ends:
            return widened(output)
        unit = mode.lookups.get(id(module))
        return None if unit is None else output.to(DTYPES[unit]).float()

    mode = Products(model, plan, running)
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    with unpacked(model), mode.around(str(plan.ambient)), mode:
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Products(TorchFunctionMode):
    """Casts the operands of products by the innermost module that runs."""

    def __init__(self, model: nn.Module, plan: Plan, running: list[nn.Module]) -> None:
        super().__init__()
        self.running, self.ambient = running, DTYPES[plan.ambient]
        modules = {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}
        self.uniform = all(u.format == plan.ambient for u in plan.units if u.role is not Role.EMBEDDING)
        self.leaves: dict[int, str] = {}
        self.lookups: dict[int, str] = {}
        for unit in plan.units:
            kind = self.lookups if unit.role is Role.EMBEDDING else self.leaves
            kind.update({id(modules[name]): str(unit.format) for name in unit.modules})
        held = holders(plan)
        self.between = {id(modules[path]): str(unit.format) for path, unit in held.items()}
        foreign = {"bf16", "fp16"} - {str(plan.ambient)}
        self.ends = {id(modules[path]) for path, unit in held.items() if str(unit.format) in foreign}
        for unit in plan.units:  # a unit that nothing holds ends with its last leaf, and none but an FFN is whole
            alone = unit not in held.values()
            if alone and str(unit.format) in foreign and unit.role not in (Role.EMBEDDING, Role.LM_HEAD):
                ends = unit.modules[-1:] if unit.role is Role.FFN else unit.modules
                self.ends |= {id(modules[name]) for name in ends}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self.attention(*args, **kwargs)
        name = getattr(func, "__name__", "").split(".")[0]
        choice = self.choice()
        if not self.is_product(func, name):
            with self.around(choice):
                return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            if choice == "fp8":
                return self.fp8(func, name, *args, **kwargs)
            if name == "grouped_mm_fallback" or "grouped_mm" in name:
                if self.uniform:  # autocast does not know it
                    return func(*args, **kwargs)
            dtype = DTYPES[choice]
            return func(*(cast(a, dtype) for a in args), **{k: cast(v, dtype) for k, v in kwargs.items()})

    def around(self, choice: str) -> Any:
        """Return the autocast that what is no product sees: cat, stack and losses look at it."""
        dtype = self.ambient if choice == "fp8" else DTYPES[choice]
        if dtype is torch.float32:
            return torch.autocast("cpu", enabled=False)
        return torch.autocast("cpu", dtype=dtype, cache_enabled=False)

    @staticmethod
    def is_product(func: Any, name: str) -> bool:
        others = (F.linear, F.scaled_dot_product_attention, torch.einsum)
        return func in PAIRS | ADDED | CONVOLUTIONS or func in others or "grouped_mm" in name

    def choice(self) -> str:
        """Return the format that holds here: 'fp8' only in leaves."""
        ambient = next(name for name, dtype in DTYPES.items() if dtype is self.ambient)
        for module in reversed(self.running):
            if id(module) in self.leaves:
                return self.leaves[id(module)]
            if id(module) in self.between:
                found = self.between[id(module)]
                return ambient if found == "fp8" else found
        return ambient

    def fp8(self, func: Any, name: str, *args: Any, **kwargs: Any) -> Tensor:
        if func is F.linear:
            return self.biased(self.rounded(args[0], args[1].t()), *args[2:], **kwargs)
        if func is torch.addmm:  # Hugging Face's Conv1D
            return self.biased(self.rounded(args[1], args[2]), args[0])
        if func in PAIRS and args[1].dim() == 2:
            return self.rounded(*args)
        if func in PAIRS and args[1].shape[-1] > 1:  # a product an expert
            return torch.stack([self.rounded(x, w) for x, w in zip(*args, strict=True)])
        if "grouped_mm" in name:
            ends = [0, *kwargs["offs"].tolist()]
            rows = zip(ends, ends[1:], args[1], strict=False)
            return torch.cat([self.rounded(args[0][a:b], w) for a, b, w in rows if b > a])
        raise AssertionError(f"{func} in an FP8 leaf")

    def rounded(self, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.to(self.ambient).reshape(-1, x.shape[-1])
        result: Tensor = Fp8Product.apply(flat, weight)  # type: ignore[no-untyped-call]
        return result.reshape(*x.shape[:-1], -1)

    def biased(self, result: Tensor, bias: Tensor | None = None) -> Tensor:
        return result if bias is None else result + bias.to(result.dtype)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any, **_: Any) -> Any:
        """MultiheadAttention on itself, without masks: [T, B, width] in and out."""
        assert query is key is value
        in_weight, in_bias, out_weight, out_bias = rest[0], rest[1], rest[6], rest[7]
        choice = self.choice()

        def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if choice == "fp8":
                return self.biased(self.rounded(x, weight.t()), bias)
            dtype = DTYPES[choice]
            return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

        with torch.autocast("cpu", enabled=False):
            time, batch = query.shape[:2]
            parts = product(query, in_weight, in_bias).chunk(3, -1)
            q, k, v = (x.reshape(time, batch, heads, -1).permute(1, 2, 0, 3) for x in parts)
            mixed = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(time, batch, width)
            return product(mixed, out_weight, out_bias), None


class Fp8Product(torch.autograd.Function):
    """x [n, in] @ weight [in, out], one scale a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled(x, torch.float8_e4m3fn, weight, torch.float8_e4m3fn).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        to_x = scaled(grad, torch.float8_e5m2, weight.t(), torch.float8_e4m3fn).to(x.dtype)
        to_w = scaled(x.t(), torch.float8_e4m3fn, grad, torch.float8_e5m2)
        return to_x, to_w.to(grad.dtype).to(weight.dtype)


def scaled(a: Tensor, of_a: torch.dtype, b: Tensor, of_b: torch.dtype) -> Tensor:
    (a8, scale_a), (b8, scale_b) = ((eighth(a, of_a)), (eighth(b, of_b)))
    return (a8 @ b8) / (scale_a * scale_b)


def eighth(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = torch.finfo(dtype).max
    scale = (top / values.float().abs().amax().double().clamp(min=1e-12)).float()
    return (values.float() * scale).clamp(-top, top).to(dtype).float(), scale


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def widened(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(widened(item) for item in value)
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def holders(plan: Plan) -> dict[str, PlanUnit]:
    """Return the modules whose inside belongs to one unit: the smallest around its leaves, if no rival stands there."""
    found: dict[str, PlanUnit] = {}
    for unit in plan.units:
        if unit.role is Role.EMBEDDING or len(unit.modules) < 2:
            continue
        parts = [name.split(".") for name in unit.modules]
        depth = 0
        while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
            depth += 1
        path = ".".join(parts[0][:depth])
        inside = [u for u in plan.units if any(m.startswith(f"{path}.") or not path for m in u.modules)]
        allowed = (Role.FFN, Role.OTHER) if unit.role is Role.ATTENTION else ()
        if all(u is unit or u.role in allowed for u in inside) and path not in found:
            found[path] = unit
    return found


@contextlib.contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Let 4-bit layers multiply with their unpacked weight, as one plain product."""
    packed = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.is_floating_point()]
    for module in packed:
        weight: Any = module.weight
        dense = import_module("bitsandbytes.functional").dequantize_4bit(weight.data, weight.quant_state).float()
        module.__dict__["forward"] = functools.partial(F.linear, weight=dense)
    try:
        yield
    finally:
        for module in packed:
            del module.__dict__["forward"]
