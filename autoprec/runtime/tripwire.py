"""A tripwire in a user's own training: every so many steps each unit is looked at, and one that crosses is promoted.

A unit crosses a limit when its layers hand on values near the end of their format's range, when too much of its
gradient lies under that range, or when values are not finite. It then gets the next wider format, in place, and
training goes on. Formats never get narrower.

    wire = Tripwire(autoprec.apply(model, plan), every=50)
    for index, batch in enumerate(batches):
        with wire.step(index, scaler=scaler):
            loss = ...; scaler.scale(loss).backward()
        if wire.step_is_sound:
            scaler.step(optimizer)

What is not promised: between two watched steps nothing is seen, so a step may spoil the weights before. Then there is
nothing to promote, and `TrainingError` says to go back to a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from autoprec.errors import TrainingError, UsageError
from autoprec.formats import FP16, Format, layout
from autoprec.plan import Plan
from autoprec.quantities import number
from autoprec.runtime.attach import Applied
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.watching import Reading, Watch

__all__ = ["Crossing", "OnCrossing", "Tripwire", "TripwireLimits", "wider_format"]

_logger = logging.getLogger(__name__)


class OnCrossing(StrEnum):
    """What is done when a unit crosses a limit."""

    PROMOTE = "promote"  #: give it the next wider format and go on
    STOP = "stop"  #: raise TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class TripwireLimits:
    """How far a unit may go in its format."""

    #: part of its result's largest finite value that it may reach: a factor 8 is what other batches may add (as the
    #: veto of FP16 in a search)
    range_part: float = 1 / 8
    #: part of a gradient's sum of |values| that may lie under the normal range. Seen in FP16 with a loss scale of
    #: 65536: 0.0006 and less (demo model, SmolLM2-135M); without one the highest units have 0.89 and 0.98
    underflow: float = 0.1
    #: loss scale from which non-finite gradients are no more the scaler's matter, which halves the scale for them
    least_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A unit over a limit; `wider` is None where no wider format is left."""

    unit: str
    format: Format
    wider: Format | None
    what: str

    def __str__(self) -> str:
        then = f"it computes in {self.wider} from now on" if self.wider else "and no format is wider"
        return f"unit '{self.unit}' ({self.format}): {self.what}; {then}"


