"""What a plan's output lost against the reference's: sums by example, so that intervals can be told from them.

Logits: KL(reference ‖ plan) at each counted position, in nats. Both log-softmaxes are taken in FP64 from the
logits as the model gave them: the drop of one unit in BF16 can be 1e-7 nats, which is where FP32 sums get noisy.
Values: squared error and squared size of the reference, whose ratio is the relative squared error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from autoprec.probe.readout import Readout, ReadoutKind
from autoprec.records import TaskMetric

__all__ = ["Comparison", "Ratio", "compare", "median_ci95", "ratio_ci95", "summarise", "task_metric"]

Array = npt.NDArray[np.float64]

#: logits handled at once, as FP64: 2**22 of them are 32 MB a copy
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Sums of one batch by example [B]: `weight` counts positions, or the reference's squared size for values."""

    drop: Array
    weight: Array
    entropy: Array
    loss: Array
    loss_rise: Array
    #: positions whose label is the likeliest class, in the reference and in the plan
    reference_right: Array
    right: Array
    labelled: bool
    finite: bool


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean as a ratio of sums, with its 95 % interval where there are at least two examples."""

    value: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Drop and loss of a plan over all batches; `drop_percent` is of the larger of loss and entropy."""

    drop: Ratio
    drop_percent: float
    loss_rise: Ratio | None
    reference_loss: float | None
    reference_entropy: float | None
    task_metric: TaskMetric | None = None


def compare(reference: Readout, plan: Readout) -> Comparison:
    """Compare two readouts of one batch, [B, P, C] each with the same counted positions."""
    if reference.kind is ReadoutKind.VALUES:
        return _compare_values(reference, plan)
    examples, positions = reference.counted.nonzero(as_tuple=True)
    classes = reference.predictions.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // max(classes, 2))
    sums = np.zeros((6, reference.counted.shape[0]))
    for at in range(0, len(examples), step):
        rows, columns = examples[at : at + step], positions[at : at + step]
        labels = None if reference.labels is None else reference.labels[rows, columns]
        own = reference.predictions[rows, columns]
        # compared with itself, for its loss and entropy, one softmax will do
        other = own if plan is reference else plan.predictions[rows, columns]
        chunk = _positions(reference.kind, own, other, labels)
        for total, values in zip(sums, chunk, strict=True):
            np.add.at(total, rows.cpu().numpy(), values)
    weight = reference.counted.sum(dim=1).double().cpu().numpy()
    return Comparison(
        drop=sums[0],
        weight=weight,
        entropy=sums[1],
        loss=sums[2],
        loss_rise=sums[3],
        reference_right=sums[4],
        right=sums[5],
        labelled=reference.labels is not None,
        finite=bool(np.isfinite(sums).all()),
    )


def _positions(kind: ReadoutKind, reference: Tensor, plan: Tensor, labels: Tensor | None) -> Array:
    """Return KL, entropy, label loss, its rise, and whether either side is right at each position, [6, N]."""
    alone = plan is reference
    if kind is ReadoutKind.BINARY:
        # two classes with logits 0 and z give the same Bernoulli distribution
        reference, plan = F.pad(reference, (1, 0)), F.pad(plan, (1, 0))
    log_p = reference.double().log_softmax(-1)
    log_q = log_p if alone else plan.double().log_softmax(-1)
    p = log_p.exp()
    # p is 0 where log_p is -inf (a masked class): such a class counts nothing
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    if labels is None:
        loss = rise = right = own = torch.zeros_like(divergence)
    else:
        picked = labels.long()[:, None]
        loss = -log_p.gather(-1, picked)[:, 0]
        rise = -log_q.gather(-1, picked)[:, 0] - loss
        right, own = ((side.argmax(-1) == labels).to(loss.dtype) for side in (log_p, log_q))
    return torch.stack([divergence, entropy, loss, rise, right, own]).cpu().numpy()


def _compare_values(reference: Readout, plan: Readout) -> Comparison:
    counted = reference.counted[..., None]
    wide = reference.predictions.double()
    error = torch.where(counted, plan.predictions.double() - wide, 0.0).square().sum(dim=(1, 2)).cpu().numpy()
    size = torch.where(counted, wide, 0.0).square().sum(dim=(1, 2)).cpu().numpy()
    none = np.zeros_like(error)
    finite = bool(np.isfinite(error).all() and np.isfinite(size).all())
    return Comparison(
        drop=error,
        weight=size,
        entropy=none,
        loss=none,
        loss_rise=none,
        reference_right=none,
        right=none,
        labelled=False,
        finite=finite,
    )


