"""A figure and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

__all__ = [
    "STRICT",
    "Estimate",
    "Figure",
    "Origin",
]

STRICT = {"extra": "forbid"}  #: read by pydantic: a field nobody knows is an error, not a shrug


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured"  #: measured here, on this device
    EMULATED = "emulated"  #: drop measured with emulated formats
    PREDICTED = "predicted"  #: from our model
    DATASHEET = "datasheet"  #: the vendor's word
    RECORDED = "recorded"  #: measured elsewhere, source named


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval and origin."""

    __pydantic_config__: ClassVar = STRICT

    value: float
    low: float
    high: float
    origin: Origin

    def scaled(self, factor: float) -> Estimate:
        """Return it in another unit; `factor` is above zero."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value with its 95 % interval, unit and origin."""

    __pydantic_config__: ClassVar = STRICT
    value: float
    ci95: tuple[float, float] | None
    unit: str
    origin: Origin
