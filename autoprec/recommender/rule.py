"""What a rule of practice is: a condition over a case, a sentence, and where the sentence is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.setup import TrainMethod
from autoprec.recommender.features import UnitFacts
from autoprec.records import DeviceProfile, Mode, ModelFacts, Role, Support

__all__ = ["Advice", "Case", "Level", "Rule", "Topic"]


class Topic(StrEnum):
    """What a rule is about."""

    FORMATS = "formats"
    SCALING = "loss scaling"
    STORAGE = "weights and states"
    MEMORY = "memory"
    SPEED = "speed"
    DEVICES = "several devices"
    EVALUATION = "evaluation"


class Level(IntEnum):
    """How much depends on it."""

    STOPS = 0  #: it cannot run, or not in the way that was asked
    MUST = 1  #: without it training breaks or silently loses what the plan is for
    SHOULD = 2  #: it pays, or keeps a known trouble away
    NOTE = 3  #: worth knowing


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a rule may look at: a plan, what it is for, and what was predicted of it."""

    plan: Plan
    facts: Mapping[str, UnitFacts]
    device: DeviceProfile
    method: TrainMethod
    batch_size: int
    seq_len: int
    #: as a recommendation has them
    memory: Mapping[str, Any]
    expected: Mapping[str, Any]
    model: ModelFacts | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the batch that was asked for."""
        return self.batch_size * self.seq_len

    @property
    def trains(self) -> bool:
        return self.plan.mode is Mode.TRAIN

    @property
    def trains_all(self) -> bool:
        """Whether the model's own weights are trained."""
        return self.trains and self.method is TrainMethod.FULL

    @property
    def low(self) -> bool:
        """Whether anything is narrower than FP32."""
        return self.plan.ambient is not Format.FP32

    @property
    def cuda(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def micro_batch(self) -> int:
        """Sequences at once that fit; 0 where not even one does."""
        return int(self.memory["micro_batch"])

    @property
    def class_name(self) -> str:
        return self.plan.model.class_name

    def has(self, choice: Format, *roles: Role) -> bool:
        """Whether some unit (of these roles, where any are named) has a format."""
        return any(u.format is choice and (not roles or u.role in roles) for u in self.plan.units)

    def native(self, choice: Format) -> bool:
        return self.device.supports(choice) is Support.NATIVE

    @property
    def experts(self) -> bool:
        """Whether it is a mixture of experts."""
        routed = any(u.role is Role.ROUTER for u in self.plan.units) or any(
            "router" in p.reason for p in self.plan.pinned
        )
        return routed or bool(self.model and self.model.experts)

    @property
    def gated(self) -> bool:
        """Whether an FFN multiplies two projections."""
        return any(len(f.gemms) == 3 for f in self.facts.values() if f.unit.role is Role.FFN)

    @property
    def rotates(self) -> bool:
        return any("rotary" in p.reason for p in self.plan.pinned)

    @property
    def logits(self) -> int:
        """Outputs of the head."""
        heads = (leaf.outputs for f in self.facts.values() if f.unit.role is Role.LM_HEAD for leaf in f.gemms)
        return max(heads, default=0)

    @property
    def tight(self) -> bool:
        """Whether memory decides how training runs: it does not fit, or only in parts or by computing twice."""
        halved = self.memory["accumulation"] > 1 or self.memory["checkpointing"] != "none"
        return self.trains and (not self.micro_batch or halved)

    def remedy(self, name: str) -> Mapping[str, Any] | None:
        """Return what memory would be with a change, where it would then fit."""
        found = (r for r in self.memory["remedies"] if r["name"].startswith(name) and r["fits"])
        return next(found, None)

    def step_ms(self, *, compiled: bool = False) -> float | None:
        """Return the predicted time of a step, None where there is none."""
        steps = self.expected.get("compiled_step_ms" if compiled else "step_ms")
        return float(steps["plan"]["value"]) if steps else None

    def odd_sizes(self, multiple: int, *formats: Format) -> list[tuple[str, int]]:
        """Return (layer, size) of matmuls whose sizes do not divide, in units of some formats (none named: any)."""
        return [
            (leaf.module, size)
            for name, fact in self.facts.items()
            if not formats or self.plan.unit(name).format in formats
            for leaf in fact.gemms
            for size in (leaf.inputs, leaf.outputs)
            if size % multiple
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A rule's sentence for one case."""

    code: str
    topic: Topic
    level: Level
    text: str
    source: str

    def to_json(self) -> dict[str, str]:
        """Return it as plain JSON data."""
        return {
            "code": self.code,
            "topic": str(self.topic),
            "level": self.level.name.lower(),
            "text": self.text,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule of practice."""

    code: str
    topic: Topic
    level: Level
    applies: Callable[[Case], bool]
    #: the sentence, or what makes it from the case
    says: str | Callable[[Case], str]
    #: who says so, and where
    source: str

    def advice(self, case: Case) -> Advice:
        """Return the rule's sentence for a case it applies to."""
        text = self.says if isinstance(self.says, str) else self.says(case)
        return Advice(code=self.code, topic=self.topic, level=self.level, text=text, source=self.source)
