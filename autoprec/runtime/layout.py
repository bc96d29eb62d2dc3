"""Which scopes a plan needs on a model: decided first, as a list of swaps.

One ambient scope at the root, one scope at the root of each subtree that holds a whole unit, and scopes on single
leaves where a unit shares its subtree with others. An attention unit always gets the smallest module around it,
because the scaled dot product in between belongs to it. Where the surroundings already give a unit its format there
is no scope at all, so a uniform plan costs one. Modules that multiply several weights in one forward (experts,
MultiheadAttention, packed layers) have kinds of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoprec.catalog import find_device
from autoprec.errors import DeviceError
from autoprec.formats import Format, Fp8Family, layout
from autoprec.plan import Plan, PlanUnit
from autoprec.records import Role
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.scope import (
    AmbientScope,
    AttentionScope,
    ExpertsScope,
    Fp8Scope,
    GemmScope,
    LookupScope,
    QuantizedScope,
    Scope,
    TargetScope,
    UnitScope,
)

__all__ = ["Swap", "common_path", "holders", "holds_experts", "is_packed", "swaps_of", "swaps_of_units"]


@dataclass(frozen=True, slots=True)
class Swap:
    """One module to be given a scope."""

    module: str
    kind: type[Scope]
    settings: Mapping[str, Any]


def is_packed(leaf: nn.Module) -> bool:
    """Say whether a linear leaf stores its weight packed in integers, as 4- and 8-bit layers do."""
    weight = leaf._parameters.get("weight") if isinstance(leaf, nn.Linear) else None
    return weight is not None and not weight.is_floating_point()


def holds_experts(leaf: nn.Module) -> bool:
    """Say whether a leaf owns 3-D parameters, one matrix an expert."""
    return (
        not isinstance(leaf, nn.Linear | nn.modules.conv._ConvNd)
        and any(p is not None and p.dim() == 3 for p in leaf._parameters.values())
        and not isinstance(leaf, nn.MultiheadAttention)
    )


def swaps_of(plan: Plan, modules: Mapping[str, nn.Module], emulated: bool, *, as_cuda: bool = False) -> Iterator[Swap]:
    """Yield every swap that puts `plan` in force.

    Args:
        emulated: FP8 is.
        as_cuda: this device is to widen and round what CUDA does.
    """
    root = _root(plan)
    if as_cuda:
        yield from (Swap(path, TargetScope, {"tf32": plan.tf32}) for path in ("", *_blocks(modules)))
    uniform = all(u.format is plan.ambient for u in plan.units if u.role is not Role.EMBEDDING)
    yield from swaps_of_units(plan, plan.units, modules, holders(plan, modules), emulated, uniform=uniform)
    yield Swap("", AmbientScope, {"ambient": _dtype(root) if root else None})


def _blocks(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the paths of repeated blocks: the items of lists."""
    for path in modules:
        above = path.rpartition(".")[0]
        if path and isinstance(modules.get(above), nn.ModuleList) and not isinstance(modules[path], nn.ModuleList):
            yield path


def swaps_of_units(
    plan: Plan,
    units: Sequence[PlanUnit],
    modules: Mapping[str, nn.Module],
    containers: Mapping[str, PlanUnit],
    emulated: bool,
    *,
    uniform: bool = False,
) -> Iterator[Swap]:
    """Yield the swaps of some units, with the ambient, stream and recipe of `plan`; the root's own is not among them.

    Args:
        containers: what `holders` gives for the whole plan; a unit in FP8 is none.
        uniform: every unit has the ambient format, so that experts run as autocast runs them.
    """
    root, own, fp8 = _root(plan), {id(unit) for unit in units}, {}
    if any(unit.format is Format.FP8 for unit in units):
        fp8 = {"recipe": plan.fp8_recipe, "emulate": emulated, "family": _family(plan)}
    for unit in units:
        yield from _unit_swaps(plan, unit, modules, containers, root, fp8, uniform)
    for path, unit in containers.items():
        if id(unit) not in own:
            continue
        if _around(path, containers, root, below=True) is not unit.format and not _native(plan, unit, root):
            settings = {"dtype": _dtype(unit.format), "stream": _handed_on(plan, unit)}
            yield Swap(path, UnitScope, settings)


