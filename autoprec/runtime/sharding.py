"""What a distributed wrapper's own mixed precision would do to a plan, told before a step is spent on it.

DDP and FSDP2 with their default policies hand every module its weights as they are stored, and scopes do the rest.
A wrapper told to lower precision itself does so before a scope sees weights or inputs: what was rounded there no
scope can widen again. Nothing is imported for this: a model that is sharded brought its wrapper with it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoprec.formats import Format, layout
from autoprec.plan import Plan, PlanUnit
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.identity import canonical_modules

__all__ = ["ddp_around", "flattened", "sharding_conflict"]

_PLAIN = "MixedPrecisionPolicy(reduce_dtype=torch.float32) without param_dtype"
_WIDE = "MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)"


@dataclass(frozen=True, slots=True)
class _Sharded:
    """Modules that FSDP2 shards together, with their policy; `name` is the first one's."""

    name: str
    modules: tuple[nn.Module, ...]
    policy: Any
    groups: tuple[Any, ...]

    def __str__(self) -> str:
        return f"fully_shard of '{self.name}'" if self.name else "fully_shard of the model"


def sharding_conflict(modules: Mapping[str, nn.Module], plan: Plan) -> str | None:
    """Return what in the distributed wrapping of a model spoils `plan`, with the mend, or None.

    Args:
        modules: all modules by name, '' the root, with or without wrappers around it (a root-only FSDP1 wrapper is
            seen as such only if it is among them).
        plan: a plan that fits the model.
    """
    root = modules[""]
    every = {id(m): m for m in (*modules.values(), *root.modules())}.values()
    if found := _ddp_conflict(root, every, plan):
        return found
    names = {id(module): name for name, module in canonical_modules(root).items()}
    owner = _Owner(names, {name: unit for unit in plan.units for name in unit.modules})
    if found := _fsdp1_conflict(every, owner):
        return found
    states = tuple(_sharded(every, names))
    found = _storage_conflict(states, plan, owner) or _weights_conflict(states, plan, owner)
    return found or next(filter(None, (_values_conflict(s, plan, owner) for s in states)), None)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Finds the unit of a module."""

    names: Mapping[int, str]
    units: Mapping[str, PlanUnit]

    def of(self, module: nn.Module) -> PlanUnit | None:
        """Return the unit of a module or of the nearest one around it; None outside units."""
        path = self.names.get(id(module))
        while path:
            if path in self.units:
                return self.units[path]
            path = path.rpartition(".")[0]
        return None

    def within(self, modules: Iterable[nn.Module]) -> tuple[list[PlanUnit], bool]:
        """Return the units with a leaf in `modules`, and whether anything else in there owns parameters."""
        units: dict[str, PlanUnit] = {}
        others = False
        for module in (inner for outer in modules for inner in outer.modules()):
            unit = self.of(module)
            if unit is not None:
                units[unit.name] = unit
            elif any(p is not None for p in module._parameters.values()):
                others = True
        return list(units.values()), others


# FSDP2


def _sharded(modules: Iterable[nn.Module], names: Mapping[int, str]) -> Iterator[_Sharded]:
    seen: set[int] = set()
    for module in modules:
        state_of = getattr(module, "_get_fsdp_state", None)
        if state_of is None:
            continue
        state = state_of()
        if id(state) in seen:
            continue
        seen.add(id(state))
        members = tuple(getattr(state, "_modules", ())) or (module,)
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before groups in the plural
            groups = [g for g in (state._fsdp_param_group,) if g is not None]
        yield _Sharded(_name(members[0], names), members, state._mp_policy, tuple(groups))


def _name(module: nn.Module, names: Mapping[int, str]) -> str:
    """Return a module's canonical name; that of what it stands around for a wrapper."""
    return next((names[id(inner)] for inner in module.modules() if id(inner) in names), "")


def _storage_conflict(states: Iterable[_Sharded], plan: Plan, owner: _Owner) -> str | None:
    """Say whether a plan that stores weights low meets FP32 shards, which nothing outside FSDP2 can lower."""
    if plan.stream is Format.FP32:
        return None
    for state in states:
        for held in (param for group in state.groups for param in group.fsdp_params):
            unit = owner.of(held._module_info.module)
            lowered = unit is None or unit.format is plan.stream
            if lowered and held.sharded_param.dtype is torch.float32:
                return (
                    f"the plan stores weights in {plan.stream}, and {state} holds them in fp32 already. Apply the plan "
                    f"before fully_shard, or load the model with dtype={torch_dtype(layout(plan.stream))}"
                )
    return None


