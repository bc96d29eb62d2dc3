"""Training confirmed: a plan, blanket BF16 and FP32 trained side by side, and the gap judged against seed noise.

Each seed draws an order of batches and the dropout of a run. For each seed all plans start from the same weights and
see the same batches in the same order, with AdamW, gradients clipped at 1. What counts is the loss on batches that none
of them trained on, in FP32 after the last step: what the weights have become, without the plan's rounding of a forward.
Gaps to FP32 are paired by seed. The margin is the larger of 0.25 % of the loss and one standard deviation of FP32's own
loss over seeds: a plan that moves the result less than another seed would does no harm that anyone could see.

Not promised: that a gap which takes more steps than these to show would be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

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
from autoprec.records import TrainedArm, TrainingConfirmation, TrainingCurve, TrainingVerdict
from autoprec.runtime.attach import applied

__all__ = ["REFERENCE", "confirm_training", "judged"]

REFERENCE = "fp32"
#: of the loss: what a search allows a plan to cost by default
_SHARE = 0.0025
#: the Trainer's own default
_CLIP = 1.0
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


def judged(
    name: str, losses: Sequence[float | None], reference: Sequence[float], deviation: float | None = None
) -> tuple[TrainedArm, float]:
    """Return how final losses stand to FP32's, pair by pair, with the margin; a pure function.

    Args:
        losses: of each pair; None where a run gave none.
        reference: FP32's, as many.
        deviation: of FP32 over seeds; None: that of `reference`.
    """
    spread = stdev(reference) if deviation is None else deviation
    margin = max(_SHARE * abs(fmean(reference)), spread)
    failed = sum(loss is None for loss in losses)
    if failed:
        reason = f"{failed} of {len(losses)} runs gave no finite loss"
        return TrainedArm(name=name, gap=None, gap_ci95=None, verdict=TrainingVerdict.WORSE, reason=reason), margin
    gaps = [a - b for a, b in zip(losses, reference, strict=True) if a is not None]
    mean = fmean(gaps)
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    low, high = mean - half, mean + half
    ends, limit = f"{number(low, 2)} to {number(high, 2)}", f"{number(margin, 2)} is the margin"
    if high < margin:
        verdict, reason = TrainingVerdict.NOT_WORSE, f"a loss of at most {number(high, 2)} over fp32's, and {limit}"
    elif low > 0:
        verdict, reason = TrainingVerdict.WORSE, f"a loss of {ends} over fp32's, and {limit}"
    else:
        verdict, reason = TrainingVerdict.UNDECIDED, f"a loss of {ends} over fp32's: too wide to tell"
    return TrainedArm(name=name, gap=mean, gap_ci95=(low, high), verdict=verdict, reason=reason), margin


def _confirmation(
    curves: list[TrainingCurve], names: list[str], steps: int, seeds: int, learning_rate: float, notes: tuple[str, ...]
) -> TrainingConfirmation:
    def finals(name: str) -> list[float | None]:
        return [curve.final_loss for curve in curves if curve.name == name]

    reference = [loss for loss in finals(REFERENCE) if loss is not None]
    arms = [judged(name, finals(name), reference) for name in names]
    return TrainingConfirmation(
        steps=steps,
        seeds=seeds,
        learning_rate=learning_rate,
        reference_loss=fmean(reference),
        seed_deviation=stdev(reference),
        margin=arms[0][1] if arms else max(_SHARE * abs(fmean(reference)), stdev(reference)),
        arms=tuple(arm for arm, _ in arms),
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
            final, metric = self._held_out() if reason is None else (None, None)
        if final is not None and not math.isfinite(final):
            final, metric, reason = None, None, "the held-out loss is not finite"
        return TrainingCurve(
            name=name,
            seed=seed,
            losses=tuple(losses),
            final_loss=final,
            final_metric=metric,
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
        skipped = 0
        for batch in self._order(seed):
            optimizer.zero_grad(set_to_none=True)
            loss: Tensor = self.workload.training_loss(batch, self.workload.forward(batch))
            value = float(loss.detach())
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
    def _held_out(self) -> tuple[float, float | None]:
        """Return the mean loss over the held-out batches, weighted by tokens, and the metric there, both in FP32."""
        self.model.eval()
        weights, losses, parts, kind = [], [], [], ReadoutKind.VALUES
        for batch in self.held_out:
            raw = self.workload.forward(batch)
            weights.append(float(self.workload.tokens(batch)))
            losses.append(float(self.workload.training_loss(batch, raw)))
            read = self.workload.readout(batch, raw)
            if read.labels is not None:
                kind = read.kind
                parts.append(compare(read, read))
        loss = math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / math.fsum(weights)
        if self.workload.metric is not None:
            self.metric = "metric"
            return loss, float(self.workload.metric(self.model, self.held_out))
        if not all(part.finite for part in parts) or not any(part.weight.sum() for part in parts):
            return loss, None
        found = task_metric(kind, parts)
        self.metric = found.name
        return loss, found.value
