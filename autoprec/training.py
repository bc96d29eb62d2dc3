"""Training confirmed: a plan, blanket BF16 and FP32 trained side by side, and the gap judged against seed noise.

Each seed draws an order of batches and the dropout of a run. For each seed all plans start from the same weights and
see the same batches in the same order, with AdamW, gradients clipped at 1. What counts is the loss in FP32 after the
last step: what the weights have become, without the plan's rounding of a forward. It is taken on batches that no run
trains on, and on as many of those that all draw from: a plan that loses updates learns less, which on held-out batches
looks like an advantage where FP32 overfits. Gaps to FP32 are paired by seed. The margin is the larger of 0.25 % of the
held-out loss and one standard deviation of FP32's own over seeds, held-out and trained on each: a plan that moves the
result less than another seed would does no harm that anyone could see.

Not promised: that a gap which takes more steps than these to show would be found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Self

import torch
from scipy import stats
from torch import Tensor, nn

from autoprec.errors import DataError, MeasurementError, UsageError
from autoprec.plan import Plan
from autoprec.probe.batches import Batch
from autoprec.probe.compare import compare, task_metric
from autoprec.probe.readout import ReadoutKind
from autoprec.probe.steps import device_of, kept_state, plain_fp32, scaler_of
from autoprec.probe.workload import Workload
from autoprec.quantities import number
from autoprec.records import TrainedArm, TrainingConfirmation, TrainingCurve, TrainingPace, TrainingVerdict
from autoprec.runtime.attach import applied

__all__ = ["REFERENCE", "Ends", "confirm_training", "judged", "margins", "training_pace"]

REFERENCE = "fp32"
#: of the loss: what a search allows a plan to cost by default
_SHARE = 0.0025
#: a plan is what its worse half shows
_HARM = (TrainingVerdict.NOT_WORSE, TrainingVerdict.UNDECIDED, TrainingVerdict.WORSE)
#: the Trainer's own default
_CLIP = 1.0
#: steps that tell how fast one is: the first sets up kernels
_PACED = 3
#: of the batches, kept from training
_HELD_OUT = 0.25


def confirm_training(
    workload: Workload,
    plans: Mapping[str, Plan],
    *,
    steps: int = 200,
    seeds: int = 8,
    first_seed: int = 0,
    learning_rate: float = 1e-4,
    emulate: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> TrainingConfirmation:
    """Train a workload's model under each plan and in FP32, over several seeds, and judge the gaps.

    The model, its gradients' absence and the random state are as before afterwards.

    Args:
        workload: in train mode; its last quarter of batches is held out.
        plans: by name.
        steps: optimizer steps of a run.
        seeds: runs of each plan and of FP32.
        first_seed: of the first runs; the others count on.
        learning_rate: of AdamW, constant.
        emulate: as in `autoprec.apply`.
        tell: called with a sentence as each run begins.

    Raises:
        UsageError: fewer than one step or two seeds.
        DataError: one batch, or none to learn from.
        MeasurementError: FP32's own loss is not finite.
        PlanError, DeviceError: as `autoprec.apply`.
    """
    if steps < 1 or seeds < 2:
        raise UsageError(f"training takes 1 step and 2 seeds or more, got {steps} and {seeds}")
    if len(workload.batches) < 2:
        raise DataError("training is judged on batches held out, so it takes 2 batches or more; give more --batches")
    runner = _Runner(workload, steps, learning_rate, emulate)
    curves: list[TrainingCurve] = []
    with kept_state(workload.model, weights=True):
        for seed in range(seeds):
            for name, plan in {REFERENCE: None, **plans}.items():
                tell(f"training in {name}, seed {seed + 1} of {seeds}")
                curves.append(runner.run(name, plan, first_seed + seed))
                if plan is None and curves[-1].final_loss is None:
                    raise MeasurementError(
                        f"training in fp32 itself fails: {curves[-1].reason}. Try a smaller learning rate."
                    )
    return replace(_confirmation(curves, list(plans), steps, seeds, learning_rate, runner.notes), metric=runner.metric)


def training_pace(workload: Workload, plan: Plan, *, emulate: bool = False) -> TrainingPace:
    """Take a few steps in FP32 and under a plan, and return what training both takes.

    The model is left as `confirm_training` leaves it. A plan that gives no finite loss is taken to be as fast as FP32.

    Raises:
        PlanError, DeviceError: as `autoprec.apply`.
    """
    runner = _Runner(workload, _PACED, 1e-4, emulate)
    with kept_state(workload.model, weights=True):
        runner.run(REFERENCE, None, 0)
        wide, ends = runner.step_seconds, runner.ends_seconds
        runner.run("plan", plan, 0)
    return TrainingPace(step_seconds=wide + (runner.step_seconds or wide), ends_seconds=2 * ends)


@dataclass(frozen=True, slots=True)
class Ends:
    """Losses after the last step, one a run in the order of seeds; None where a run gave none."""

    held_out: Sequence[float | None]
    trained: Sequence[float | None]  #: on batches trained on

    @classmethod
    def of(cls, curves: Iterable[TrainingCurve], name: str) -> Self:
        """Return the ends of the runs of one plan."""
        own = [curve for curve in curves if curve.name == name]
        return cls([c.final_loss for c in own], [c.final_train_loss for c in own])


def judged(name: str, plan: Ends, reference: Ends) -> TrainedArm:
    """Return how a plan's ends stand to FP32's, pair by pair; a pure function.

    `worse` is said at half of 5 % for each of the two losses, so that it is false in 2.5 % of cases at most.
    """
    failed = sum(loss is None for loss in plan.held_out)
    if failed:
        verdict, reason = TrainingVerdict.WORSE, f"{failed} of {len(plan.held_out)} runs gave no finite loss"
        return TrainedArm(name=name, gap=None, gap_ci95=None, verdict=verdict, reason=reason)
    margin, train_margin = margins(reference)
    gap = _Gap.of("held-out loss", plan.held_out, reference.held_out, margin)
    train_gap = _Gap.of("training loss", plan.trained, reference.trained, train_margin)
    verdict, reason = max(gap.verdict(), train_gap.verdict(), key=lambda found: _HARM.index(found[0]))
    return TrainedArm(
        name=name,
        gap=gap.mean,
        gap_ci95=gap.interval(),
        train_gap=train_gap.mean,
        train_gap_ci95=train_gap.interval(),
        verdict=verdict,
        reason=reason,
    )


def margins(reference: Ends) -> tuple[float, float]:
    """Return what a gap on held-out batches, and one on batches trained on, may be."""
    held_out, trained = _known(reference.held_out), _known(reference.trained)
    least = _SHARE * abs(fmean(held_out))
    return max(least, stdev(held_out)), max(least, stdev(trained))


def _known(losses: Sequence[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]


@dataclass(frozen=True, slots=True)
class _Gap:
    """Differences of one loss to FP32's, pair by pair: their mean with its standard error, beside the margin."""

    what: str
    mean: float
    error: float
    pairs: int
    margin: float

    @classmethod
    def of(cls, what: str, losses: Sequence[float | None], reference: Sequence[float | None], margin: float) -> Self:
        gaps = [a - b for a, b in zip(_known(losses), _known(reference), strict=True)]
        return cls(what, fmean(gaps), stdev(gaps) / math.sqrt(len(gaps)), len(gaps), margin)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = float(stats.t.ppf((1 + level) / 2, self.pairs - 1)) * self.error
        return self.mean - half, self.mean + half

    def verdict(self) -> tuple[TrainingVerdict, str]:
        low, high = self.interval()
        ends, limit = f"{number(low, 2)} to {number(high, 2)}", f"{number(self.margin, 2)} is the margin"
        if high < self.margin:
            return TrainingVerdict.NOT_WORSE, f"a {self.what} of at most {number(high, 2)} over fp32's, and {limit}"
        if self.interval(0.975)[0] > 0:
            return TrainingVerdict.WORSE, f"a {self.what} of {ends} over fp32's, and {limit}"
        return TrainingVerdict.UNDECIDED, f"a {self.what} of {ends} over fp32's: too wide to tell"


