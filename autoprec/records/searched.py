"""What a search found, and its news on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Estimate
from autoprec.records.measured import Measurement, Mode
from autoprec.records.memory import MemoryBreakdown
from autoprec.records.shown import Shown
from autoprec.records.trained import TrainingConfirmation

__all__ = [
    "Confirmed",
    "Explained",
    "LargestBatch",
    "Progress",
    "Removal",
    "SearchResult",
    "SearchSetting",
    "Standing",
    "Step",
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
class Confirmed:
    """A plan tried on batches that neither probe nor search had used: `answer` is within, above or open.

    The mean drop of `batches` of them lies between `low` and `high`, each bound wrong with probability `level` however
    often one looked; None where too few batches were there, or a drop is not finite.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    answer: str
    drop: float | None
    low: float | None
    high: float | None
    batches: int
    level: float
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What another format of one unit would add to a plan's drop and step time, as believed after the trials."""

    __pydantic_config__: ClassVar = STRICT

    format: Format
    drop: float
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Why a unit (or what is decided together) has its format in the chosen plan.

    `probed` is its drop as predicted before any trial, `drop` as learnt from all trials; `time_ms` what it adds to the
    step of all units in FP32. Shares are of the plan's drop, and of all time that units save.
    """

    __pydantic_config__: ClassVar = STRICT

    unit: str
    format: Format
    probed: Estimate | None
    drop: Estimate
    drop_share: float
    time_ms: Estimate
    time_share: float
    wider: Step | None
    narrower: Step | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestBatch:
    """The largest batch of a plan that fits the device, with its peak there and the tokens a second, all predicted.

    `accumulation`: passes of it that make up the batch of the workload, 1 where that fits whole.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    batch_size: int
    total_bytes: int
    accumulation: int
    tokens_per_s: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSetting:
    """How a search was asked for, and what it ran on; kept from its first step on."""

    __pydantic_config__: ClassVar = STRICT

    #: the line typed; None for a search from Python
    command: str | None
    #: local time with its zone, ISO 8601
    started: str
    max_drop: str
    budget_seconds: float
    seed: int
    batches: int
    #: of those, kept back for confirmation
    unseen_batches: int
    batch_size: int
    #: tokens an example
    seq_len: int
    #: what was chosen about the data by the library
    data: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult(Shown):
    """All that a search found (`result.json`); `chosen` is an index of `front`, or None for do-nothing.

    `predicted_bound` says how far the space was searched: `step_ms`, which no plan of it with a drop of at most `drop`
    beats, as predicted from all trials, and by how many percent that is faster than the fastest measured.
    """

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
    predicted_bound: Mapping[str, float] | None
    removed: tuple[Removal, ...]
    folder: str | None
    seed: int
    confirmed: tuple[Confirmed, ...] = ()
    trained: tuple[TrainingConfirmation, ...] = ()  #: in a search for training
    explained: tuple[Explained, ...] = ()
    #: of FP32, the best uniform plan and those of the front, where it can be told
    largest_batches: tuple[LargestBatch, ...] = ()
    notes: tuple[str, ...] = ()
    #: what to run on a device that was not here, to confirm what is emulated and predicted
    confirm: str | None = None
    setting: SearchSetting | None = None
    #: of FP32, the best uniform plan and the chosen one, by name, where the memory model knows the model; without units
    memory: Mapping[str, MemoryBreakdown] = field(default_factory=dict)
    #: of a device that is not here: what each unit takes where all are in one format, predicted
    unit_ms: Mapping[Format, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a running search has so far: times on one clock, nothing confirmed on unseen batches."""

    baselines: tuple[Measurement, ...]
    front: tuple[Measurement, ...]
    #: index of `front`: the plan to use if the search ended now; None where that is FP32
    chosen: int | None
    trials: int
    limit: str  #: the largest drop asked for, as '0.25%'
    drop_unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One line of news from a running search, for whoever shows it."""

    stage: str  #: probe, baselines, search, confirmation, done
    message: str
    elapsed_seconds: float
    #: expected seconds until the end of the probe or search, where it can be told
    eta_seconds: float | None = None
    #: that is the budget's end: a search ends before where nothing is left to gain
    at_most: bool = False
    trial: int | None = None
    measurement: Measurement | None = None
    #: beside each piece of news from the first measurement on
    standing: Standing | None = None
