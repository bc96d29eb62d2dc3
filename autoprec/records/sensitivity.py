"""What each unit's formats do to the model by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Estimate, Origin
from autoprec.records.measured import Mode
from autoprec.records.searched import Removal

__all__ = ["Method", "SensitivityProfile", "UnitDrop", "UnitNumerics"]

_NONE = Estimate(0.0, 0.0, 0.0, Origin.MEASURED)


class Method(StrEnum):
    """How a drop was got."""

    REPLAY = "replay"  #: predicted by local replay, in one backward pass with all others
    DIRECT = "direct"  #: the model was run with this unit alone in the format
    GROUP = "group"  #: measured for a group of units, and shared out by their weights' rounding error


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDrop:
    """The drop one unit in one format causes alone, everything else in FP32."""

    __pydantic_config__: ClassVar = STRICT

    unit: str
    format: Format
    drop: Estimate
    method: Method
    #: of the sum of all units' drops in this format
    share: float
    #: what replay predicted, whatever was done afterwards; None where it could not
    predicted: float | None
    #: relative standard error of the sampling of texts and labels; None where measured directly
    sampling_error: float | None
    #: what the second anchor says: what taking the unit out of the all-low run would save; None where it was not run
    marginal: float | None
    #: predicted drop of each batch that was replayed, in their order; of small models batches are replayed together
    by_batch: tuple[float, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitNumerics:
    """What a format does to a unit's gradients, with the same inputs and the same gradient coming in."""

    __pydantic_config__: ClassVar = STRICT

    unit: str
    format: Format
    #: ‖g_format − g‖² of the unit's own weights over ‖g_reference‖² of the whole model; None where none is trained
    grad_error: float | None
    #: between the unit's weight gradient in the format and in FP32
    cosine: float | None
    #: share of the non-zero values of the gradient at the unit's output that become 0, or pass the largest value
    underflow: float
    overflow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityProfile:
    """How sensitive each unit is to each format (`sensitivity.json`); `profile[unit, "fp8"]` is its drop.

    Drops are nats, or a relative squared error for models of values (`drop_unit`), for data like these batches. They
    add up as long as they are small; no promise is made for sums far beyond what was measured.
    """

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/sensitivity@1"
    model_id: str
    fingerprint: str
    weights_digest: str
    data_digest: str
    device: str
    mode: Mode
    ambient: Format
    formats: tuple[Format, ...]
    drop_unit: str
    #: what 100 % of drop is: the reference's loss or entropy in nats, 1 for values
    scale: float
    #: what the ambient format does outside of units, in the same unit; drops of units come on top
    ambient_drop: float
    #: counted positions of the batches that were replayed
    replayed_positions: int
    drops: tuple[UnitDrop, ...]
    #: largest |value| that goes into or comes out of a layer of the unit
    activation_max: Mapping[str, float]
    numerics: tuple[UnitNumerics, ...]
    vetoes: tuple[Removal, ...]
    #: for FP16 gradients; None where nothing was trained
    loss_scale: float | None
    #: units that never ran on these batches: nothing is known of them
    never_ran: tuple[str, ...]
    passes: int
    seconds: float
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seed: int
    #: where it is kept, None where it is not
    file: str | None = None

    def __getitem__(self, key: tuple[str, Format | str]) -> Estimate:
        """Return the drop of (unit, format); KeyError for what was not probed. FP32 is 0 by definition."""
        unit, choice = key[0], Format(key[1])
        if choice is Format.FP32:
            if any(d.unit == unit for d in self.drops):
                return _NONE
            raise KeyError(key)
        return self.row(unit, choice).drop

    def total(self, choice: Format | str) -> float:
        """Return the sum of all units' drops in a format."""
        return sum(d.drop.value for d in self.drops if d.format == choice)

    def row(self, unit: str, choice: Format | str) -> UnitDrop:
        """Return all that is known of a unit in a format; KeyError for what was not probed."""
        for found in self.drops:
            if found.unit == unit and found.format == choice:
                return found
        raise KeyError((unit, str(choice)))
