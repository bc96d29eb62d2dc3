"""What a doctor's visit found: troubles by severity, each with evidence, advice, a line to paste and sources."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.records.figures import STRICT, Origin

__all__ = ["Diagnosis", "Evidenced", "Finding", "Severity", "TraceReport", "UnitTrace"]


class Severity(StrEnum):
    """How bad a finding is, worst first."""

    ERROR = "error"  #: broken: it fails, or trains to nothing
    WARNING = "warning"  #: it runs, and costs quality, time or memory
    NOTE = "note"  #: worth knowing; nothing is wrong

    @property
    def rank(self) -> int:
        """Return 0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidenced:
    """One thing seen, and where: a file with its line, a key, a tensor or a unit."""

    __pydantic_config__: ClassVar = STRICT

    text: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A trouble under its stable code."""

    __pydantic_config__: ClassVar = STRICT

    code: str
    title: str
    severity: Severity
    evidence: tuple[Evidenced, ...]
    advice: str
    paste: str  #: a line for the user's file or shell; '' where the advice is no line
    sources: tuple[str, ...]  #: addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTrace:
    """What one unit of the workload did in the traced steps, all batches together."""

    __pydantic_config__: ClassVar = STRICT

    unit: str
    largest_activation: float  #: |value| into or out of its layers in FP32
    largest_gradient: float | None  #: |value| at its results, loss not scaled
    flushed_share: float | None  #: of its gradient's non-zero values, those that FP16 rounds to 0 without a loss scale
    subnormal_share: float | None  #: those under FP16's smallest normal value


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport:
    """A few steps of a workload, watched."""

    __pydantic_config__: ClassVar = STRICT

    format: str  #: the format that was asked of the steps beside FP32
    device: str
    batches: int
    units: tuple[UnitTrace, ...]
    first_non_finite: str | None  #: the unit where values stop being finite in `format`
    non_finite_in_fp32: str | None
    gradient_flushed_share: float | None  #: all units together, without a loss scale
    gradient_subnormal_share: float | None
    flushed_share_scaled: float | None  #: at `loss_scale`
    loss_scale: float | None  #: suggested: a power of two that keeps the largest gradient seen under FP16's maximum
    step_ms: float | None  #: median, in `format`
    fp32_step_ms: float | None
    waiting_share: float | None  #: of a loop's time, spent waiting for data
    waiting_reason: str | None  #: why there is no such figure, or how it was had
    low_precision_share: float | None  #: of the matmul work, done in `format` and not wider
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings of a visit, worst first."""

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/diagnosis@1"
    looked_at: tuple[str, ...]
    findings: tuple[Finding, ...]
    worst: Severity | None
    trace: TraceReport | None
    #: what could not be looked at, and what was left out
    notes: tuple[str, ...]

    @property
    def broken(self) -> bool:
        """Whether anything found is broken."""
        return self.worst is Severity.ERROR
