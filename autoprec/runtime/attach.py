"""`apply`: put a plan in force on a model, in place, and take it off again.

Everything is checked first, the swaps are decided (`layout`), then done at once or not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from autoprec.errors import DeviceError, PlanError
from autoprec.formats import Format
from autoprec.plan import Plan, PlanUnit, check_modules
from autoprec.runtime.fp8 import fp8_misaligned, fp8_missing
from autoprec.runtime.identity import aliases, canonical_modules, fingerprint
from autoprec.runtime.integrity import note, patched_forward
from autoprec.runtime.layout import Swap, holds_experts, is_packed, swaps_of
from autoprec.runtime.scope import Scope, enter_scope, leave_scope
from autoprec.runtime.sharding import ddp_around, flattened, sharding_conflict
from autoprec.runtime.storage import LoweredStorage, lower_storage
from autoprec.runtime.switches import COMPILED_BACKWARD_AS_EAGER, FAST_ATTENTION_OFF
from autoprec.runtime.tf32 import tf32_set

__all__ = ["Applied", "applied", "apply"]


@dataclass(eq=False)
class Applied:
    """A plan in force on a model; `remove()` takes it off and restores the model and every global switch."""

    model: nn.Module
    plan: Plan
    emulate: bool
    _swaps: tuple[Swap, ...]
    _modules: Mapping[str, nn.Module]
    _storage: LoweredStorage | None = None
    _switches: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _attached: bool = False

    def remove(self) -> None:
        """Restore classes, storage and switches; what training changed meanwhile is kept.

        Raises:
            PlanError: the plan was removed before; or it stores weights low and the model was sharded or wrapped since.
        """
        if not self._attached:
            raise PlanError("this plan is not in force any more: it was removed before")
        self._check_storage()
        self._detach()

    def _check_storage(self) -> None:
        """Check that the weights a plan stores low are where it left them, so that their FP32 bits can come back."""
        if self._storage is None:
            return
        what = None
        if name := self._storage.replaced(self.model):
            what = f"its parameters were replaced since (first '{name}'), as fully_shard does"
        elif ddp_around(self._modules[""]):
            what = "DistributedDataParallel was put around it since, and holds them as they are"
        if what:
            raise PlanError(
                f"the plan stores the weights of this {type(self.model).__name__} in {self.plan.stream}, and {what}: "
                "their fp32 bits cannot be put back. Remove the plan before wrapping the model, or keep it and build "
                "a new model from the state_dict."
            )

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
                enter_scope(self._modules[swap.module], swap.kind, name=swap.module, **swap.settings)
            note(self._modules, self.plan, {swap.module: swap.kind.__name__ for swap in self._swaps})
            self._switches.enter_context(COMPILED_BACKWARD_AS_EAGER)
            if any(isinstance(m, nn.MultiheadAttention) for m in self._modules.values()):
                self._switches.enter_context(FAST_ATTENTION_OFF)
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
            up to the order of summation, none of the speed. A plan made for a CUDA device, on another, runs softmax,
            norms and losses in FP32 as CUDA's autocast does, and FP32 products in TF32 where the plan has it on.

    Raises:
        PlanError: the plan does not fit the model, is in force already, or asks for what its weights cannot give.
        DeviceError: the device lacks a format of the plan and `emulate` is off.
    """
    modules = canonical_modules(model)
    if flat := flattened(model):
        raise PlanError(flat)
    _check_fits(model, plan, modules)
    emulated = _check_device(model, plan, modules, emulate)
    as_cuda = emulate and plan.device.kind == "cuda" and "cuda" not in _devices(model)
    swaps = tuple(swaps_of(plan, modules, emulated, as_cuda=as_cuda))
    _check_forwards(swaps, modules)
    if conflict := sharding_conflict(dict(model.named_modules()), plan):  # wrappers among them
        raise PlanError(conflict)
    storage = lower_storage(model, plan, modules) if plan.stream is not Format.FP32 else None
    handle = Applied(
        model=model,
        plan=plan,
        emulate=emulate,
        _swaps=swaps,
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
    _check_names(model, plan, modules)
    if fingerprint(model) != plan.model.fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.id} ({plan.model.class_name}), and this {type(model).__name__} differs "
            "in its modules, shapes or ties. Make a plan for this model: autoprec recommend, or Plan.uniform(model, …)."
        )
    for unit in plan.units:
        for name in unit.modules:
            _check_leaf(unit, name, modules[name])


