"""From a measurement to the figures people quote, and how these stand to the targets people set; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from autoprec.probe.compare import median_ci95
from autoprec.records import (
    AuditReport,
    ComparedPlan,
    Figure,
    Measurement,
    OpKind,
    Origin,
    Target,
    TargetName,
    TargetOutcome,
)

__all__ = ["as_target", "drop_figure", "metric_figures", "row_of", "saved", "share_of", "speed_figures", "targets"]

#: what mixed precision is commonly held to: name, limit, unit, whether larger is better
_TARGETS = (
    (TargetName.SPEEDUP, 2.0, "x", True),
    (TargetName.MEMORY_SAVED, 30.0, "%", True),
    (TargetName.DROP, 0.5, "%", False),
    (TargetName.LOW_SHARE, 80.0, "%", True),
)
#: the largest error of a predicted peak on an A100, of 8 published; of 24 steps measured on a CPU it was 0.015
#: (benchmarks/results/memory.json)
_PEAK_ERROR = 0.05
_PRODUCTS = (OpKind.MATMUL, OpKind.ATTENTION, OpKind.CONVOLUTION)
#: what an audit calls kernels that multiply fewer than 32 bits; emulated FP8 runs on FP32's
_LOW = ("bf16", "fp16", "fp8", "tf32")


def speed_figures(found: Measurement) -> tuple[Figure | None, Figure | None]:
    """Return speedup and milliseconds a step; None where the plan has no time."""
    origin = found.origin.step_ms
    if origin is None or found.speedup is None or found.step_ms is None:
        return None, None
    return (
        Figure(value=found.speedup, ci95=found.speedup_ci95, unit="x", origin=origin),
        Figure(value=found.step_ms, ci95=found.step_ms_ci95, unit="ms", origin=origin),
    )


def drop_figure(found: Measurement) -> Figure | None:
    """Return the drop in percent, with the interval that it has in nats."""
    if found.drop is None or found.drop_percent is None or found.origin.drop is None:
        return None
    scale = found.drop_percent / found.drop if found.drop else 0.0
    ci95 = None if found.drop_ci95 is None else (found.drop_ci95[0] * scale, found.drop_ci95[1] * scale)
    return Figure(value=found.drop_percent, ci95=ci95, unit="%", origin=found.origin.drop)


def metric_figures(found: Measurement, reference: Measurement) -> tuple[str | None, Figure | None, Figure | None]:
    """Return the metric's name, its value and its change against FP32: the user's own, else that of labelled data.

    The user's own has no interval: it is one number over all batches.
    """
    if found.metric is not None and found.origin.metric is not None:
        origin = found.origin.metric
        change = None if reference.metric is None else found.metric - reference.metric
        return (
            "metric",
            Figure(value=found.metric, ci95=None, unit="", origin=origin),
            None if change is None else Figure(value=change, ci95=None, unit="", origin=origin),
        )
    known, by = found.task_metric, found.origin.drop
    if known is None or by is None:
        return None, None, None
    scale, unit = (100.0, "%") if known.name == "accuracy" else (1.0, "")

    def figure(value: float, ci95: tuple[float, float] | None) -> Figure:
        return Figure(value=scale * value, ci95=ci95 and (scale * ci95[0], scale * ci95[1]), unit=unit, origin=by)

    return known.name, figure(known.value, known.ci95), figure(known.change, known.change_ci95)


def row_of(
    found: Measurement,
    reference: Measurement | None,
    peak: Figure | None,
    reference_peak: Figure | None,
    *,
    name: str,
    source: str,
    device: str,
) -> ComparedPlan:
    """Return a plan's row beside FP32's measurement and peak; without those it is FP32's own."""
    speedup, step_ms = speed_figures(found)
    _, metric, change = metric_figures(found, reference or found)
    return ComparedPlan(
        name=name,
        source=source,
        device=device,
        measurement=found,
        speedup=speedup,
        step_ms=step_ms,
        peak_bytes=peak,
        memory_saved=saved(peak, reference_peak) if peak is not None and reference_peak is not None else None,
        drop=drop_figure(found),
        task_metric=metric,
        task_metric_change=None if reference is None else change,
        reasons=(found.reason,) if found.reason else (),
    )


def saved(peak: Figure, reference: Figure) -> Figure:
    """Return the percent of FP32's peak that a plan saves; below zero where it needs more."""
    ratio = peak.value / reference.value
    predicted = Origin.PREDICTED in (peak.origin, reference.origin)
    ci95 = (100 * (1 - ratio * (1 + _PEAK_ERROR)), 100 * (1 - ratio * (1 - _PEAK_ERROR))) if predicted else None
    return Figure(value=100 * (1 - ratio), ci95=ci95, unit="%", origin=peak.origin)


def share_of(reports: Sequence[AuditReport]) -> Figure | None:
    """Return the percent of the time of matmuls, attention and convolutions that ran on low-precision kernels.

    The median of some audited steps; None where none has a product.
    """
    shares = []
    for report in reports:
        rows = [row for row in report.rows if row.kind in _PRODUCTS]
        total = sum(row.ms for row in rows)
        if total > 0:
            shares.append(100 * sum(row.ms for row in rows if row.executed in _LOW) / total)
    if not shares:
        return None
    value, ci95 = median_ci95(shares)
    return Figure(value=value, ci95=ci95, unit="%", origin=Origin.MEASURED)


def targets(plan: ComparedPlan) -> tuple[Target, ...]:
    """Return how a plan stands to each target."""
    figures = {
        TargetName.SPEEDUP: plan.speedup,
        TargetName.MEMORY_SAVED: plan.memory_saved,
        TargetName.DROP: plan.drop,
        TargetName.LOW_SHARE: plan.low_share,
    }
    return tuple(as_target(figures[row[0]], *row) for row in _TARGETS)


def as_target(figure: Figure | None, name: TargetName, limit: float, unit: str, larger: bool) -> Target:
    """Hold a figure against a limit that it must be over (`larger`) or under, with its whole interval."""
    if figure is None or figure.unit != unit:
        return Target(name=name, limit=limit, unit=unit, outcome=TargetOutcome.UNKNOWN)
    low, high = figure.ci95 or (figure.value, figure.value)
    inside = low > limit if larger else high < limit
    outside = high <= limit if larger else low >= limit
    outcome = TargetOutcome.MET if inside else TargetOutcome.NOT_MET if outside else TargetOutcome.OPEN
    return Target(name=name, limit=limit, unit=unit, outcome=outcome)