def _root(plan: Plan) -> Format | None:
    """Return the format of autocast at the root, None where it is off.

    Where everything is stored in the ambient format there is nothing for autocast to do, as with `model.to()`.
    """
    stored = plan.stream is plan.ambient is not Format.FP32
    return None if plan.ambient is Format.FP32 or stored else plan.ambient


def _unit_swaps(
    plan: Plan,
    unit: PlanUnit,
    modules: Mapping[str, nn.Module],
    containers: Mapping[str, PlanUnit],
    root: Format | None,
    fp8: Mapping[str, Any],
    uniform: bool,
) -> Iterator[Swap]:
    """Yield the leaf scopes of a unit: those whose surroundings do not give the unit's format."""
    held = containers.get(common_path(unit.modules)) is unit
    foreign = plan.stream is Format.FP32 and _handed_on(plan, unit) is not None
    for name in unit.modules:
        leaf = modules[name]
        # the last leaf of a unit writes to the stream; a container does that for its unit itself. Between the leaves of
        # an FFN there are elementwise functions only, between others there may be what needs operands of one format
        ends = (name == unit.modules[-1] or (foreign and unit.role is not Role.FFN)) and not held
        stream = _handed_on(plan, unit) if ends and unit.role is not Role.LM_HEAD else None
        if unit.role is Role.EMBEDDING:
            if unit.format is not Format.FP32 or plan.stream is not Format.FP32:
                yield Swap(name, LookupScope, {"dtype": _dtype(unit.format), "stream": _dtype(plan.stream)})
        elif unit.format is Format.FP8:
            if not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
                yield Swap(name, _fp8_kind(leaf), {"dtype": _dtype(plan.ambient), "stream": stream, **fp8})
        elif is_packed(leaf):
            yield Swap(name, QuantizedScope, {"dtype": _dtype(unit.format), "stream": stream})
        elif holds_experts(leaf):
            # in a uniform plan they run as autocast runs them; elsewhere what autocast does not know is cast here
            if not uniform and not (unit.format is Format.FP32 is _around(name, containers, root)):
                yield Swap(name, ExpertsScope, {"dtype": _dtype(unit.format), "stream": stream, "recipe": None})
        elif _around(name, containers, root) is not unit.format and not _native(plan, unit, root):
            kind = GemmScope if _plain(leaf) else UnitScope
            yield Swap(name, kind, {"dtype": _dtype(unit.format), "stream": stream})


def _fp8_kind(leaf: nn.Module) -> type[Scope]:
    if isinstance(leaf, nn.MultiheadAttention):
        return AttentionScope
    return ExpertsScope if holds_experts(leaf) else Fp8Scope


def _native(plan: Plan, unit: PlanUnit, root: Format | None) -> bool:
    """Say whether a unit computes in its format with autocast off, because everything around it is stored so."""
    if root is not None:
        return False
    if plan.stream is not Format.FP32:
        return unit.format is plan.stream
    return unit.format is Format.FP32 and plan.formats == {Format.FP32}


def holders(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, PlanUnit]:
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
        path = common_path(unit.modules)
        rivals = [o for o in owners[path] if o is not unit]
        if unit.role is Role.ATTENTION:
            rivals = [o for o in rivals if o.role not in (Role.FFN, Role.OTHER)]
        # a list is never called itself, so nothing would run in its scope
        if not rivals and path not in found and type(modules[path]).forward is not nn.Module.forward:
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


def common_path(paths: tuple[str, ...]) -> str:
    """Return the path of the innermost module that several are in, '' for the root."""
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


def _handed_on(plan: Plan, unit: PlanUnit) -> torch.dtype | None:
    """Return the dtype of what a unit hands on, None for that of its own result.

    A low format that is not the ambient's is widened, which loses nothing: autocast raises where FP16 meets BF16 in
    one operation, as in `torch.cat`, and without autocast operands of two types cannot be multiplied.
    """
    if plan.stream is not Format.FP32:
        return _dtype(plan.stream)
    foreign = unit.format in (Format.BF16, Format.FP16) and unit.format is not plan.ambient
    return torch.float32 if foreign else None


def _family(plan: Plan) -> Fp8Family:
    """Return the FP8 layouts of the device a plan was made for; OCP where it is not a catalogued one."""
    try:
        return find_device(plan.device.name).fp8_family or Fp8Family.OCP
    except DeviceError:
        return Fp8Family.OCP