def _check_names(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    named = [name for unit in plan.units for name in unit.modules]
    if any(name not in modules for name in named):
        second = aliases(model)
        for name in named:
            if name in second:
                raise PlanError(
                    f"the plan names module '{name}', which is another name of '{second[name]}': one module has one "
                    f"format. Name it '{second[name]}' in the plan."
                )
    check_modules(plan, modules)


def _check_leaf(unit: PlanUnit, name: str, leaf: nn.Module) -> None:
    own = [p for p in leaf._parameters.values() if p is not None]
    if not own and not nn.utils.parametrize.is_parametrized(leaf):
        raise PlanError(f"unit '{unit.name}': {name} is a {type(leaf).__name__} without a weight of its own")
    low = [p for p in own if p.dtype in (torch.bfloat16, torch.float16)]
    if unit.format is Format.FP32 and low and not is_packed(leaf):
        raise PlanError(
            f"unit '{unit.name}' is to compute in fp32, but {name} holds {str(low[0].dtype).removeprefix('torch.')} "
            "weights, whose lost bits no plan can bring back. Load the model with dtype=torch.float32."
        )
    if unit.format is Format.FP8 and (is_packed(leaf) or isinstance(leaf, nn.modules.conv._ConvNd)):
        what = "its weight is packed in integers" if is_packed(leaf) else "no FP8 convolution kernel exists in PyTorch"
        raise PlanError(f"unit '{unit.name}' cannot take fp8: {name} is a {type(leaf).__name__}, and {what}. Use bf16.")


def _check_forwards(swaps: tuple[Swap, ...], modules: Mapping[str, nn.Module]) -> None:
    for swap in swaps:
        if patch := patched_forward(modules[swap.module]):
            where = f"module '{swap.module}'" if swap.module else "the model"
            raise PlanError(
                f"{where} has a forward set on the instance ({patch}), which hides that of any class, so no plan could "
                "act there. Apply the plan first, and prepare, dispatch or patch the model afterwards."
            )


def _check_device(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module], emulate: bool) -> bool:
    """Return whether FP8 is to be emulated."""
    devices = tuple(dict.fromkeys(str(p.device) for p in model.parameters()))
    if len(devices) > 1:
        raise PlanError(
            f"the weights are on several devices ({', '.join(devices)}); move the model to one, or shard it (FSDP2)"
        )
    units = [u for u in plan.units if u.format is Format.FP8]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    missing = fp8_missing(device)
    if units and not missing:
        for unit in units:
            for name in unit.modules:
                _check_fp8(unit, name, modules[name], emulate)
    if units and missing and not emulate:
        raise DeviceError(
            f"{missing}; the plan has fp8 in {len(units)} units (first '{units[0].name}'). Try a plan for this device "
            "(autoprec recommend MODEL), or emulate=True (--emulate) for FP8's numbers without its speed."
        )
    low = {plan.ambient, plan.stream, *plan.formats}
    if device.type == "cuda" and Format.BF16 in low and not torch.cuda.is_bf16_supported():
        raise DeviceError(f"{torch.cuda.get_device_name(device)} cannot compute in bf16; recommend a plan for it")
    return bool(missing)


def _devices(model: nn.Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.device.type for p in model.parameters()))


def _check_fp8(unit: PlanUnit, name: str, leaf: nn.Module, emulate: bool) -> None:
    """Check that the device's FP8 kernels take a leaf."""
    if holds_experts(leaf):
        if not emulate:
            raise DeviceError(
                f"unit '{unit.name}': {name} holds its experts in 3-D parameters, for which torchao has no stable FP8 "
                "kernel. Give the unit bf16, or emulate=True (--emulate) for FP8's numbers without its speed."
            )
        return
    for weight in (p for p in leaf._parameters.values() if p is not None and p.dim() == 2):
        rows, columns = weight.shape
        outputs, inputs = (columns, rows) if type(leaf).__name__ == "Conv1D" else (rows, columns)
        if wrong := fp8_misaligned(inputs, outputs):
            raise PlanError(f"unit '{unit.name}': {name} cannot take fp8: {wrong}")
