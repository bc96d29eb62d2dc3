"""What a step needs of a device's memory, by what holds it and by unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import ClassVar

from autoprec.records.figures import STRICT, Origin
from autoprec.records.measured import Mode

__all__ = ["BatchFit", "MemoryBreakdown", "MemoryParts", "Moment", "Remedy", "UnitMemory"]


class Moment(StrEnum):
    """When in a step memory is looked at."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer step"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes by what holds them, at one moment of a step."""

    __pydantic_config__: ClassVar = STRICT

    #: parameters as they are stored, adapters included
    weights_bytes: int = 0
    #: FP32 copies that an optimizer keeps of weights stored in 16 bits
    masters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    #: tensors kept for the backward, attention scores and log-probabilities not among them
    activations_bytes: int = 0
    #: attention probabilities, where the kernel keeps them
    scores_bytes: int = 0
    #: logits, log-probabilities and their gradients
    logits_bytes: int = 0
    #: weights in a unit's format beside the stored ones: autocast's copies, dequantised or gathered weights
    casts_bytes: int = 0
    #: keys and values kept for later tokens
    cache_bytes: int = 0
    #: tensors that live within one operation or between two
    temporary_bytes: int = 0
    #: what the framework and the device's context take outside the allocator
    context_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(map(self.__getattribute__, _PARTS))


_PARTS = tuple(field.name for field in fields(MemoryParts))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitMemory:
    """What one unit holds by the end of the forward, and the gradients and states it has in all."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    weights_bytes: int
    masters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    scores_bytes: int
    logits_bytes: int
    casts_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of all parts; not a peak, as they are not all there at once."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """The highest memory of a step on one device, by what holds it then; every figure is predicted."""

    __pydantic_config__: ClassVar = STRICT

    model_id: str
    mode: Mode
    #: sentence: what is stored how, and which savings are on
    policy: str
    batch_size: int
    seq_len: int
    devices: int
    #: forward and backward passes an optimizer step
    accumulation: int
    #: which activations are computed again in the backward: none, selective or full
    checkpointing: str
    parameters: int
    trained_parameters: int
    #: at the moment of the peak
    parts: MemoryParts
    moment: Moment
    #: highest total at each moment
    moments_bytes: Mapping[Moment, int]
    #: by the end of the forward, on one device; the weights outside units are the last row
    units: tuple[UnitMemory, ...]
    #: bytes a parameter for weights, gradients and optimizer states alone, times parameters
    simple_bytes: int
    leaves_out: tuple[str, ...]
    origin: Origin = Origin.PREDICTED

    @property
    def total_bytes(self) -> int:
        """The peak, the context's own memory included."""
        return self.parts.total_bytes

    @property
    def allocated_bytes(self) -> int:
        """The peak as the allocator counts it (`torch.cuda.max_memory_allocated`)."""
        return self.parts.total_bytes - self.parts.context_bytes

    @property
    def kept_bytes(self) -> int:
        """All that is kept from forward to backward."""
        kept = ("activations_bytes", "scores_bytes", "logits_bytes", "casts_bytes")
        return sum(getattr(unit, name) for unit in self.units for name in kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that lowers the peak of one sequence a step."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    total_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFit:
    """The largest micro-batch that fits a device, and the accumulation that keeps the effective batch."""

    __pydantic_config__: ClassVar = STRICT

    #: memory that may be used: the device's, less the reserve
    usable_bytes: int
    #: most sequences a device holds at once; 0 where not even one fits
    largest_micro_batch: int
    #: sequences a device holds at once, such that the effective batch comes out exactly; 0 where none fits
    micro_batch: int
    #: forward and backward passes before an optimizer step
    accumulation: int
    #: sequences an optimizer step over all devices
    effective_batch: int
    #: the peak at `micro_batch`, or of one sequence where none fits
    breakdown: MemoryBreakdown
    #: bytes by which one sequence exceeds what may be used; 0 where it fits
    over_bytes: int
    #: where none fits: single changes, then the first combination that fits, if any does
    remedies: tuple[Remedy, ...] = ()
    #: tokens per second at the micro-batch, where a time was given
    tokens_per_s: float | None = None
    origin: Origin = Origin.PREDICTED
