"""A plan trained beside FP32, over several seeds, and judged against what seeds alone do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.records.figures import STRICT

__all__ = ["TrainedArm", "TrainingConfirmation", "TrainingCurve", "TrainingPace", "TrainingVerdict"]


class TrainingVerdict(StrEnum):
    """What training under a plan did to the loss, on held-out batches and on those trained on, against FP32."""

    NOT_WORSE = "not-worse"  #: the upper ends of both gaps' intervals are under their margins
    WORSE = "worse"  #: of one gap the lower end is over zero and the upper over the margin, or a loss was not finite
    UNDECIDED = "undecided"  #: an interval holds both zero and more than the margin: more seeds or steps would tell


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """One run: the loss of each step, and in FP32 after the last that on held-out batches and on some trained on."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    seed: int
    losses: tuple[float, ...]  #: finite ones, up to the step that failed
    final_loss: float | None
    skipped_steps: int  #: by the gradient scaler
    reason: str | None = None  #: why it ended early
    final_metric: float | None = None  #: on held-out batches beside the loss, where there are labels or a metric
    final_train_loss: float | None = None  #: on as many batches that were trained on, as `final_loss` otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedArm:
    """All runs of one plan against those of FP32 with the same seeds; the gaps are theirs minus FP32's."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    gap: float | None
    gap_ci95: tuple[float, float] | None
    verdict: TrainingVerdict
    reason: str
    train_gap: float | None = None  #: on batches trained on; what a lossy update does not learn shows here
    train_gap_ci95: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfirmation:
    """Plans trained beside FP32 from the same weights on the same batches; losses as the model has them."""

    __pydantic_config__: ClassVar = STRICT

    steps: int
    seeds: int
    learning_rate: float
    reference_loss: float  #: FP32's on held-out batches, mean over seeds
    seed_deviation: float  #: its standard deviation over seeds
    margin: float
    arms: tuple[TrainedArm, ...]
    curves: tuple[TrainingCurve, ...]
    notes: tuple[str, ...] = ()
    train_margin: float | None = None  #: of `train_gap`
    metric: str | None = None  #: what `final_metric` is: accuracy, perplexity, or the user's own metric


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPace:
    """What training a plan beside FP32 takes on the machine that trains: seconds, both runs together."""

    step_seconds: float
    #: the losses after the last step
    ends_seconds: float

    def seconds(self, steps: int, seeds: int) -> float:
        """Return what so many steps with so many seeds take."""
        return seeds * (steps * self.step_seconds + self.ends_seconds)