def summarise(kind: ReadoutKind, parts: Iterable[Comparison]) -> Summary:
    """Sum up all batches of a plan."""
    found = list(parts)
    drop, weight, entropy, loss, rise = (
        np.concatenate([getattr(part, name) for part in found])
        for name in ("drop", "weight", "entropy", "loss", "loss_rise")
    )
    mean = ratio_ci95(drop, weight)
    # a KL or a squared error is never negative; what is below zero is the rounding of FP64 sums
    floor = Ratio(max(mean.value, 0.0), mean.ci95 and (max(mean.ci95[0], 0.0), max(mean.ci95[1], 0.0)))
    if kind is ReadoutKind.VALUES:
        return Summary(floor, 100 * floor.value, None, None, None)
    total = float(weight.sum())
    labelled = all(part.labelled for part in found)
    reference_loss = float(loss.sum()) / total if labelled else None
    reference_entropy = float(entropy.sum()) / total
    scale = max(reference_loss or 0.0, reference_entropy)
    percent = 100 * floor.value / scale if scale > 0 else 0.0
    risen = ratio_ci95(rise, weight) if labelled else None
    metric = task_metric(kind, found) if labelled else None
    return Summary(floor, percent, risen, reference_loss, reference_entropy, metric)


def task_metric(kind: ReadoutKind, parts: Sequence[Comparison]) -> TaskMetric:
    """Return what people quote of labelled data: accuracy with one answer an example, else perplexity.

    The change's interval is paired: example by example, plan against reference. Several yes-or-no answers of an example
    are each right or wrong.
    """
    names = ("weight", "loss", "loss_rise", "reference_right", "right")
    weight, loss, rise, before, right = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    if kind is ReadoutKind.BINARY or weight.max() <= 1:
        value, change = _share_ci95(right, weight), _share_ci95(right - before, weight)
        reference = float(before.sum() / weight.sum())
        return TaskMetric(
            name="accuracy",
            reference=reference,
            value=value.value,
            ci95=value.ci95 and (max(0.0, value.ci95[0]), min(1.0, value.ci95[1])),
            change=change.value,
            change_ci95=change.ci95,
        )
    own, risen = ratio_ci95(loss + rise, weight), ratio_ci95(rise, weight)
    reference = _exp(float(loss.sum() / weight.sum()))
    return TaskMetric(
        name="perplexity",
        reference=reference,
        value=_exp(own.value),
        ci95=own.ci95 and (_exp(own.ci95[0]), _exp(own.ci95[1])),
        change=reference * (_exp(risen.value) - 1),
        change_ci95=risen.ci95 and (reference * (_exp(risen.ci95[0]) - 1), reference * (_exp(risen.ci95[1]) - 1)),
    )


def _share_ci95(sums: Array, weights: Array) -> Ratio:
    """Return a mean of answers with its interval; where all are alike, what so many at most hide (binomial)."""
    found = ratio_ci95(sums, weights)
    if found.ci95 is None or found.ci95[0] < found.ci95[1]:
        return found
    hidden = 1 - 0.025 ** (1 / float(weights.sum()))
    return Ratio(found.value, (found.value - hidden, found.value + hidden))


def _exp(loss: float) -> float:
    """Return e to a loss, which FP64 holds up to 709."""
    return math.exp(min(loss, 700.0))


def ratio_ci95(sums: Array, weights: Array) -> Ratio:
    """Return Σ sums / Σ weights with a t interval over examples (linearised ratio estimator).

    The interval holds for examples drawn independently; windows of one text are nearly so.
    """
    total, count = float(weights.sum()), int((weights > 0).sum())
    value = float(sums.sum()) / total
    if count < 2:
        return Ratio(value, None)
    residual = sums - value * weights
    error = math.sqrt(count / (count - 1) * float((residual**2).sum())) / total
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Ratio(value, (value - half, value + half))


def median_ci95(samples: Iterable[float]) -> tuple[float, tuple[float, float] | None]:
    """Return the median with its distribution-free 95 % interval from order statistics (None under 6 samples)."""
    ordered = np.sort(np.asarray(list(samples), dtype=float))
    median = float(np.median(ordered))
    rank = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    # the interval between the rank-th smallest and largest covers the median with at least 95 %
    if rank < 1:
        return median, None
    return median, (float(ordered[rank - 1]), float(ordered[-rank]))
