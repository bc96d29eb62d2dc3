"""The parts of a plan: what it was made for, its units, the loss scale, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Figure, Origin
from autoprec.records.model import Role

__all__ = ["Evidence", "GradScalerSettings", "PlanDevice", "PlanDiff", "PlanModel", "PlanUnit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanModel:
    """The model a plan was made for."""

    __pydantic_config__: ClassVar = STRICT
    id: str
    class_name: str  #: `class` in the file, which is no name in Python
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDevice:
    """The device a plan was made for; `origin` says whether it was measured or taken from the catalogue."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    kind: str
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanUnit:
    """A unit with its format and the reason for it."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    role: Role
    modules: tuple[str, ...]
    format: Format
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GradScalerSettings:
    """Dynamic loss scaling; the defaults are those of `torch.amp.GradScaler`."""

    __pydantic_config__: ClassVar = STRICT
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about a plan; None where nothing is."""

    __pydantic_config__: ClassVar = STRICT
    drop: Figure | None = None
    step_ms: Figure | None = None
    speedup: Figure | None = None
    peak_bytes: Figure | None = None
    weights_digest: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """What differs between two plans: units by name, and settings, each as (this, other)."""

    units: Mapping[str, tuple[Format | None, Format | None]]
    settings: Mapping[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        return bool(self.units or self.settings)

    def __str__(self) -> str:
        rows = [f"{k}: {a} -> {b}" for k, (a, b) in (*self.settings.items(), *self.units.items())]
        return "\n".join(rows) or "no difference"
