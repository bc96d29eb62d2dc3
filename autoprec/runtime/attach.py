"""`apply`: put a plan in force on a model, in place, and take it off again.

The layout of scopes is decided first, as a list of swaps, then done at once: one ambient scope at the root, one
scope at the root of each subtree that holds a whole unit, and scopes on single leaves where a unit shares its
subtree with others. An attention unit always gets the smallest module around it, because the scaled dot product
in between belongs to it. Where the surroundings already give a unit its format there is no scope at all, so a
uniform plan costs one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoprec.catalog import find_device
from autoprec.errors import DeviceError, PlanError
from autoprec.formats import Format, Fp8Family, layout
from autoprec.plan import Plan, PlanUnit, check_modules
from autoprec.records import Role
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.fp8 import fp8_misaligned, fp8_missing
from autoprec.runtime.identity import canonical_modules, fingerprint
from autoprec.runtime.scope import (
    AmbientScope,
    Fp8Scope,
    GemmScope,
    LookupScope,
    Scope,
    UnitScope,
    enter_scope,
    leave_scope,
)
from autoprec.runtime.storage import LoweredStorage, lower_storage
from autoprec.runtime.tf32 import tf32_set

__all__ = ["Applied", "applied", "apply"]


@dataclass(frozen=True, slots=True)
class _Swap:
    """One module to be given a scope."""

    module: str
    kind: type[Scope]
    settings: Mapping[str, Any]


@dataclass(eq=False)
class Applied:
    """A plan in force on a model; `remove()` takes it off and restores the model and every global switch."""

    model: nn.Module
    plan: Plan
    emulate: bool
    _swaps: tuple[_Swap, ...]
    _modules: Mapping[str, nn.Module]
    _storage: LoweredStorage | None = None
    _switches: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _attached: bool = False

    def remove(self) -> None:
        """Restore classes, storage and switches; what training changed meanwhile is kept.

        Raises:
            PlanError: the plan was removed before.
        """
        if not self._attached:
            raise PlanError("this plan is not in force any more: it was removed before")
        self._detach()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run a block with the plan taken off, as when measuring a reference in between."""
        self._detach()
        try:
            yield
        finally:
            self._attach()

    def _attach(self) -> None:
        try:
            if self._storage is not None:
                self._storage.lower()
            for swap in self._swaps:
                enter_scope(self._modules[swap.module], swap.kind, **swap.settings)
            self._switches.enter_context(tf32_set(self.plan.tf32, next(iter(_devices(self.model)), "cpu")))
        except BaseException:
            self._detach()  # all or nothing, also on Ctrl-C
            raise
        self._attached = True

    def _detach(self) -> None:
        self._switches.close()
        for swap in self._swaps:
            leave_scope(self._modules[swap.module])
        if self._storage is not None:
            self._storage.restore()
        self._attached = False


def apply(model: nn.Module, plan: Plan, emulate: bool = False) -> Applied:
    """Put `plan` in force on `model`, in place, and return the handle that removes it.

    Weights stay FP32 (master weights) unless the plan's stream is lower, as in `Plan.cast`. Parameters, names and
    the module objects stay the same, so an optimizer made before or after sees the same parameters.

    Args:
        model: the model the plan was made for, wrapped or not; weights in FP32 where the plan has FP32 units.
        plan: what each unit computes in.
        emulate: compute FP8 units with FP8's rounding in FP32 arithmetic where the device has no FP8. Same numbers
            up to the order of summation, none of the speed.

    Raises:
        PlanError: the plan does not fit the model, is in force already, or asks for what its weights cannot give.
        DeviceError: the device lacks a format of the plan and `emulate` is off.
    """
    modules = canonical_modules(model)
    _check_fits(model, plan, modules)
    emulated = _check_device(model, plan, modules, emulate)
    storage = lower_storage(model, plan, modules) if plan.stream is not Format.FP32 else None
    handle = Applied(
        model=model,
        plan=plan,
        emulate=emulate,
        _swaps=tuple(_swaps(plan, modules, emulated)),
        _modules=modules,
        _storage=storage,
    )
    handle._attach()
    return handle


