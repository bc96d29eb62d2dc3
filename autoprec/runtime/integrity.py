"""Whether a plan is still in force on a model: checked before the first step, and when asked.

What may be put around a model after its plan (DDP, FSDP2, PEFT, `torch.compile`, checkpointing, deepcopy, pickle)
leaves the scopes where they are. What would undo them without a word is found here: a module replaced or quantized,
weights cast, a `forward` patched over a scope. Notes of what was found at `apply` lie on the root as plain data, so
that they travel with copies.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from autoprec.errors import PlanError
from autoprec.plan import Plan
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.sharding import sharding_conflict

__all__ = ["check_once", "not_in_force", "note", "patched_forward"]

#: classes of tensors that hold a parameter as it is: sharded, or seen by a compiler
_PLAIN = frozenset({"Tensor", "Parameter", "DTensor", "FakeTensor", "FunctionalTensor"})


def note(modules: Mapping[str, nn.Module], plan: Plan, scoped: Mapping[str, str]) -> None:
    """Write on the root what is in force: the plan, the kind of scope by module, and what each leaf is now."""
    leaves = {name: _kind_of(modules[name]) for unit in plan.units for name in unit.modules}
    modules[""].__dict__["_autoprec_notes"] = {"plan": plan, "scoped": dict(scoped), "leaves": leaves}


def check_once(root: Any) -> None:
    """Check a model's scopes at its first forward, and at that of each copy.

    Raises:
        PlanError: names the module that lost its scope or its weights' format, and the mend.
    """
    if torch.compiler.is_compiling():
        _check_while_tracing(id(root))
    elif root.__dict__.get("_autoprec_checked") != id(root):
        _check(root)
        root.__dict__["_autoprec_checked"] = id(root)


def _check_while_tracing(address: int) -> bool:
    _check(ctypes.cast(address, ctypes.py_object).value)
    return True


# Runs as plain Python while a graph is made, and leaves nothing in it. This is the mark that
# torch.compiler.assume_constant_result sets, without its import of the whole compiler. Up to torch 2.12 arguments must
# be constants, which a module is not but its address is; whoever traces it keeps it alive.
_check_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def not_in_force(model: nn.Module, plan: Plan) -> str | None:
    """Return why `plan` is not in force on `model` (wrapped or copied), None where it is."""
    root = canonical_modules(model)[""]
    notes = root.__dict__.get("_autoprec_notes")
    if notes is None:
        return f"no plan is in force on this {type(root).__name__}; call autoprec.apply(model, plan) first"
    wanted, held = _signature(plan), _signature(notes["plan"])
    if held != wanted:
        differing = [f"{k}: {v} in force, {wanted.get(k)} given" for k, v in held.items() if v != wanted.get(k)]
        return f"another plan is in force on this model ({'; '.join(differing[:3])}); remove() it, then apply this one"
    return next(_problems(root), None)


def _check(root: nn.Module) -> None:
    problem = next(_problems(root), None)
    if problem is not None:
        raise PlanError(problem)


def _problems(root: nn.Module) -> Iterator[str]:
    notes = root.__dict__.get("_autoprec_notes")
    if notes is None:
        return
    modules = canonical_modules(root)
    scoped = {m.__dict__["_autoprec_name"]: m for m in root.modules() if "_autoprec_name" in m.__dict__}
    for name, kind in notes["scoped"].items():
        held = scoped.get(name)
        if held is None or not any(c.__name__ == kind for c in type(held).__mro__):
            now = modules.get(name)
            what = f"is a {type(now).__name__} without it now" if now is not None else "is gone"
            yield (
                f"module '{name}' had the scope that gives its unit its format when the plan was applied, and {what}: "
                "it was replaced, converted or quantized since. Change the model first, then make and apply the plan."
            )
        elif name and patched_forward(held) and not _calls_scope(held):
            yield (
                f"module '{name}' got a forward of its own after the plan was applied ({patched_forward(held)}), which "
                "passes its scope by. Patch the model first, then apply the plan."
            )
    if conflict := sharding_conflict(modules, notes["plan"]):
        yield conflict
    sharded = any(type(m).__name__.startswith("FSDP") for m in root.modules())
    for name, before in notes["leaves"].items() if not sharded else ():
        inner = name
        while f"{inner}.base_layer" in modules:  # adapters stand around it, one for each of its parameters
            inner += ".base_layer"
        leaf = modules.get(inner)
        if leaf is None or leaf.__dict__.get("_modules", {}).keys() & {"original_module"}:
            continue
        if (after := _kind_of(leaf)) != before:
            yield (
                f"module '{name}' held {before} when the plan was applied and holds {after} now: the model was cast or "
                "quantized since. Do that first and apply the plan then, or leave the weights to the plan."
            )


def _kind_of(leaf: nn.Module) -> str:
    """Describe the storage of a leaf's weights: dtype, and class where it is none of torch's own."""
    found = []
    for parameter in leaf._parameters.values():
        if parameter is not None:
            kind = type(parameter.data).__name__
            held = "" if kind in _PLAIN else f" in a {kind}"
            found.append(f"{str(parameter.dtype).removeprefix('torch.')}{held}")
    return " and ".join(sorted(set(found)))


def patched_forward(module: nn.Module) -> str | None:
    """Return the name of a `forward` set on the instance, which hides that of any class; None where there is none."""
    patch = module.__dict__.get("forward")
    if patch is None:
        return None
    return str(getattr(patch, "__qualname__", None) or type(patch).__name__)


def _calls_scope(module: nn.Module) -> bool:
    """Say whether a patched forward holds on to the scope's own, as wrappers that call it do."""
    seen: set[int] = set()
    todo = [module.__dict__["forward"], *(module.__dict__.get(k) for k in ("_old_forward", "_original_forward"))]
    while todo:
        item = todo.pop()
        if item is None or id(item) in seen or len(seen) > 100:
            continue
        seen.add(id(item))
        if isinstance(item, MethodType):
            if item.__self__ is module and item.__func__ is getattr(type(module), "forward", None):
                return True
            todo.append(item.__func__)
        if isinstance(item, functools.partial):
            todo += [item.func, *item.args]
        todo.append(getattr(item, "__wrapped__", None))
        for cell in getattr(item, "__closure__", None) or ():
            todo.append(cell.cell_contents)
    return False


def _signature(plan: Plan) -> dict[str, str]:
    settings = {"model": plan.model.fingerprint, "ambient": plan.ambient, "stream": plan.stream}
    settings |= {"fp8_recipe": str(plan.fp8_recipe), "tf32": str(plan.tf32)}
    return {key: str(value) for key, value in (settings | dict(plan.assignment)).items()}
