"""What training under a plan came to, over seeds, from its runs and those of FP32; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy import stats

from autoprec.records import Figure, Origin, TrainedFigures, TrainingConfirmation
from autoprec.training import REFERENCE

__all__ = ["trained_figures"]


def trained_figures(found: TrainingConfirmation, name: str, origin: Origin) -> TrainedFigures:
    """Return the figures of one plan of a training confirmation, or of FP32 itself.

    Means over the seeds whose run gave a finite loss, with t intervals; changes are paired by seed.
    """
    runs = [curve for curve in found.curves if curve.name == name]
    beside = {curve.seed: curve for curve in found.curves if curve.name == REFERENCE}
    sound = [curve for curve in runs if curve.final_loss is not None]
    failed = len(runs) - len(sound)
    scale, unit = (100.0, "%") if found.metric == "accuracy" else (1.0, "")
    loss, before, metric, metric_before = [], [], [], []
    for curve in sound:
        other = beside[curve.seed]
        loss.append(curve.final_loss or 0.0)
        before.append(other.final_loss or 0.0)
        if curve.final_metric is not None and other.final_metric is not None:
            metric.append(scale * curve.final_metric)
            metric_before.append(scale * other.final_metric)
    arm = next((arm for arm in found.arms if arm.name == name), None)
    itself = name == REFERENCE
    return TrainedFigures(
        runs=len(runs),
        failed=failed,
        failed_share=_share(failed, len(runs), origin),
        loss=_mean(loss, "", origin),
        loss_change=None if itself else _mean(_less(loss, before), "", origin),
        metric=_mean(metric, unit, origin),
        metric_change=None if itself else _mean(_less(metric, metric_before), unit, origin),
        verdict=arm.verdict if arm else None,
        reason=arm.reason if arm else None,
    )


def _less(values: Sequence[float], before: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, before, strict=True)]


def _mean(values: Sequence[float], unit: str, origin: Origin) -> Figure | None:
    if not values:
        return None
    ci95 = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        ci95 = (fmean(values) - half, fmean(values) + half)
    return Figure(value=fmean(values), ci95=ci95, unit=unit, origin=origin)


def _share(failed: int, runs: int, origin: Origin) -> Figure:
    """Return the percent of runs that failed, with the exact interval of a proportion (Clopper and Pearson)."""
    around = stats.binomtest(failed, runs).proportion_ci()
    return Figure(
        value=100 * failed / runs, ci95=(100 * float(around.low), 100 * float(around.high)), unit="%", origin=origin
    )