def _confirmation(
    curves: list[TrainingCurve], names: list[str], steps: int, seeds: int, learning_rate: float, notes: tuple[str, ...]
) -> TrainingConfirmation:
    reference = Ends.of(curves, REFERENCE)
    margin, train_margin = margins(reference)
    return TrainingConfirmation(
        steps=steps,
        seeds=seeds,
        learning_rate=learning_rate,
        reference_loss=fmean(_known(reference.held_out)),
        seed_deviation=stdev(_known(reference.held_out)),
        margin=margin,
        train_margin=train_margin,
        arms=tuple(judged(name, Ends.of(curves, name), reference) for name in names),
        curves=tuple(curves),
        notes=notes,
    )


class _Runner:
    """Runs of one workload, each from the same weights."""

    def __init__(self, workload: Workload, steps: int, learning_rate: float, emulate: bool) -> None:
        held = max(1, int(_HELD_OUT * len(workload.batches)))
        self.workload, self.model = workload, workload.model
        self.steps, self.learning_rate, self.emulate = steps, learning_rate, emulate
        self.train, self.held_out = workload.batches[:-held], workload.batches[-held:]
        self.start = [(t, t.detach().clone()) for t in (*self.model.parameters(), *self.model.buffers())]
        self.metric: str | None = None
        #: what the last step of a run took, and the losses after it; 0 where it ended before
        self.step_seconds = self.ends_seconds = 0.0
        self.notes = (f"{len(self.train)} batches trained on, {held} held out",)

    def run(self, name: str, plan: Plan | None, seed: int) -> TrainingCurve:
        """Train once; ends early where the loss is not finite."""
        with torch.no_grad():
            for tensor, value in self.start:
                tensor.copy_(value)
        torch.manual_seed(seed)
        losses: list[float] = []
        with plain_fp32(device_of(self.model).type):
            if plan is None:
                skipped, reason = self._train(seed, None, losses)
            else:
                with applied(self.model, plan, self.emulate):
                    skipped, reason = self._train(seed, plan, losses)
            begun = time.monotonic()
            final, trained, metric = self._ends() if reason is None else (None, None, None)
            self.ends_seconds = time.monotonic() - begun
        if final is not None and trained is not None and not math.isfinite(final + trained):
            final, trained, metric, reason = None, None, None, "the loss after the last step is not finite"
        return TrainingCurve(
            name=name,
            seed=seed,
            losses=tuple(losses),
            final_loss=final,
            final_metric=metric,
            final_train_loss=trained,
            skipped_steps=skipped,
            reason=reason,
        )

    def _train(self, seed: int, plan: Plan | None, losses: list[float]) -> tuple[int, str | None]:
        """Take the steps; return how many the scaler skipped, and why it ended early."""
        device = device_of(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        scaler = scaler_of(device, plan.grad_scaler if plan else None)
        self.model.train()
        skipped, self.step_seconds, before_it = 0, 0.0, None
        for batch in self._order(seed):
            optimizer.zero_grad(set_to_none=True)
            loss: Tensor = self.workload.training_loss(batch, self.workload.forward(batch))
            value, now = float(loss.detach()), time.monotonic()  # a card's step ends where its value is read
            if before_it is not None:
                self.step_seconds = now - before_it
            before_it = now
            if not math.isfinite(value):
                return skipped, f"the loss is {value} at step {len(losses) + 1}"
            losses.append(value)
            before = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, _CLIP)
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
        return skipped, None

    def _order(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        left = self.steps
        while left > 0:
            for index in torch.randperm(len(self.train), generator=generator)[:left].tolist():
                yield self.train[index]
            left -= len(self.train)

    @torch.no_grad()
    def _ends(self) -> tuple[float, float, float | None]:
        """Return the losses on held-out batches and on as many trained on, and the metric of the former, in FP32."""
        self.model.eval()
        parts, kind = [], ReadoutKind.VALUES

        def look(batch: Batch, raw: Any) -> None:
            nonlocal kind
            read = self.workload.readout(batch, raw)
            if read.labels is not None:
                kind = read.kind
                parts.append(compare(read, read))

        loss = self._loss(self.held_out, look)
        trained = self._loss(self.train[: len(self.held_out)])
        if self.workload.metric is not None:
            self.metric = "metric"
            return loss, trained, float(self.workload.metric(self.model, self.held_out))
        if not all(part.finite for part in parts) or not any(part.weight.sum() for part in parts):
            return loss, trained, None
        found = task_metric(kind, parts)
        self.metric = found.name
        return loss, trained, found.value

    def _loss(self, batches: Sequence[Batch], look: Callable[[Batch, Any], None] | None = None) -> float:
        """Return the mean loss weighted by tokens; `look` is given what each forward returns."""
        weights, losses = [], []
        for batch in batches:
            raw = self.workload.forward(batch)
            weights.append(float(self.workload.tokens(batch)))
            losses.append(float(self.workload.training_loss(batch, raw)))
            if look is not None:
                look(batch, raw)
        return math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / math.fsum(weights)