@contextlib.contextmanager
def applied(model: nn.Module, plan: Plan, emulate: bool = False) -> Iterator[Applied]:
    """Put `plan` in force for the length of a `with` block; errors as in `apply`."""
    handle = apply(model, plan, emulate)
    try:
        yield handle
    finally:
        if handle._attached:
            handle.remove()


# checks, all before anything is changed


def _check_fits(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    if any(isinstance(module, Scope) for module in modules.values()):
        raise PlanError("a plan is in force on this model already; remove() it first")
    check_modules(plan, modules)
    if fingerprint(model) != plan.model.fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.id} ({plan.model.class_name}), and this {type(model).__name__} differs "
            "in its modules, shapes or ties. Make a plan for this model: autoprec recommend, or Plan.uniform(model, …)."
        )
    for unit in plan.units:
        for name in unit.modules:
            _check_leaf(unit, name, modules[name])


def _check_leaf(unit: PlanUnit, name: str, leaf: nn.Module) -> None:
    weight = getattr(leaf, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise PlanError(f"unit '{unit.name}': {name} is a {type(leaf).__name__} without a weight of its own")
    if unit.format is Format.FP32 and weight.dtype in (torch.bfloat16, torch.float16):
        raise PlanError(
            f"unit '{unit.name}' is to compute in fp32, but {name} holds {str(weight.dtype).removeprefix('torch.')} "
            "weights, whose lost bits no plan can bring back. Load the model with dtype=torch.float32."
        )


def _check_device(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module], emulate: bool) -> bool:
    """Return whether FP8 is to be emulated."""
    devices = _devices(model)
    if len(devices) > 1:
        raise PlanError(f"the weights are on several device types ({', '.join(devices)}); move the model to one")
    units = [u for u in plan.units if u.format is Format.FP8]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    missing = fp8_missing(device)
    if units and not missing:
        for unit in units:
            for name in unit.modules:
                outputs, inputs = _features(modules[name])
                if wrong := fp8_misaligned(inputs, outputs):
                    raise PlanError(f"unit '{unit.name}': {name} cannot take fp8: {wrong}")
    if units and missing and not emulate:
        raise DeviceError(
            f"{missing}; the plan has fp8 in {len(units)} units (first '{units[0].name}'). Try a plan for this device "
            "(autoprec recommend MODEL), or emulate=True for FP8's numbers without its speed."
        )
    low = {plan.ambient, plan.stream, *plan.formats}
    if device.type == "cuda" and Format.BF16 in low and not torch.cuda.is_bf16_supported():
        raise DeviceError(f"{torch.cuda.get_device_name(device)} cannot compute in bf16; recommend a plan for it")
    return bool(missing)


def _devices(model: nn.Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.device.type for p in model.parameters()))


