"""Target `python`: a training loop, or an inference function, without any framework around it."""

from __future__ import annotations

from autoprec.exporters.summary import literal, one_line, summary
from autoprec.formats import Format
from autoprec.plan import GradScalerSettings, Plan
from autoprec.records import Mode

__all__ = ["python_source"]

_HEAD = '''"""{title}

{summary}

{use}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import autoprec

PLAN = {plan_path}


def prepare(model: torch.nn.Module, plan: str = PLAN) -> torch.nn.Module:
    """Put the plan in force on a model with FP32 weights, in place{before}.

    No torch.autocast is needed around it: each unit computes in its own format.{fp8}
    """
    autoprec.apply(model, autoprec.Plan.load(plan))
    return model
'''

_LOSS = '''

def model_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss that the model computes itself, as Hugging Face models do when given labels."""
    return model(**batch).loss.float()
'''

_TRAIN = '''

def train(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor] = model_loss,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Take one optimizer step for each batch and return the losses."""
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses
'''

_TRAIN_SCALED = '''

def make_scaler(model: torch.nn.Module) -> torch.amp.GradScaler:
    """Return the scaler that keeps FP16 gradients from vanishing; save its state_dict with your checkpoints."""
    device = next(model.parameters()).device.type
    return torch.amp.GradScaler(
        device,
        init_scale={init_scale!r},
        growth_factor={growth_factor!r},
        backoff_factor={backoff_factor!r},
        growth_interval={growth_interval!r},
    )


def train(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor] = model_loss,
    max_grad_norm: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Take one optimizer step for each batch (skipped where gradients overflow) and return the losses."""
    model.train()
    scaler = scaler or make_scaler(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # so that the norm below is that of the true gradient
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses
'''

_INFER = '''

@torch.inference_mode()
def predict(model: torch.nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Return the model's output for each batch."""
    model.eval()
    return [model(**batch) for batch in batches]
'''

_FP8 = """
    It raises where the device has no FP8; autoprec.apply(..., emulate=True) gives its numbers there, not its speed."""


def python_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `prepare` and `train` (or `predict` for a plan made for inference)."""
    training = plan.mode is Mode.TRAIN
    head = _HEAD.format(
        title=f"{'Train' if training else 'Run'} {one_line(plan.model.id)} with its autoprec plan.",
        summary=summary(plan),
        plan_path=literal(plan_path),
        use="model = prepare(model), then "
        + ("train(model, batches, optimizer)." if training else "predict(model, batches)."),
        before="; before or after the optimizer is made" if training else "",
        fp8=_FP8 if Format.FP8 in plan.formats else "",
    )
    if not training:
        return head.replace("Callable, Iterable", "Iterable") + _INFER
    return head + _LOSS + (_scaled(plan.grad_scaler) if plan.grad_scaler else _TRAIN)


def _scaled(settings: GradScalerSettings) -> str:
    return _TRAIN_SCALED.format(
        init_scale=settings.init_scale,
        growth_factor=settings.growth_factor,
        backoff_factor=settings.backoff_factor,
        growth_interval=settings.growth_interval,
    )
