"""A plan in the Hugging Face Trainer: one class in place of `Trainer`, or a mixin before a Trainer of one's own.

    PrecisionTrainer(model, args, train_dataset=data, plan="plan.json").train()

The plan goes in force when the Trainer has placed the model and before anything is wrapped around it, so it holds under
DDP, FSDP2, torch.compile, activation checkpointing and PEFT, in training, evaluation and prediction alike. `bf16` and
`fp16` follow from the plan; leave them out of the arguments. Checkpoints carry the plan, and resuming checks it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from autoprec.errors import PlanError, TrainingError, UsageError
from autoprec.formats import Format
from autoprec.integrations.callback import PLAN_FILE, PrecisionCallback
from autoprec.integrations.choosing import AutoPrecisionArguments, chosen_plan
from autoprec.integrations.flags import set_scaler, with_flags
from autoprec.plan import Plan
from autoprec.quantities import number
from autoprec.runtime.attach import Applied
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.tripwire import wider_format
from autoprec.runtime.watching import Watch

__all__ = ["AutoPrecisionArguments", "PrecisionCallback", "PrecisionMixin", "PrecisionTrainer"]

_logger = logging.getLogger(__name__)


#: for type checkers a Trainer stands behind the mixin, which it does wherever it is used
_Behind: Any = Trainer if TYPE_CHECKING else object


class PrecisionMixin(_Behind):  # type: ignore[misc]
    """Goes before a Trainer class: `class MyTrainer(PrecisionMixin, SFTTrainer): ...`.

    Args:
        *args: those of the Trainer.
        **kwargs: those of the Trainer.
        plan: a Plan or the path of a plan.json; None: what `AutoPrecisionArguments` say.
        emulate: as in `autoprec.apply`.
        precision: a `PrecisionCallback` with a plan and a watch of its own, in place of `plan` and `emulate`.

    Raises:
        PlanError, DeviceError: the plan does not fit the model, its weights, the arguments or the device.
        UsageError: there is no plan, or one too many.
    """

    args: Any

    def __init__(
        self,
        *args: Any,
        plan: Plan | str | Path | None = None,
        emulate: bool = False,
        precision: PrecisionCallback | None = None,
        **kwargs: Any,
    ) -> None:
        if precision is not None and (plan is not None or emulate):
            raise UsageError("give the plan to the PrecisionCallback or to the trainer, not to both")
        #: set first: the Trainer makes its accelerator, which the plan has a say in, before it comes back here
        self.precision = precision or PrecisionCallback(plan, emulate=emulate)
        self._chosen = self.precision.given is None
        self._loss_seen = False
        super().__init__(*args, **kwargs)
        self.add_callback(self.precision)
        if self.model_init is None:
            self.precision.put_in_force(self.model, self.args)

    @property
    def plan(self) -> Plan:
        """The plan in force; a tripwire may have changed it."""
        plan = self.precision.plan
        assert plan is not None  # there is none before the accelerator is made
        return plan

    @property
    def applied(self) -> Applied | None:
        """The handle of the plan in force; `applied.remove()` gives the plain model back."""
        return self.precision.applied

    # what the Trainer does at these places, with the plan

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator with the flags and the scaler that the plan needs."""
        if self.precision.given is None:
            if self.model is None:
                raise UsageError("a plan cannot be chosen before model_init was called; pass plan=")
            self.precision.given = chosen_plan(self.model, self.args)
        self.args = with_flags(self.args, self.plan)
        super().create_accelerator_and_postprocess()
        set_scaler(self.accelerator, self.plan)

    def call_model_init(self, trial: Any = None) -> Any:
        """Put the plan in force on each new model."""
        model = super().call_model_init(trial)
        model.to(self.args.device)  # a plan is checked against the device that its weights are on
        self.precision.put_in_force(model, self.args)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after the plan beside the checkpoint to go on from was compared with the one in force.

        Raises:
            PlanError: they differ.
            TrainingError: the first loss is not finite.
        """
        if resume_from_checkpoint:
            found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            folder = found if resume_from_checkpoint is True else resume_from_checkpoint
            if folder is not None:  # without one the Trainer says so
                self._check_saved(Path(str(folder)))
        self._loss_seen = False
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.precision.stop_watching()

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, and the plan beside it."""
        super().save_model(output_dir, *args, **kwargs)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.is_dir():
            self.plan.save(folder / PLAN_FILE)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step; the first one's loss is looked at."""
        kept = dict(inputs) if not self._loss_seen else {}
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._loss_seen:
            self._loss_seen = True
            if not bool(torch.isfinite(loss)):
                raise self._explained(model, kept, loss)
        return loss

    def _load_scaler(self, checkpoint: str | None) -> None:
        # a checkpoint of a plan from which a tripwire has taken the last fp16 has a scaler that this run does not
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _check_saved(self, folder: Path) -> None:
        path = folder / PLAN_FILE
        if not path.exists():
            _logger.warning("%s has no %s: whether it was trained with this plan is not known", folder, PLAN_FILE)
            return
        saved = Plan.load(path)
        difference = self.plan.diff(saved)
        if not difference:
            return
        flags = {name: (self.plan.training_arguments.get(name), saved.training_arguments.get(name)) for name in _FLAGS}
        if self._chosen and self.applied is not None and all(a == b for a, b in flags.values()):
            _logger.info("going on with the plan of %s", path)
            self.applied.change(saved)
            return
        first = "; ".join(str(difference).splitlines()[:3])
        raise PlanError(
            f"{folder} was trained with another plan than the one given ({first}). To go on with its own: "
            f"plan='{path}'. To change it on purpose, remove that file."
        )

    def _explained(self, model: nn.Module, inputs: Any, loss: Tensor) -> TrainingError:
        """Return why the first loss is not finite: whether it is in FP32 as well, and which unit is the first."""
        handle, value = self.precision.applied, float(loss)
        assert handle is not None
        exact = self._exact_loss(handle, model, inputs)
        if exact is not None and not math.isfinite(exact):
            return TrainingError(
                f"the loss is {value} at the first step, and {exact} in fp32 as well, so it is not of the plan's "
                "making. Look at the weights and the batch: labels that are all -100, masks that hide everything, or "
                "inputs that are not finite."
            )
        with Watch(handle.plan, canonical_modules(handle.model)) as watch:
            self._loss_of(model, inputs)
        spoiled = [r for r in watch.readings() if math.isinf(r.largest_output)]
        first = min(spoiled, key=lambda r: r.order, default=None)
        text = f"the loss is {value} at the first step with the plan" + (
            "" if exact is None else f", {number(exact, 4)} in fp32"
        )
        if first is not None:
            text += (
                f". The first values that are not finite come out of unit '{first.unit}' ({first.format}); give it a "
                f"wider format: plan.replace({{'{first.unit}': '{wider_format(handle.plan, first.format, model)}'}})"
            )
        return TrainingError(f"{text}.")

    def _exact_loss(self, handle: Applied, model: nn.Module, inputs: Any) -> float | None:
        """Return the loss of a batch in FP32; None where the weights do not allow it."""
        plan = handle.plan
        wide = plan.replace(dict.fromkeys(plan.assignment, Format.FP32))
        try:
            handle.change(dataclasses.replace(wide, ambient=Format.FP32, stream=Format.FP32))
        except PlanError:
            return None
        try:
            return self._loss_of(model, inputs)
        finally:
            handle.change(plan)

    @torch.no_grad()
    def _loss_of(self, model: nn.Module, inputs: Any) -> float:
        return float(self.compute_loss(model, self._prepare_inputs(dict(inputs))))


#: what a Trainer cannot change once it is made
_FLAGS = ("bf16", "fp16")


class PrecisionTrainer(PrecisionMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a plan in force; see `PrecisionMixin` for what it adds."""
