"""A plan measured again and audited."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.records.audited import AuditReport
from autoprec.records.figures import STRICT, Figure
from autoprec.records.measured import Measurement, Mode
from autoprec.records.trained import TrainingConfirmation

__all__ = [
    "Check",
    "CheckOutcome",
    "Verification",
]


class CheckOutcome(StrEnum):
    """How a figure measured here stands to the one in the plan."""

    SAME = "same"  #: no difference beyond the noise of the two
    BETTER = "better"
    WORSE = "worse"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure of the plan's evidence against the same figure here; `reason` says why they are not compared."""

    __pydantic_config__: ClassVar = STRICT

    figure: str
    said: Figure
    here: Figure | None
    outcome: CheckOutcome
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a plan does here; `problems`, one sentence each, is empty where it holds."""

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/verification@1"
    model_id: str
    device: str
    mode: Mode
    measurement: Measurement
    checks: tuple[Check, ...]
    audit: AuditReport
    training: TrainingConfirmation | None = None  #: where it was asked for
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    holds: bool
