"""What each unit takes in each format on a device, and what a step of any assignment takes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Estimate, Origin
from autoprec.records.measured import Mode

__all__ = ["SpeedProfile", "UnitTime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTime:
    """A unit's milliseconds in one step in one format, all its calls; `backward_ms` in train mode only.

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
class SpeedProfile:
    """Times of a model's units on a device, measured one shape at a time, and of a few whole steps.

    `around` is a step with every unit in FP32 inside the ambient format over the plain FP32 step, and `corrections`
    are by format what a step saves over what its units save one by one.
    """

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
    around: Estimate
    corrections: Mapping[Format, Estimate]
    times: tuple[UnitTime, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: tuple[str, Format | str]) -> Estimate:
        """Return the milliseconds of (unit, format) in a step, as they count in `step_ms`; KeyError where not timed."""
        unit, choice = key[0], Format(key[1])
        rows = {row.format: row for row in self.times if row.unit == unit}
        wide, own, scale = rows[Format.FP32].step_ms, rows[choice].ratio, self._correction(choice)
        value, low, high = (wide * (1 + scale * (r - 1)) for r in (own.value, own.low, own.high))
        return Estimate(value, low, high, Origin.MEASURED if choice is Format.FP32 else Origin.PREDICTED)

    def step_ms(self, assignment: Mapping[str, Format]) -> Estimate:
        """Return the time of a step of an assignment, predicted; units without a time in a format count as in FP32.

        T = T_fp32 · around + Σ correction · (t_format − t_fp32). Errors of one shape and of one format's correction go
        together, others are independent. Not promised: borders between units cost nothing beyond their own casts.
        """
        rows = {(row.unit, row.format): row for row in self.times}
        total = self.reference_ms.value * self.around.value
        by_shape: dict[tuple[str, Format], float] = {}
        by_format: dict[Format, float] = {}
        for unit, choice in assignment.items():
            if choice is Format.FP32 or (unit, choice) not in rows or (unit, Format.FP32) not in rows:
                continue
            row, wide = rows[unit, choice], rows[unit, Format.FP32].step_ms
            scale = self._correction(choice)
            saved = wide * (row.ratio.value - 1)
            total += scale * saved
            half = scale * wide * (row.ratio.high - row.ratio.low) / 2
            by_shape[row.shape, choice] = by_shape.get((row.shape, choice), 0.0) + half
            by_format[choice] = by_format.get(choice, 0.0) + saved
        halves = [*by_shape.values(), self.reference_ms.value * (self.around.high - self.around.low) / 2]
        for choice, saved in by_format.items():
            if choice in self.corrections:
                known = self.corrections[choice]
                halves.append(saved * (known.high - known.low) / 2)
        off = math.sqrt(sum(half**2 for half in halves))
        return Estimate(total, total - off, total + off, Origin.PREDICTED)

    def _correction(self, choice: Format) -> float:
        known = self.corrections.get(choice)
        return known.value if known else 1.0
