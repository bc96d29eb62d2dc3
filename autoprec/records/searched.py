"""What a search found, and its news on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT
from autoprec.records.measured import Measurement, Mode

__all__ = [
    "Progress",
    "Removal",
    "SearchResult",
    "Verdict",
    "VerdictDecision",
]


@dataclass(frozen=True, slots=True)
class Removal:
    """A format taken from a unit's choices by the device, the space or a veto, and why."""

    __pydantic_config__: ClassVar = STRICT

    unit: str
    format: Format
    reason: str


class VerdictDecision(StrEnum):
    """What to do after a search."""

    USE_PLAN = "use-plan"
    USE_UNIFORM = "use-uniform"
    DO_NOTHING = "do-nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer of a search in one sentence, with the best uniform plan within the limit."""

    __pydantic_config__: ClassVar = STRICT

    decision: VerdictDecision
    text: str
    best_uniform: str | None
    break_even_hours: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All that a search found (`result.json`); `chosen` is an index of `front`, or None for do-nothing."""

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/search@1"
    model_id: str
    device: str
    mode: Mode
    max_drop: str
    reference: Measurement
    baselines: tuple[Measurement, ...]
    front: tuple[Measurement, ...]
    chosen: int | None
    verdict: Verdict
    trials: int
    evaluations: int
    seconds: float
    #: what the tables of a solver promise at best; absent until there is a solver
    predicted_bound: Mapping[str, float] | None
    removed: tuple[Removal, ...]
    folder: str | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One line of news from a running search, for whoever shows it."""

    stage: str  #: probe, baselines, search, done
    message: str
    elapsed_seconds: float
    #: expected seconds until the end of this stage, where it can be told
    eta_seconds: float | None = None
    trial: int | None = None
    measurement: Measurement | None = None