def _features(leaf: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear leaf, whichever way round it stores its weight."""
    rows, columns = leaf.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(leaf, nn.Linear) else (columns, rows)


# layout


def _swaps(plan: Plan, modules: Mapping[str, nn.Module], emulated: bool) -> Iterator[_Swap]:
    stored = plan.stream is plan.ambient is not Format.FP32
    # where everything is stored in the ambient format there is nothing for autocast to do, as with model.to()
    root = None if plan.ambient is Format.FP32 or stored else plan.ambient
    containers = _containers(plan, modules)
    for unit in plan.units:
        yield from _unit_swaps(plan, unit, modules, containers, root, emulated)
    for path, unit in containers.items():
        if _around(path, containers, root, below=True) is not unit.format and not _native(plan, unit, root):
            settings = {"dtype": _dtype(unit.format), "stream": _stream(plan)}
            yield _Swap(path, UnitScope, settings)
    yield _Swap("", AmbientScope, {"ambient": _dtype(root) if root else None})


def _unit_swaps(
    plan: Plan,
    unit: PlanUnit,
    modules: Mapping[str, nn.Module],
    containers: Mapping[str, PlanUnit],
    root: Format | None,
    emulated: bool,
) -> Iterator[_Swap]:
    """Yield the leaf scopes of a unit: those whose surroundings do not give the unit's format."""
    held = next((path for path, owner in containers.items() if owner is unit), None)
    for name in unit.modules:
        leaf = modules[name]
        # the last leaf of a unit writes to the stream; a container does that for its unit itself
        last = name == unit.modules[-1] and held is None and unit.role is not Role.LM_HEAD
        stream = _stream(plan) if last else None
        if unit.role is Role.EMBEDDING:
            if unit.format is not Format.FP32 or plan.stream is not Format.FP32:
                yield _Swap(name, LookupScope, {"dtype": _dtype(unit.format), "stream": _dtype(plan.stream)})
        elif unit.format is Format.FP8:
            settings = {"dtype": _dtype(plan.ambient), "stream": stream, "recipe": plan.fp8_recipe}
            yield _Swap(name, Fp8Scope, settings | {"emulate": emulated, "family": _family(plan)})
        elif _around(name, containers, root) is not unit.format and not _native(plan, unit, root):
            kind = GemmScope if _plain(leaf) else UnitScope
            yield _Swap(name, kind, {"dtype": _dtype(unit.format), "stream": stream})


def _native(plan: Plan, unit: PlanUnit, root: Format | None) -> bool:
    """Say whether a unit computes in its format with autocast off, because everything around it is stored so."""
    if root is not None:
        return False
    if plan.stream is not Format.FP32:
        return unit.format is plan.stream
    return unit.format is Format.FP32 and plan.formats == {Format.FP32}


def _containers(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, PlanUnit]:
    """Return the modules that can hold a scope for a whole unit, by path.

    A unit's smallest common module qualifies if no other unit has a leaf in it; for attention units also if none
    of the others is attention, since what is left (an FFN in the same block) brings its own scopes.
    """
    owners: dict[str, list[PlanUnit]] = {}
    for unit in plan.units:
        for name in unit.modules:
            for path in _ancestors(name):
                held = owners.setdefault(path, [])
                if not held or held[-1] is not unit:
                    held.append(unit)
    found: dict[str, PlanUnit] = {}
    for unit in plan.units:
        if len(unit.modules) < 2 or unit.format is Format.FP8 or unit.role is Role.EMBEDDING:
            continue
        path = _common(unit.modules)
        rivals = [o for o in owners[path] if o is not unit]
        if unit.role is Role.ATTENTION:
            rivals = [o for o in rivals if o.role not in (Role.FFN, Role.OTHER)]
        if not rivals and path not in found and not isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
            found[path] = unit
    return found


def _around(
    path: str, containers: Mapping[str, PlanUnit], root: Format | None, *, below: bool = False
) -> Format | None:
    """Return the format that the scopes around a module give (its own included, unless `below`).

    None is autocast off at the root: there every operation follows its operands.
    """
    for ancestor in _ancestors(path, itself=not below):
        if ancestor in containers:
            return containers[ancestor].format
    return root


def _ancestors(path: str, *, itself: bool = True) -> Iterator[str]:
    """Yield a module's path and those of its ancestors, innermost first, ending with the root's ''."""
    if itself:
        yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _common(paths: tuple[str, ...]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _plain(leaf: nn.Module) -> bool:
    """Say whether a leaf's forward is just its matmul or convolution, so that the scope may do it itself."""
    if type(leaf) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return True
    return type(leaf).__name__ == "Conv1D" and type(leaf).__module__ == "transformers.pytorch_utils"


def _dtype(choice: Format) -> torch.dtype:
    return torch_dtype(layout(choice))


def _stream(plan: Plan) -> torch.dtype | None:
    return None if plan.stream is Format.FP32 else _dtype(plan.stream)


def _family(plan: Plan) -> Fp8Family:
    """Return the FP8 layouts of the device a plan was made for; OCP where it is not a catalogued one."""
    try:
        return find_device(plan.device.name).fp8_family or Fp8Family.OCP
    except DeviceError:
        return Fp8Family.OCP
