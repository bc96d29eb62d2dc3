"""A run as its folder tells it: what a page of it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.quantities import DropLimit
from autoprec.records import (
    DeviceProfile,
    Measurement,
    ModelProfile,
    Origin,
    SearchResult,
    SearchSetting,
    SensitivityProfile,
    SpeedProfile,
)
from autoprec.report.figures import drop_unit

__all__ = ["Run", "RunRow"]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One measurement of a run; baselines have no trial number."""

    trial: int | None
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that a run folder holds, as far as it could be read; `result` is None while its search has not ended."""

    name: str
    rows: tuple[RunRow, ...]
    front: tuple[Measurement, ...]
    #: index of `front`; of a run that has not ended the fastest so far within the limit, not confirmed
    chosen: int | None
    reference: Measurement | None
    result: SearchResult | None = None
    setting: SearchSetting | None = None
    plan: Plan | None = None
    device: DeviceProfile | None = None
    model: ModelProfile | None = None
    sensitivity: SensitivityProfile | None = None
    speed: SpeedProfile | None = None
    #: files that could not be read, and why
    faults: tuple[str, ...] = ()

    @property
    def best(self) -> Measurement | None:
        """The measurement of the plan to use."""
        return None if self.chosen is None else self.front[self.chosen]

    @property
    def measured(self) -> list[Measurement]:
        """All measurements, in the order they were made."""
        return [row.measurement for row in self.rows]

    @property
    def baselines(self) -> list[Measurement]:
        """Measurements that are no trial, those that were stopped or could not run too."""
        return [row.measurement for row in self.rows if row.trial is None]

    @property
    def numerics(self) -> Origin:
        """The origin of what was run, beside times: emulated for a device that is not here."""
        away = self.device is not None and self.device.origin is not Origin.MEASURED
        return Origin.EMULATED if away else Origin.MEASURED

    @property
    def unit(self) -> str:
        """The unit of all drops."""
        return self.sensitivity.drop_unit if self.sensitivity else drop_unit(self.measured)

    @property
    def limit(self) -> DropLimit | None:
        """The largest drop asked for; None where an old run that has not ended does not say."""
        said = self.result.max_drop if self.result else self.setting.max_drop if self.setting else None
        return None if said is None else DropLimit.parse(said)

    @property
    def limit_value(self) -> float | None:
        """The limit in the unit of the drops; percent are told by any measurement that has both."""
        limit = self.limit
        if limit is None or not limit.percent:
            return None if limit is None else limit.value
        for m in self.measured:
            if m.drop and m.drop_percent:
                return limit.value * m.drop / m.drop_percent
        return limit.value / 100 * self.sensitivity.scale if self.sensitivity else None

    def is_within(self, m: Measurement) -> bool:
        """Say whether a measured drop is within the limit; no where either is not known."""
        limit = self.limit
        if limit is None or m.drop is None or (limit.percent and m.drop_percent is None):
            return False
        return limit.allows(m.drop, m.drop_percent or 0.0)

    def predicted_drop(self, assignment: Mapping[str, Format]) -> float | None:
        """Return the sum of the probed drops of an assignment; None where one was not probed."""
        if self.sensitivity is None:
            return None
        try:
            parts = [
                self.sensitivity[unit, choice].value
                for unit, choice in assignment.items()
                if choice is not Format.FP32 and unit not in self.sensitivity.never_ran
            ]
        except KeyError:
            return None
        return math.fsum(parts) + (self.sensitivity.ambient_drop if parts else 0.0)
