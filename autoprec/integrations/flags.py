"""TrainingArguments and a plan: what contradicts, and the flags and scaler that a plan needs around it.

The Trainer knows one format for the whole model. With a plan in force its `bf16` and `fp16` only decide what happens
around the model: outputs widened to FP32, and for FP16 a gradient scaler with gradients unscaled before clipping.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.state import AcceleratorState

from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = ["check_arguments", "set_scaler", "with_flags"]


def check_arguments(args: Any, plan: Plan) -> None:
    """Check that nothing the user set in TrainingArguments works against the plan.

    Raises:
        PlanError: names the argument and the mend.
    """
    if plan.mode is not Mode.TRAIN:
        raise PlanError(
            "the plan was made for inference, and training asks for more of a format. Make one for training: "
            "autoprec search MODEL --mode train, or Plan.uniform(model, …, mode='train')."
        )
    if getattr(args, "deepspeed", None):
        raise PlanError(
            "DeepSpeed's bf16 and fp16 sections cast the parameters themselves, so that no unit could stay in fp32. "
            "Use autoprec.apply with DeepSpeed's torch_autocast section, or FSDP2."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            raise PlanError(
                f"{name}=True casts the whole model before an evaluation, and the plan with it. Leave it out: an "
                "evaluation runs in the plan's formats."
            )
    wanted = plan.training_arguments
    for name in ("bf16", "fp16"):
        if getattr(args, name, False) and not wanted.get(name):
            raise PlanError(f"{name}=True does not go with this plan: {_why(name, args, plan)} Leave {name} out.")
    tf32 = getattr(args, "tf32", None)
    if tf32 is not None and args.device.type == "cuda" and tf32 != plan.tf32:
        raise PlanError(f"tf32={tf32} in the arguments, and {plan.tf32} in the plan. Leave it out: the plan sets it.")


def _why(name: str, args: Any, plan: Plan) -> str:
    if name == "bf16" and plan.grad_scaler is not None:
        low = [u.name for u in plan.units if u.format is Format.FP16]
        where = f"'{low[0]}'" if low else "its ambient"
        return f"it has fp16 ({where}), which needs a gradient scaler, and under bf16 the Trainer has none."
    if name == "fp16" and args.device.type == "cpu":
        return "it has no fp16. (On a CPU, fp16=True trains in fp32 without saying so.)"
    return f"nothing in it is {name}."


def with_flags(args: Any, plan: Plan) -> Any:
    """Return a copy of the arguments with the flags that the plan needs; the user's own stay as they are.

    Raises:
        PlanError: as `check_arguments`.
    """
    check_arguments(args, plan)
    changed = copy.copy(args)
    changed.bf16, changed.fp16 = bool(plan.training_arguments["bf16"]), bool(plan.training_arguments["fp16"])
    changed.mixed_precision = "fp16" if changed.fp16 else "bf16" if changed.bf16 else "no"
    state = AcceleratorState._shared_state
    if state.get("_mixed_precision", changed.mixed_precision) != changed.mixed_precision:
        # as TrainingArguments do when they are made, which was before the plan had its say
        AcceleratorState._reset_state()
    return changed


def set_scaler(accelerator: Any, plan: Plan) -> None:
    """Give an Accelerator the plan's gradient scaler, on a CPU too, where accelerate makes none and says nothing."""
    settings = plan.grad_scaler
    if settings is None:
        return
    if accelerator.scaler is None:
        if accelerator.device.type != "cpu":
            raise PlanError(f"the plan needs a gradient scaler, and accelerate makes none on {accelerator.device.type}")
        accelerator.native_amp = True  # what makes it unscale gradients before they are clipped
        accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.scaler.load_state_dict(
        accelerator.scaler.state_dict()
        | {
            "scale": settings.init_scale,
            "growth_factor": settings.growth_factor,
            "backoff_factor": settings.backoff_factor,
            "growth_interval": settings.growth_interval,
        }
    )
