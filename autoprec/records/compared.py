"""Plans side by side on one model and data: what each gains and costs against FP32, and how that stands to targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from autoprec.records.figures import STRICT, Figure
from autoprec.records.measured import Measurement, Mode
from autoprec.records.trained import TrainingConfirmation, TrainingVerdict

__all__ = ["ComparedPlan", "PlanComparison", "Target", "TargetName", "TargetOutcome", "TrainedFigures"]


class TargetName(StrEnum):
    """A figure that people hold mixed precision to."""

    SPEEDUP = "speedup"
    MEMORY_SAVED = "memory saved"
    DROP = "drop"
    LOW_SHARE = "low-precision share"


class TargetOutcome(StrEnum):
    """Whether a figure reaches its target."""

    MET = "met"  #: with its whole interval
    NOT_MET = "not met"  #: with its whole interval
    OPEN = "open"  #: the target lies inside the interval
    UNKNOWN = "unknown"  #: the figure is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A target and whether it is reached."""

    __pydantic_config__: ClassVar = STRICT

    name: TargetName
    limit: float
    unit: str
    outcome: TargetOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedFigures:
    """What training under a plan came to, over seeds; loss and metric on held-out batches, in FP32 after the last step.

    Changes are the plan's less FP32's with the same seed. A run failed whose loss was not finite.
    """

    __pydantic_config__: ClassVar = STRICT

    runs: int
    failed: int
    failed_share: Figure
    loss: Figure | None
    loss_change: Figure | None
    metric: Figure | None
    metric_change: Figure | None
    verdict: TrainingVerdict | None  #: None for FP32 itself
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPlan:
    """One plan of a comparison. A figure that is not known is None; `reasons` say why."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    source: str  #: a file, a run folder, or `by name`
    device: str
    #: with all figures as they were taken; None where the plan could not be run
    measurement: Measurement | None
    speedup: Figure | None = None
    step_ms: Figure | None = None
    peak_bytes: Figure | None = None
    memory_saved: Figure | None = None
    drop: Figure | None = None
    task_metric: Figure | None = None
    task_metric_change: Figure | None = None
    #: share of the time of matmuls, attention and convolutions that runs on 16-bit, 8-bit or TF32 kernels
    low_share: Figure | None = None
    targets: tuple[Target, ...] = ()
    trained: TrainedFigures | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanComparison:
    """Plans beside FP32 (`compare --json`). `reference` is FP32 against itself: its speedup shows the timer's noise."""

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/comparison@1"
    model_id: str
    device: str
    mode: Mode
    batches: int | None
    #: what the task metric is: accuracy, perplexity, or the user's own metric
    metric: str | None
    reference: ComparedPlan
    plans: tuple[ComparedPlan, ...]
    training: TrainingConfirmation | None = None
    notes: tuple[str, ...] = ()
    #: the line typed; None for a comparison from Python
    command: str | None = None
    #: releases that figures depend on, where they were taken
    versions: Mapping[str, str] = field(default_factory=dict)
