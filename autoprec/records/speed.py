"""What each unit takes in each format on a device, and what a step of any assignment takes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Estimate, Origin
from autoprec.records.measured import Mode

__all__ = ["Arrival", "SpeedProfile", "UnitTime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTime:
    """A unit's milliseconds in one step in one format, all its calls, timed alone; `backward_ms` in train mode only.

    `ratio` is over its own FP32, timed beside it. Units of one `shape` were timed as one, so their errors go together.
    """

    __pydantic_config__: ClassVar = STRICT

    unit: str
    format: Format
    shape: str
    forward_ms: float
    backward_ms: float | None
    ratio: Estimate
    #: why the format does not pay here; None where it does, and for FP32
    reason: str | None = None

    @property
    def step_ms(self) -> float:
        """Forward and backward."""
        return self.forward_ms + (self.backward_ms or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What parts add to a step: `mean` and `covariance`, first of `around`, then of each (shape, format).

    `around` is what a step with every unit in FP32 inside the ambient format takes more than the plain FP32 step, as a
    share of that; a part's figure is what a unit takes more in the format (less: below zero), as a share of its FP32
    time.
    """

    __pydantic_config__: ClassVar = STRICT

    shapes: tuple[str, ...]
    formats: tuple[Format, ...]
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def sum(self, shares: Mapping[tuple[str, Format], float]) -> tuple[float, float]:
        """Return mean and standard deviation of a step's time over the reference's, less 1.

        Args:
            shares: FP32 times of the units in low formats, as shares of the reference's step, by part.
        """
        parts = zip(self.shapes, self.formats, strict=True)
        weights = [1.0, *(shares.get(part, 0.0) for part in parts)]
        mean = math.fsum(w * m for w, m in zip(weights, self.mean, strict=True))
        variance = math.fsum(
            w * v * c
            for w, row in zip(weights, self.covariance, strict=True)
            if w
            for v, c in zip(weights, row, strict=True)
        )
        return mean, math.sqrt(max(variance, 0.0))

    def of(self, shape: str, choice: Format) -> tuple[float, float] | None:
        """Return mean and standard deviation of one part; None where it is not known."""
        for index, part in enumerate(zip(self.shapes, self.formats, strict=True), start=1):
            if part == (shape, choice):
                return self.mean[index], math.sqrt(max(self.covariance[index][index], 0.0))
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedProfile:
    """Times of a model's units on a device, measured one shape at a time, and what of them arrives in whole steps."""

    __pydantic_config__: ClassVar = STRICT

    model_id: str
    fingerprint: str
    device: str
    mode: Mode
    ambient: Format
    #: of one batch
    tokens: int
    formats: tuple[Format, ...]
    reference_ms: Estimate
    times: tuple[UnitTime, ...]
    arrival: Arrival
    seconds: float
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: tuple[str, Format | str]) -> Estimate:
        """Return the milliseconds of (unit, format) as they count in a step; KeyError where it was not timed."""
        unit, choice = key[0], Format(key[1])
        wide = self._wide()[unit]
        if choice is Format.FP32:
            return Estimate(wide.step_ms, wide.step_ms, wide.step_ms, Origin.MEASURED)
        known = self.arrival.of(wide.shape, choice)
        if known is None:
            raise KeyError(key)
        mean, reach = known[0], 1.96 * known[1]
        value, low, high = (wide.step_ms * max(0.0, 1 + end) for end in (mean, mean - reach, mean + reach))
        return Estimate(value, low, high, Origin.PREDICTED)

    def step_ms(self, assignment: Mapping[str, Format]) -> Estimate:
        """Return the time of a step of an assignment, predicted; units without a time in a format count as in FP32.

        Errors of one shape go together. Not promised: what else runs on the device meanwhile, and that a border between
        two units costs other than their own casts.
        """
        wide, shares = self._wide(), dict[tuple[str, Format], float]()
        for unit, choice in assignment.items():
            if unit in wide and choice is not Format.FP32:
                part = wide[unit].shape, choice
                shares[part] = shares.get(part, 0.0) + wide[unit].step_ms / self.reference_ms.value
        mean, spread = self.arrival.sum(shares)
        reach = 1.96 * spread
        value, low, high = (self.reference_ms.value * (1 + end) for end in (mean, mean - reach, mean + reach))
        return Estimate(value, low, high, Origin.PREDICTED)

    def _wide(self) -> dict[str, UnitTime]:
        return {row.unit: row for row in self.times if row.format is Format.FP32}
