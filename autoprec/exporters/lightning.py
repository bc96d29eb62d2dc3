"""Target `lightning`: a LightningModule that puts a plan in force in `configure_model`, and the Trainer around it.

Lightning's precision plugin wraps the whole training step, the loss with it, in one autocast. The plan's scopes stand
inside it. The plugin is made by hand: `precision="16-mixed"` makes a gradient scaler of its own on CUDA, turns into
bf16-mixed on a CPU, and takes no settings.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.loops import scaler_arguments
from autoprec.exporters.summary import opening
from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["LIMITS", "lightning_source"]

LIMITS = Limits(inference="it is written as a training program; use 'python' or 'transformers'")

_NOTES = """
module = Planned(model); make_trainer(max_steps=100).fit(module, loader). Override configure_optimizers and
training_step as you would in any LightningModule.
"""

_IMPORTS = """
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import {plugin}
"""

_MODULE = '''

class Planned(lightning.LightningModule):
    """A model with FP32 weights that computes as the plan says, whose output holds its loss."""

    def __init__(self, model: torch.nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.applied: Any = None

    def configure_model(self) -> None:
        """Put the plan in force, before the strategy wraps the model; Lightning may call this more than once."""
        if self.applied is None:
            self.applied = autoprec.apply(self.model, autoprec.Plan.load(PLAN))

    def on_train_start(self) -> None:
        """Train in train mode: from_pretrained gives models in eval mode, which Lightning would keep."""
        self.model.train()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss.float()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; not a fused one where gradients are scaled and clipped, which Lightning refuses."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
'''

_SCALED = '''

def precision(device: str) -> MixedPrecision:
    """Return what scales the loss as the plan asks; the plan itself says what each unit computes in."""
    scaler = torch.amp.GradScaler(
        device,
{scaler}
    )
    return MixedPrecision("16-mixed", device, scaler=scaler)
'''

_MIXED = '''

def precision(device: str) -> MixedPrecision:
    """Return the autocast around the training step; inside the model the plan says what each unit computes in."""
    return MixedPrecision("bf16-mixed", device)
'''

_PLAIN = '''

def precision(device: str) -> Precision:
    """Return no autocast around the training step, as the plan's ambient is FP32."""
    return Precision()
'''

_TRAINER = '''

def make_trainer(device: str = "{device}", **options: Any) -> lightning.Trainer:
    """Return a Trainer for `device` ("cuda" or "cpu"); leave `precision` out of `options`."""
    return lightning.Trainer(accelerator="gpu" if device == "cuda" else device, plugins=[precision(device)], **options)
'''


def lightning_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `Planned` and `make_trainer`."""
    if plan.grad_scaler is not None:
        around = _SCALED.format(scaler=scaler_arguments(plan.grad_scaler, 8))
    else:
        around = _MIXED if plan.ambient is Format.BF16 else _PLAIN
    imports = _IMPORTS.format(plugin="Precision" if around is _PLAIN else "MixedPrecision")
    device = "cpu" if plan.device.kind == "cpu" else "cuda"
    return opening(plan, "Train", _NOTES, imports, plan_path) + _MODULE + around + _TRAINER.format(device=device)
