"""One assignment measured against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Origin

__all__ = [
    "LOGITS_UNIT",
    "VALUES_UNIT",
    "Measurement",
    "MeasurementOrigins",
    "Mode",
    "TaskMetric",
]

#: of drops: KL of distributions, and of models of values
LOGITS_UNIT, VALUES_UNIT = "nats", "relative squared error"


class Mode(StrEnum):
    """What one step is: `train` is forward, backward and optimizer step; `infer` is forward."""

    TRAIN = "train"
    INFER = "infer"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOrigins:
    """Origin of each figure of a measurement."""

    __pydantic_config__: ClassVar = STRICT

    drop: Origin | None = None
    step_ms: Origin | None = None
    peak_bytes: Origin | None = None
    metric: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMetric:
    """What people quote of a task with labels: `accuracy` of a classifier, `perplexity` of a language model.

    `change` is the plan's less the reference's, its interval paired by example.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    reference: float
    value: float
    ci95: tuple[float, float] | None
    change: float
    change_ci95: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One assignment measured against the reference (design of the figures: docs/measurement.md).

    `speedup` is the median of paired ratios reference / plan. `step_ms` is the median reference step divided by it:
    of `reference_step_ms`, this measurement's own, or of a whole search, so that its figures share one clock. `drop`
    is in nats, or a relative squared error for models of values. `metric` is the user's own, `task_metric` that of
    labelled data. `batch_drops` are drops by batch, in their order. A figure that was not measured is None; `reason`
    says why, and why a plan that is `barred` is on no front: measured to compare with, and not to be used.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    assignment: Mapping[str, Format]
    drop: float | None = None
    drop_ci95: tuple[float, float] | None = None
    drop_percent: float | None = None
    loss_rise: float | None = None
    loss_rise_ci95: tuple[float, float] | None = None
    grad_error: float | None = None
    grad_error_limit: float | None = None
    step_ms: float | None = None
    step_ms_ci95: tuple[float, float] | None = None
    reference_step_ms: float | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    #: what the pairs show: faster, same (within 2 %, or not told apart) or slower
    pace: str | None = None
    speedup_over_uniform: float | None = None
    peak_bytes: int | None = None
    metric: float | None = None
    task_metric: TaskMetric | None = None
    origin: MeasurementOrigins = MeasurementOrigins()
    plan: str | None = None
    reason: str | None = None
    barred: bool = False
    batch_drops: tuple[float, ...] = ()
