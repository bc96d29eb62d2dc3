"""Recording what every operator of a step runs in, and whose it is.

Operators are recorded below autograd. Forward ones belong to the module that runs; backward ones to the module in
which their autograd node was made, found by its sequence number. Storages that come from a leaf's weight (casts,
transposes, FP8 rounding) are followed, so that a weight used while its leaf is not running is found.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.formats import Format
from autoprec.plan import Plan, PlanUnit
from autoprec.records import AuditReport, AuditRow, BehindUse, CastRow, Direction, KernelRow, OpKind, Origin, Role
from autoprec.runtime.layout import holders, holds_experts
from autoprec.runtime.target import emulated_product

__all__ = ["DotProducts", "Recorder"]

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_PRODUCTS = (OpKind.MATMUL, OpKind.ATTENTION, OpKind.CONVOLUTION)
_MATMULS = frozenset("mm addmm bmm baddbmm _scaled_mm _grouped_mm grouped_mm_fallback gemm_4bit linear".split())
_CONVOLUTIONS = frozenset(("convolution", "convolution_backward", "mkldnn_convolution", "_slow_conv2d_forward"))
_NORMS = frozenset(("native_layer_norm", "native_batch_norm", "native_group_norm", "_fused_rms_norm", "rsqrt"))
#: operators that keep a weight a weight, besides views
_KEEPS = frozenset(("_to_copy", "clone", "mul", "clamp", "index", "index_select", "contiguous"))


@dataclass(slots=True)
class _Place:
    """Where an operator belongs: unit, module, and whether that module is a leaf of the unit."""

    unit: PlanUnit | None
    module: str
    leaf: bool
    #: within PyTorch's scaled dot product, whose math path shows its products one by one
    dot_product: bool = False
    #: whether the operator is a product; the gradient of another may be made of products too, of which no plan speaks
    product: bool = False
    #: what a product that is computed in FP32 stands for (`target.emulated_product`); its gradients do as well
    emulated: torch.dtype | None = None


class DotProducts(TorchFunctionMode):
    """Tells the recorder when a scaled dot product runs."""

    def __init__(self, seen: Recorder) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen.in_dot_product = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seen.in_dot_product = False


@dataclass(slots=True)
class _Sum:
    operators: set[str] = field(default_factory=set)
    calls: int = 0
    size: int = 0
    ms: float = 0.0


class Recorder(TorchDispatchMode):
    """Sums up operators by place, kind and format."""

    def __init__(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.modules = plan, modules
        self.names = {id(m): name for name, m in modules.items()}
        self.leaves = {id(modules[name]): unit for unit in plan.units for name in unit.modules}
        self.between = {id(modules[path]): unit for path, unit in holders(plan, modules).items()}
        self.multihead = {name for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
        self.stack: list[nn.Module] = []
        self.in_dot_product = False
        #: an accelerator computes while the host goes on, so that what is timed must be waited for
        self.waits = any(p.device.type not in ("cpu", "meta") for p in modules[""].parameters())
        self.nodes: dict[int, _Place] = {}
        self.weights: dict[int, set[str]] = defaultdict(set)
        self.alive: list[Tensor] = []
        for unit in plan.units:
            for name in unit.modules:
                for key, parameter in modules[name]._parameters.items():
                    if parameter is not None and parameter.dim() > 1:
                        self.weights[parameter.untyped_storage()._cdata].add(f"{name}.{key}")
        self.used: set[str] = set()
        self.rows: dict[tuple[Any, ...], _Sum] = defaultdict(_Sum)
        self.casts: dict[tuple[Any, ...], _Sum] = defaultdict(_Sum)
        self.behind: dict[tuple[Any, ...], BehindUse] = {}

    # what happens

    def left(self, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        unit = self.leaves.get(id(module))
        if unit is None:
            return
        name = self.names[id(module)]
        self.used.add(name)
        if unit.role is Role.EMBEDDING and isinstance(output, Tensor):
            wanted = {f: d for d, f in _NAMES.items()}[str(unit.format)]
            held = torch.equal(output.detach().to(wanted).to(output.dtype), output.detach())
            key = (unit.name, name, OpKind.LOOKUP, Direction.FORWARD, str(unit.format) if held else "fp32")
            self._add((*key, _NAMES.get(output.dtype, str(output.dtype)), True), "embedding")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        kind = _kind_of(name)
        waits = self.waits and (kind in _PRODUCTS or name == "_to_copy")
        if waits:
            torch.accelerator.synchronize()
        started = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        if waits:
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
        place, direction = self._place(kind)
        tensors = [a for a in args if isinstance(a, Tensor)]
        self._follow(name, tensors, output)
        if name == "_to_copy":
            self._cast(place, direction, tensors[0], output, seconds)
        if kind is not None and kind is not OpKind.LOOKUP:
            self._operator(name, kind, place, direction, tensors, output, seconds)
        return output

    def _place(self, kind: OpKind | None) -> tuple[_Place, Direction]:
        if self.stack:
            place = self._place_of(self.stack)
            place.dot_product = self.in_dot_product
            node_number = torch._C._autograd._get_sequence_nr() - 1
            before = self.nodes.get(node_number)
            place.product = kind in _PRODUCTS or (before is not None and before.product)
            place.emulated = emulated_product() if kind in _PRODUCTS or before is None else before.emulated
            self.nodes[node_number] = place
            return place, Direction.FORWARD
        node: Any = torch._C._current_autograd_node()
        unknown = _Place(None, "", False)
        if node is None:
            return unknown, Direction.FORWARD
        found = self.nodes.get(node._sequence_nr(), unknown)
        if kind in _PRODUCTS and not found.product:
            found = _Place(None, found.module, False)
        return found, Direction.BACKWARD

    def _place_of(self, stack: list[nn.Module]) -> _Place:
        for module in reversed(stack):
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                break  # computes the weight of a leaf, before that leaf's product
            if id(module) in self.leaves:
                return _Place(self.leaves[id(module)], self.names[id(module)], True)
            if id(module) in self.between:
                return _Place(self.between[id(module)], self.names[id(module)], False)
        named = next((self.names[id(m)] for m in reversed(stack) if id(m) in self.names), "")
        return _Place(None, named, False)

    def _follow(self, name: str, tensors: list[Tensor], output: Any) -> None:
        """Mark what is made of a weight alone as that weight."""
        if name in _KEEPS and tensors and isinstance(output, Tensor) and output.shape[-1:] == tensors[0].shape[-1:]:
            sources = self.weights.get(tensors[0].untyped_storage()._cdata)
            if sources and not any(t.numel() > max((1, *t.shape)) for t in tensors[1:]):
                self.weights[output.untyped_storage()._cdata] |= sources
                self.alive.append(output)  # so that its storage's address is not given to another

    def _cast(self, place: _Place, direction: Direction, source: Tensor, output: Tensor, seconds: float) -> None:
        if source.dtype in _NAMES and output.dtype in _NAMES and source.dtype != output.dtype:
            unit = place.unit.name if place.unit else None
            entry = self.casts[unit, _NAMES[source.dtype], _NAMES[output.dtype], direction]
            entry.calls += 1
            entry.size += source.nbytes + output.nbytes
            entry.ms += seconds * 1e3

    def _operator(
        self,
        name: str,
        kind: OpKind,
        place: _Place,
        direction: Direction,
        tensors: list[Tensor],
        output: Any,
        seconds: float,
    ) -> None:
        floats = [t for t in tensors if t.is_floating_point() and t.dim() > 1] or tensors[:1]
        if name in ("addmm", "baddbmm") and len(floats) == 3:
            floats = floats[1:]
        batched = place.module in self.multihead and name in ("bmm", "baddbmm")  # asked for its weights
        if (place.dot_product or batched) and kind is OpKind.MATMUL:
            kind = OpKind.ATTENTION
        if place.unit is not None and place.unit.format is Format.FP8 and place.module in self.multihead:
            if kind is OpKind.ATTENTION:
                place = _Place(place.unit, place.module, leaf=False)
            elif any(_is_identity(t) for t in floats):
                return  # hands on what FP8 products gave and changes no bit
        if kind is OpKind.ATTENTION:
            floats = floats[: 4 if direction is Direction.BACKWARD else 3]
        executed = self._executed(place, kind, floats)
        result = output[0] if isinstance(output, tuple | list) else output
        came_out = _NAMES.get(result.dtype, str(result.dtype)) if isinstance(result, Tensor) else ""
        unit = place.unit.name if place.unit else None
        self._add((unit, place.module, kind, direction, executed, came_out, place.leaf), name, seconds)
        if direction is Direction.FORWARD and kind in (OpKind.MATMUL, OpKind.CONVOLUTION):
            self._behind(name, executed, floats)

    def _executed(self, place: _Place, kind: OpKind, floats: list[Tensor]) -> str:
        held = [getattr(t, "_data", t) for t in floats]  # torchao's FP8 tensors call themselves what they stand for
        dtypes = {t.dtype for t in held}
        if dtypes & set(_FP8):
            return "fp8 (emulated)" if any(_torchao_emulates(t) for t in floats) else "fp8"
        names = sorted({_NAMES.get(d, str(d).removeprefix("torch.")) for d in dtypes})
        wide = names == ["fp32"]
        if wide and place.emulated is not None:
            return f"{_NAMES[place.emulated]} (emulated)"
        if wide and place.unit is not None and place.unit.format is Format.FP8 and kind is OpKind.MATMUL:
            return "fp8 (emulated)" if all(_is_eighth(t) for t in floats) else "fp32"
        cuda = torch.backends.cuda.matmul
        if wide and floats[0].is_cuda and kind is OpKind.MATMUL and cuda.fp32_precision == "tf32":
            return "tf32"
        return " and ".join(names)

    def _behind(self, name: str, executed: str, floats: list[Tensor]) -> None:
        for tensor in floats:
            sources = self.weights.get(tensor.untyped_storage()._cdata)
            if not sources:
                continue
            self.used |= {s.rpartition(".")[0] for s in sources}
            running = {self.names.get(id(m)) for m in self.stack if id(m) in self.leaves}
            if any(r is not None and (s.startswith(f"{r}.")) for s in sources for r in running):
                continue
            source = sorted(sources)[0]
            unit = self.leaves[id(self.modules[source.rpartition(".")[0]])]
            caller = next((self.names[id(m)] for m in reversed(self.stack) if id(m) in self.names), "")
            self.behind[source, name, executed, caller] = BehindUse(
                unit=unit.name,
                parameter=source,
                operator=name,
                executed=executed,
                caller=caller,
                # a lookup's table that is multiplied as data is rounded by whoever multiplies it
                agrees=unit.role is Role.EMBEDDING or _matches(unit.format, executed, self.plan),
            )

    def _add(self, key: tuple[Any, ...], operator: str, seconds: float = 0.0) -> None:
        entry = self.rows[key]
        entry.operators.add(operator)
        entry.calls += 1
        entry.ms += seconds * 1e3

    # what it comes to

    def report(self, backward: bool, ms: float, kernels: tuple[KernelRow, ...]) -> AuditReport:
        """Return the record of what was seen in a step that took `ms` milliseconds and launched `kernels`."""
        rows = tuple(self._row(key, entry) for key, entry in self.rows.items())
        behind = tuple(self.behind.values())
        wrong = [_sentence(row) for row in rows if row.agrees is False]
        wrong += [
            f"unit '{use.unit}': {use.parameter} was used in {use.executed} by '{use.caller or 'the model'}' "
            f"({use.operator}) while its own module was not running, so its scope could not act. Call the module "
            "instead of its weight, or turn the fused kernel off."
            for use in behind
            if not use.agrees
        ]
        leaves = [name for unit in self.plan.units for name in unit.modules]
        casts = sorted(self.casts.items(), key=lambda item: -item[1].ms)
        return AuditReport(
            device=str(next(self.modules[""].parameters()).device),
            backward=backward,
            rows=rows,
            casts=tuple(
                CastRow(unit=k[0], source=k[1], target=k[2], direction=k[3], calls=e.calls, bytes=e.size, ms=e.ms)
                for k, e in casts
            ),
            behind=behind,
            unused=tuple(name for name in leaves if name not in self.used),
            kernels=kernels,
            step_ms=ms,
            origin=Origin.MEASURED,
            disagreements=tuple(wrong),
        )

    def _row(self, key: tuple[Any, ...], entry: _Sum) -> AuditRow:
        unit_name, module, kind, direction, executed, result, leaf = key
        planned, agrees, reason = None, None, None
        if unit_name is not None and kind not in (OpKind.NORM, OpKind.SOFTMAX):
            planned = self.plan.unit(unit_name).format
            if not leaf and planned is Format.FP8:
                planned = self.plan.ambient  # between the leaves of an FP8 unit
            agrees = _matches(planned, executed, self.plan)
            if not agrees and kind is OpKind.ATTENTION and executed == "fp32" and not leaf:
                agrees, reason = True, "the math path of PyTorch's scaled dot product computes inside in FP32"
            if not agrees and leaf and self._as_autocast(module):
                agrees, reason = True, "experts in 3-D parameters: in a uniform plan they run as autocast runs them"
        return AuditRow(
            unit=unit_name,
            module=module,
            kind=kind,
            direction=direction,
            planned=planned,
            executed=executed,
            result=result,
            operators=tuple(sorted(entry.operators)),
            calls=entry.calls,
            agrees=agrees,
            reason=reason,
            ms=entry.ms,
        )

    def _as_autocast(self, module: str) -> bool:
        leaf = self.modules[module]
        return holds_experts(leaf) and "_autoprec_name" not in vars(leaf)


def _kind_of(name: str) -> OpKind | None:
    if name in _MATMULS:
        return OpKind.MATMUL
    if name in _CONVOLUTIONS:
        return OpKind.CONVOLUTION
    if name.startswith("_scaled_dot_product"):
        return OpKind.ATTENTION
    if name in _NORMS:
        return OpKind.NORM
    return OpKind.SOFTMAX if name == "_softmax" else None


def _is_eighth(tensor: Tensor) -> bool:
    """Say whether FP32 values are all values of an FP8 format."""
    values = tensor.detach()
    return any(torch.equal(values.to(dtype).float(), values) for dtype in _FP8)


def _torchao_emulates(tensor: Tensor) -> bool:
    """Say whether torchao widens an FP8 tensor before it multiplies."""
    return bool(getattr(getattr(getattr(tensor, "_linear_mm_config", None), "output", None), "emulate", False))


def _is_identity(tensor: Tensor) -> bool:
    rows, columns = tensor.shape[-2:]
    identity = torch.eye(rows, columns, dtype=tensor.dtype, device=tensor.device)
    return rows == columns and torch.equal(tensor.detach(), identity.expand_as(tensor))


def _matches(planned: Format, executed: str, plan: Plan) -> bool:
    if planned is Format.FP8:
        return executed.startswith("fp8")
    if planned is Format.FP32 and executed == "tf32":
        return plan.tf32
    return executed.removesuffix(" (emulated)") == planned


def _sentence(row: AuditRow) -> str:
    return (
        f"unit '{row.unit}': {row.module} is planned in {row.planned} and ran in {row.executed} "
        f"({row.direction} {row.kind}, {', '.join(row.operators)}). Look for what changed or bypasses this module; "
        "if nothing does, this is a fault of autoprec worth reporting."
    )