def _weights_conflict(states: Iterable[_Sharded], plan: Plan, owner: _Owner) -> str | None:
    """Return which units would get weights that are rounded to another format than theirs."""
    spoiled: dict[str, tuple[PlanUnit, _Sharded, torch.dtype]] = {}
    for state in states:
        for group in state.groups:
            dtype = group.mp_policy.param_dtype
            for held in group.fsdp_params if dtype is not None else ():
                info = held._module_info
                for module in (info.module, *info.shared_modules):
                    unit = owner.of(module)
                    if unit is not None and _spoils(dtype, held.sharded_param.dtype, unit, plan):
                        spoiled.setdefault(unit.name, (unit, state, dtype))
    if not spoiled:
        return None
    unit, state, dtype = next(iter(spoiled.values()))
    leaves = [name for other, *_ in spoiled.values() for name in other.modules]
    return (
        f"{state} has param_dtype={dtype}, so it gathers weights in {_short(dtype)}, and {_units(spoiled)} in "
        f"another format (first '{unit.name}', in {unit.format}: {_harm(unit, dtype)}). Shard with {_PLAIN}, or give "
        f"those modules a fully_shard of their own before what is around them is sharded, each with mp_policy={_WIDE}: "
        f"{_listed(leaves)}"
    )


def _spoils(dtype: torch.dtype, stored: torch.dtype, unit: PlanUnit, plan: Plan) -> bool:
    if dtype is stored or not stored.is_floating_point:
        return False
    if dtype.itemsize > stored.itemsize:  # no bit is lost; but where all is stored low, nothing casts back
        return plan.stream is not Format.FP32
    return _dtype(unit) is not dtype


def _harm(unit: PlanUnit, dtype: torch.dtype) -> str:
    if dtype is torch.float32:
        return "the plan computes in what it stores, without autocast"
    if unit.format is Format.FP32:
        return "bits it needs are lost before it runs"
    return f"its weights would be rounded twice, to {_short(dtype)} first"


def _values_conflict(state: _Sharded, plan: Plan, owner: _Owner) -> str | None:
    """Return what casts of inputs and outputs at the edge of a sharded module do to the plan."""
    policy, (units, others) = state.policy, owner.within(state.modules)
    if not units:
        return None
    whole = len(units) == len(plan.units)
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        if whole:
            harmed = _entry_harmed(plan, policy.param_dtype)
        else:
            harmed = _edge_harmed(units, others, plan, policy.param_dtype)
        if harmed:
            return (
                f"{state} has param_dtype={policy.param_dtype} and casts its float inputs to it, {harmed}; add "
                f"cast_forward_inputs=False to its MixedPrecisionPolicy, or shard with {_PLAIN}"
            )
    if policy.output_dtype is not None:
        harmed = _edge_harmed(units, others, plan, policy.output_dtype)
        if whole:
            low = policy.output_dtype.itemsize < 4
            harmed = "whose loss and logits the plan leaves as autocast does" if low else None
        if harmed:
            return (
                f"{state} has output_dtype={policy.output_dtype}, {harmed}; leave output_dtype out of its "
                "MixedPrecisionPolicy"
            )
    return None


def _edge_harmed(units: list[PlanUnit], others: bool, plan: Plan, dtype: torch.dtype) -> str | None:
    """Return what a cast to `dtype` at the edge of a module with these units spoils."""
    if len(units) == 1 and not others:  # operands and result of one unit, the stream is outside
        unit = units[0]
        if _dtype(unit) is dtype or (dtype is torch.float32 and plan.stream is Format.FP32):
            return None
        return f"and unit '{unit.name}' computes in {unit.format}"
    stream = torch_dtype(layout(plan.stream))
    return None if stream is dtype else f"and the plan's residual stream, which passes there, is {plan.stream}"


