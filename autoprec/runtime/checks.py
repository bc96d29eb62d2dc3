"""What is checked before a plan is put in force: that it fits the model, its weights, what stands around, the device.

Nothing is changed here, so that `apply` can do all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from autoprec.errors import DeviceError, PlanError
from autoprec.formats import Format, layout
from autoprec.plan import Plan, PlanUnit, check_modules
from autoprec.records import Mode
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.fp8 import fp8_misaligned, fp8_missing
from autoprec.runtime.identity import aliases, fingerprint
from autoprec.runtime.integrity import patched_forward
from autoprec.runtime.layout import Swap, holds_experts, is_packed
from autoprec.runtime.scope import Scope

__all__ = ["check_device", "check_fits", "check_forwards", "check_leaves", "check_trained", "lost_updates"]

_LOW = (torch.bfloat16, torch.float16)


def check_fits(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Check that the plan was made for this model and that no plan is in force on it."""
    if any(isinstance(module, Scope) for module in modules.values()):
        raise PlanError("a plan is in force on this model already; remove() it first")
    _check_names(model, plan, modules)
    if fingerprint(model) != plan.model.fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.id} ({plan.model.class_name}), and this {type(model).__name__} differs "
            "in its modules, shapes or ties. Make a plan for this model: autoprec recommend, or Plan.uniform(model, …)."
        )


def check_leaves(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Check that each leaf can compute in its unit's format with the weights it holds."""
    for unit in plan.units:
        for name in unit.modules:
            _check_leaf(unit, name, modules[name])


def check_trained(model: nn.Module, plan: Plan) -> None:
    """Check that what a training plan holds in FP32 is FP32: Transformers 5 loads a checkpoint in its own format.

    An optimizer then adds updates to 16-bit weights and most of them are lost, or a gradient scaler refuses them.
    Frozen weights, and those of a plan that stores everything low (`Plan.cast`), are not meant.
    """
    if plan.mode is not Mode.TRAIN or plan.stream is not Format.FP32:
        return
    low = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.dtype in _LOW]
    if not low:
        return
    name, dtype = low[0][0], low[0][1].dtype
    kind = str(dtype).removeprefix("torch.")
    if plan.grad_scaler is not None and kind == "float16":
        harm = "the plan's fp16 units need a gradient scaler, which cannot unscale fp16 gradients"
    else:
        harm = f"an update smaller than {_lost(dtype)} of a weight is lost: there are no fp32 master copies"
    raise PlanError(
        f"{len(low)} of the weights to be trained are stored in {kind} (first '{name}'), and {harm}. Load the model "
        "with dtype=torch.float32 (the plan does the casting), freeze what is not to be trained, choose storage='bf16-"
        "master' or 'bf16-stochastic' with its optimizer, or for inference make the plan with mode='infer'."
    )


def lost_updates(model: nn.Module, plan: Plan) -> str | None:
    """Return a warning where weights to be trained are stored low without copies, as by `Plan.cast`."""
    trained = plan.mode is Mode.TRAIN and any(p.requires_grad for p in model.parameters())
    if not trained or plan.stream is Format.FP32:
        return None
    low = torch_dtype(layout(plan.stream))
    return (
        f"the plan stores weights that are to be trained in {plan.stream}, without fp32 copies: an update smaller than "
        f"{_lost(low)} of a weight is lost. Plan.uniform(model, '{plan.stream}') keeps fp32 weights or, with storage="
        "'bf16-stochastic' and runtime.optimizers.stochastic_adamw, rounds updates at random. For inference make the "
        "plan with mode='infer'."
    )


def _lost(dtype: torch.dtype) -> str:
    """Return half a step of a dtype, relative to a weight just under a power of two: what is smaller is always lost."""
    return f"1/{round(4 / torch.finfo(dtype).eps)}"


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
    low = [p for p in own if p.dtype in _LOW]
    if unit.format is Format.FP32 and low and not is_packed(leaf):
        raise PlanError(
            f"unit '{unit.name}' is to compute in fp32, but {name} holds {str(low[0].dtype).removeprefix('torch.')} "
            "weights, whose lost bits no plan can bring back. Load the model with dtype=torch.float32."
        )
    if unit.format is Format.FP8 and (is_packed(leaf) or isinstance(leaf, nn.modules.conv._ConvNd)):
        what = "its weight is packed in integers" if is_packed(leaf) else "no FP8 convolution kernel exists in PyTorch"
        raise PlanError(f"unit '{unit.name}' cannot take fp8: {name} is a {type(leaf).__name__}, and {what}. Use bf16.")


def check_forwards(swaps: Iterable[Swap], modules: Mapping[str, nn.Module]) -> None:
    """Check that no module to be given a scope has a forward of its own, which would hide the scope's."""
    for swap in swaps:
        if patch := patched_forward(modules[swap.module]):
            where = f"module '{swap.module}'" if swap.module else "the model"
            raise PlanError(
                f"{where} has a forward set on the instance ({patch}), which hides that of any class, so no plan could "
                "act there. Apply the plan first, and prepare, dispatch or patch the model afterwards."
            )


def check_device(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module], emulate: bool) -> bool:
    """Check that the device can do what the plan asks for; return whether FP8 is to be emulated."""
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
