"""`PrecisionCallback`: a plan in any Trainer by one line, checked as training starts, kept beside checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from autoprec.errors import PlanError
from autoprec.integrations.choosing import chosen_plan
from autoprec.integrations.flags import check_arguments
from autoprec.plan import Plan
from autoprec.runtime.attach import Applied, apply
from autoprec.runtime.identity import weights_digest
from autoprec.runtime.integrity import not_in_force
from autoprec.runtime.tripwire import OnCrossing, Tripwire, TripwireLimits

__all__ = ["PLAN_FILE", "PrecisionCallback"]

PLAN_FILE = "plan.json"

_logger = logging.getLogger(__name__)


class PrecisionCallback(TrainerCallback):  # type: ignore[misc]
    """Puts a plan in force when a Trainer is made, checks it as training starts, saves it, and watches its units.

    Give it to the Trainer itself (`Trainer(callbacks=[PrecisionCallback(plan)])`): later the model may be wrapped. The
    Trainer's own flags must go with the plan (`plan.training_arguments`). `PrecisionTrainer` sets them, and alone can
    scale gradients on a CPU, check a plan on resuming, and look at the first loss.

    Args:
        plan: a plan or its file; None: the one in force on the model, or with `AutoPrecisionArguments` their choice.
        emulate: as in `autoprec.apply`.
        watch_every: look at every unit each so many steps, and promote what crosses a limit; None: never.
        limits: of the watch.
        then: what is done at a crossing.
    """

    def __init__(
        self,
        plan: Plan | str | Path | None = None,
        *,
        emulate: bool = False,
        watch_every: int | None = None,
        limits: TripwireLimits | None = None,
        then: OnCrossing | str = OnCrossing.PROMOTE,
    ) -> None:
        self.given = Plan.load(plan) if isinstance(plan, str | Path) else plan
        self.emulate = emulate
        self.applied: Applied | None = None
        self.tripwire: Tripwire | None = None
        self._watching = (watch_every, limits, OnCrossing(then))
        self._folder: Path | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan in force, or that will be; a tripwire may have changed it."""
        return self.applied.plan if self.applied is not None else self.given

    def put_in_force(self, model: nn.Module, args: Any) -> None:
        """Apply the plan to a model, choosing it first where there is none.

        Raises:
            PlanError, DeviceError: as `autoprec.apply`; or arguments that work against the plan.
        """
        if self.given is None:
            self.given = chosen_plan(model, args)
        check_arguments(args, self.given)
        if self.applied is None or self.applied.model is not model:
            self.applied = apply(model, self.given, self.emulate)
        known = self.given.evidence.weights_digest
        if known is not None and known != weights_digest(model):
            _logger.warning("the plan's figures were measured on other weights of %s", self.given.model.id)

    def stop_watching(self) -> None:
        """End a watched step that an exception cut off: its hooks, and compiled code that runs eagerly meanwhile."""
        if self.tripwire is not None:
            self.tripwire.drop()

    # events of the Trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Put the plan in force: the model is on its device, and nothing is wrapped around it yet."""
        self.put_in_force(model, args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Check that the plan is in force and that gradients are scaled if it needs that; save it.

        Raises:
            PlanError: it is not, with the mend.
        """
        if self.applied is None:
            raise PlanError("the callback came after the Trainer was made; give it to Trainer(callbacks=[…])")
        plan = self.applied.plan
        if problem := not_in_force(model, plan):
            raise PlanError(problem)
        if plan.grad_scaler is not None and getattr(optimizer, "scaler", None) is None:
            raise PlanError(
                f"the plan has fp16, which needs a gradient scaler, and this Trainer has none on {args.device.type}. "
                "Use autoprec.integrations.transformers.PrecisionTrainer, which makes one."
                if args.device.type == "cpu" or args.fp16
                else "the plan has fp16, which needs a gradient scaler: give TrainingArguments(fp16=True)."
            )
        self.stop_watching()
        self._folder = Path(args.output_dir) if state.is_world_process_zero else None
        self._save()
        every, limits, then = self._watching
        if every is not None:
            changed = lambda plan: self._save()  # noqa: E731
            self.tripwire = Tripwire(self.applied, every=every, limits=limits, then=then, changed=changed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Watch the step if its turn has come."""
        if self.tripwire is not None:
            self.tripwire.begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Judge the step before it reaches the weights; a step that is not finite does not."""
        if self.tripwire is None or not self.tripwire.watching:
            return
        scaler = getattr(optimizer, "scaler", None)
        self.tripwire.judge(state.global_step, scale=None if scaler is None else scaler.get_scale())
        if not self.tripwire.step_is_sound and scaler is None:
            optimizer.zero_grad()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put the plan beside the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and self.applied is not None and folder.is_dir():
            self.applied.plan.save(folder / PLAN_FILE)

    def _save(self) -> None:
        if self._folder is not None and self.applied is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.applied.plan.save(self._folder / PLAN_FILE)