def _entry_harmed(plan: Plan, dtype: torch.dtype) -> str | None:
    """Return which unit a cast of the model's own float inputs spoils; token ids are not cast."""
    if plan.stream is not Format.FP32 or dtype.itemsize >= 4:
        return None
    first = plan.units[0]
    entries = [u for u in plan.units if u.role == "conv" or (u is first and u.role != "embedding")]
    wrong = next((u for u in entries if _dtype(u) is not dtype), None)
    return f"and unit '{wrong.name}', which may read them, computes in {wrong.format}" if wrong else None


# the others


def ddp_around(root: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """Return the DDP wrappers around a model, of which the model itself knows nothing."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    found = (m for m in gc.get_objects() if type(m) is nn.parallel.DistributedDataParallel)
    return [m for m in found if any(inner is root for inner in m.modules())]


def _ddp_conflict(root: nn.Module, modules: Iterable[nn.Module], plan: Plan) -> str | None:
    """Say whether DDP was given its private `mixed_precision`, or holds weights whose dtype the plan would change."""
    wrappers = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
    if plan.stream is not Format.FP32:  # else nothing that DDP holds is changed, and no wrapper need be looked for
        wrappers += ddp_around(root)
    wide = any(p.dtype is torch.float32 for m in wrappers for p in m.parameters())
    if wide and plan.stream is not Format.FP32 and any(u.format is plan.stream for u in plan.units):
        return (
            f"the plan stores weights in {plan.stream}, and DistributedDataParallel has its hooks on the fp32 ones: "
            "gradients would not be averaged any more. Apply the plan before DistributedDataParallel(model), or load "
            f"the model with dtype={torch_dtype(layout(plan.stream))}"
        )
    given = any(m.mixed_precision is not None for m in wrappers)
    if given or any(hasattr(p, "_mp_param") for p in root.parameters()):
        return (
            "DistributedDataParallel has mixed_precision set, which replaces all weights by low-precision copies "
            "before any unit runs; wrap with DistributedDataParallel(model) and leave precision to the plan"
        )
    return None


def flattened(model: nn.Module) -> str | None:
    """Return what to do about FSDP1's flat parameters, in which no layer has a weight of its own; None without them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel) and not module._use_orig_params:  # type: ignore[union-attr]
            return (
                "FullyShardedDataParallel has flattened the weights, so no layer owns one whose format a plan could "
                f"choose; pass use_orig_params=True, or shard with fully_shard (FSDP2) and {_PLAIN}"
            )
    return None


def _fsdp1_conflict(modules: Iterable[nn.Module], owner: _Owner) -> str | None:
    """Say whether FSDP1 lowers weights, by its policy or, where its wrapper is out of sight, by what arrived."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    mend = f"leave mixed_precision out, or shard with fully_shard (FSDP2) and {_PLAIN}"
    for module in modules:
        if isinstance(module, fsdp.FullyShardedDataParallel):
            policy = module.mixed_precision
            lowered = {n: d for n in ("param_dtype", "buffer_dtype") if (d := getattr(policy, n)) is not None}
            if any(dtype is not torch.float32 for dtype in lowered.values()):
                given = ", ".join(f"{name}={dtype}" for name, dtype in lowered.items())
                return (
                    f"FullyShardedDataParallel has MixedPrecision({given}), which rounds all it holds before any unit "
                    f"runs; {mend}"
                )
    for module in modules:
        if not getattr(module, "_is_fsdp_managed_module", False):
            continue
        # not by attribute: a parametrized weight would be computed, before FSDP is ready for any forward
        unit, weight = owner.of(module), module._parameters.get("weight", vars(module).get("weight"))
        if unit is None or unit.format is not Format.FP32 or not isinstance(weight, torch.Tensor):
            continue
        if weight.is_floating_point() and weight.dtype.itemsize < 4:
            return (
                f"FSDP hands unit '{unit.name}' its weights in {_short(weight.dtype)}, and it computes in fp32: bits "
                f"it needs are lost before it runs; {mend}"
            )
    return None


# words


def _dtype(unit: PlanUnit) -> torch.dtype | None:
    """Return the dtype that holds a unit's operands; None for FP8, whose scales come from the stored weights."""
    return None if unit.format is Format.FP8 else torch_dtype(layout(unit.format))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _units(units: Mapping[str, object]) -> str:
    return "1 unit computes" if len(units) == 1 else f"{len(units)} units compute"


def _listed(names: list[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
