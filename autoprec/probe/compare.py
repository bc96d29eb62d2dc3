"""What a plan's output lost against the reference's: sums by example, so that intervals can be told from them.

Logits: KL(reference ‖ plan) at each counted position, in nats. Both log-softmaxes are taken in FP64 from the
logits as the model gave them: the drop of one unit in BF16 can be 1e-7 nats, which is where FP32 sums get noisy.
Values: squared error and squared size of the reference, whose ratio is the relative squared error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from autoprec.probe.readout import Readout, ReadoutKind

__all__ = ["Comparison", "Ratio", "compare", "median_ci95", "ratio_ci95", "summarise"]

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


def compare(reference: Readout, plan: Readout) -> Comparison:
    """Compare two readouts of one batch, [B, P, C] each with the same counted positions."""
    if reference.kind is ReadoutKind.VALUES:
        return _compare_values(reference, plan)
    examples, positions = reference.counted.nonzero(as_tuple=True)
    classes = reference.predictions.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // max(classes, 2))
    sums = np.zeros((4, reference.counted.shape[0]))
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
        labelled=reference.labels is not None,
        finite=bool(np.isfinite(sums).all()),
    )


def _positions(kind: ReadoutKind, reference: Tensor, plan: Tensor, labels: Tensor | None) -> Array:
    """Return KL, entropy, label loss and its rise of each position, [4, N]."""
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
        loss = rise = torch.zeros_like(divergence)
    else:
        picked = labels.long()[:, None]
        loss = -log_p.gather(-1, picked)[:, 0]
        rise = -log_q.gather(-1, picked)[:, 0] - loss
    return torch.stack([divergence, entropy, loss, rise]).cpu().numpy()


def _compare_values(reference: Readout, plan: Readout) -> Comparison:
    counted = reference.counted[..., None]
    wide = reference.predictions.double()
    error = torch.where(counted, plan.predictions.double() - wide, 0.0).square().sum(dim=(1, 2)).cpu().numpy()
    size = torch.where(counted, wide, 0.0).square().sum(dim=(1, 2)).cpu().numpy()
    none = np.zeros_like(error)
    finite = bool(np.isfinite(error).all() and np.isfinite(size).all())
    return Comparison(drop=error, weight=size, entropy=none, loss=none, loss_rise=none, labelled=False, finite=finite)


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
    return Summary(floor, percent, ratio_ci95(rise, weight) if labelled else None, reference_loss, reference_entropy)


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