class Tripwire:
    """Watches every `every`-th step of a training run, and promotes units that cross a limit.

    Args:
        applied: the plan in force.
        every: steps from one watched step to the next; a step after a crossing is watched as well.
        limits: how far units may go.
        then: what to do at a crossing.
        changed: called with the new plan after a promotion, to save it.

    Raises:
        UsageError: `every` is no positive number.
    """

    def __init__(
        self,
        applied: Applied,
        *,
        every: int = 50,
        limits: TripwireLimits | None = None,
        then: OnCrossing | str = OnCrossing.PROMOTE,
        changed: Callable[[Plan], None] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every must be 1 or more steps, got {every}")
        self.applied, self.every = applied, every
        self.limits, self.then = limits or TripwireLimits(), OnCrossing(then)
        self.changed = changed
        self.crossings: list[tuple[int, Crossing]] = []  #: all so far, with their steps
        self.readings: tuple[Reading, ...] = ()  #: of the last watched step
        self.step_is_sound = True  #: False where gradients of this step must not reach the weights
        self._again = False
        self._watch: Watch | None = None

    @property
    def watching(self) -> bool:
        """Whether the step that runs now is a watched one."""
        return self._watch is not None

    @contextlib.contextmanager
    def step(self, index: int, *, scaler: Any = None) -> Iterator[None]:
        """Run the forward and backward of step `index`; judge them at the end where it is a watched one.

        Raises:
            TrainingError: see `judge`.
        """
        self.begin(index)
        try:
            yield
        except BaseException:
            self.drop()
            raise
        self.judge(index, scale=scaler.get_scale() if scaler is not None and scaler.is_enabled() else None)

    def begin(self, index: int) -> None:
        """Start watching if step `index` is a watched one; for loops in which `step` has no place."""
        self.drop()
        self.step_is_sound = True
        if index % self.every == 0 or self._again:
            self._watch = Watch(self.applied.plan, canonical_modules(self.applied.model)).__enter__()

    def drop(self) -> None:
        """Stop watching without a judgement."""
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None

    def judge(self, index: int, *, scale: float | None = None) -> tuple[Crossing, ...]:
        """End a watched step: find the units over a limit and promote them.

        Args:
            index: the step, for the messages.
            scale: the loss scale of the step; None without a scaler.

        Raises:
            TrainingError: a unit crossed and `then` is `stop`; or values are not finite and nothing can be promoted, or
                weights are not finite already.
        """
        if self._watch is None:
            return ()
        watch = self._watch
        self.drop()
        self.readings = watch.readings()
        found = crossings_of(self.applied.plan, self.readings, self.limits, scale, self.applied.model)
        self._again = bool(found)
        if not found:
            return ()
        self.crossings += [(index, crossing) for crossing in found]
        self.step_is_sound = all(map(_finite, self.readings))
        self._act(index, found)
        return found

    def _act(self, index: int, found: tuple[Crossing, ...]) -> None:
        if not self.step_is_sound:
            self._check_weights(index)
        if self.then is OnCrossing.STOP:
            raise TrainingError(f"step {index}: {found[0]}. Give it that format: Plan.replace, or then='promote'.")
        promoted = {c.unit: c for c in found if c.wider is not None}
        if not promoted and not self.step_is_sound:
            raise TrainingError(
                f"step {index}: {found[0]}. The plan is not what makes it so: look at the batch, lower the learning "
                "rate or clip the gradient, and go on from the last checkpoint."
            )
        for crossing in found:
            _logger.warning("step %d: %s", index, crossing)
        if promoted:
            self.applied.change(promoted_plan(self.applied.plan, tuple(promoted.values()), index))
            if self.changed is not None:
                self.changed(self.applied.plan)

    def _check_weights(self, index: int) -> None:
        for name, parameter in self.applied.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise TrainingError(
                    f"step {index}: '{name}' holds values that are not finite, so an earlier step spoiled the weights. "
                    f"Go on from the last checkpoint, and watch more often than every {self.every} steps."
                )


def crossings_of(
    plan: Plan, readings: Sequence[Reading], limits: TripwireLimits, scale: float | None, model: nn.Module
) -> tuple[Crossing, ...]:
    """Return the units over a limit; where results are not finite only the first, since others follow from it."""
    spoiled = [r for r in readings if math.isinf(r.largest_output)]
    found = []
    first = min(spoiled, key=lambda r: r.order, default=None)
    for reading in readings:
        if first is not None and reading is not first:
            continue
        if what := _what(plan, reading, limits, scale):
            found.append(
                Crossing(
                    unit=reading.unit,
                    format=reading.format,
                    wider=wider_format(plan, reading.format, model),
                    what=what,
                )
            )
    return tuple(found)


def wider_format(plan: Plan, given: Format, model: nn.Module) -> Format | None:
    """Return the next wider format on the model's device, None for FP32; BF16 only where it is native."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if given is Format.FP8:
        return plan.ambient if plan.ambient is not Format.FP32 else Format.BF16
    if given is Format.FP16 and native:
        return Format.BF16
    return None if given is Format.FP32 else Format.FP32


def promoted_plan(plan: Plan, found: Sequence[Crossing], index: int) -> Plan:
    """Return the plan with each crossing's wider format, and why."""
    reasons = {c.unit: f"promoted from {c.format} at step {index}: {c.what}" for c in found}
    changed = plan.replace({c.unit: c.wider for c in found if c.wider is not None})
    units = tuple(dataclasses.replace(u, reason=reasons.get(u.name, u.reason)) for u in changed.units)
    return dataclasses.replace(changed, units=units)


def _finite(reading: Reading) -> bool:
    return not math.isinf(reading.largest_output) and not math.isinf(reading.largest_gradient or 0.0)


def _what(plan: Plan, reading: Reading, limits: TripwireLimits, scale: float | None) -> str | None:
    """Return what is over a limit in a unit, None if nothing is."""
    result = plan.ambient if reading.format is Format.FP8 else reading.format
    most = layout(result).max * limits.range_part
    if math.isinf(reading.largest_output):
        return "a result is not finite"
    if result is Format.FP16 and reading.largest_output > most:
        return f"a result of {number(reading.largest_output)} is over 1/{1 / limits.range_part:.0f} of {FP16.max:.0f}"
    if math.isinf(reading.largest_gradient or 0.0) and (scale is None or scale <= limits.least_scale):
        return "a gradient is not finite"
    if reading.format in (Format.FP16, Format.FP8) and (reading.underflow or 0.0) > limits.underflow:
        return f"{100 * (reading.underflow or 0.0):.0f} % of a gradient lies under the normal range"
    return None
