"""What the operators of a step really ran in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT, Origin

__all__ = [
    "AuditReport",
    "AuditRow",
    "BehindUse",
    "CastRow",
    "Direction",
    "KernelRow",
    "OpKind",
]


class OpKind(StrEnum):
    """What kind of operator an audit saw."""

    MATMUL = "matmul"
    ATTENTION = "attention"  #: scaled dot product, fused or not
    CONVOLUTION = "convolution"
    LOOKUP = "lookup"
    NORM = "norm"
    SOFTMAX = "softmax"


class Direction(StrEnum):
    """Which pass of a step an operator ran in."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """What one kind of operator of one module really ran in, in one direction.

    `executed` is the format of the operands as they reached the kernel: `fp32 tf32 bf16 fp16 fp64 fp8`, or
    `fp8 (emulated)` where FP32 operands hold FP8 values only, and `bf16 (emulated)` and `fp16 (emulated)` where
    FP32 products stand for these (`emulate`). `planned` is None where the plan decides nothing (norms, softmax, what is
    outside units). `agrees` is None there too; `reason` explains what differs.
    """

    __pydantic_config__: ClassVar = STRICT

    unit: str | None
    module: str
    kind: OpKind
    direction: Direction
    planned: Format | None
    executed: str
    result: str  #: format of what came out
    operators: tuple[str, ...]
    calls: int
    agrees: bool | None
    reason: str | None = None
    #: of its calls in the audited step, one after the other; on an accelerator launch and wait included
    ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CastRow:
    """Casts between floating formats in one unit (None: outside units), counted and timed in one step."""

    __pydantic_config__: ClassVar = STRICT

    unit: str | None
    source: str
    target: str
    direction: Direction
    calls: int
    bytes: int  #: read and written
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BehindUse:
    """A leaf's weight multiplied while that leaf was not being called, so that no scope could act on it."""

    __pydantic_config__: ClassVar = STRICT

    unit: str | None
    parameter: str  #: canonical name
    operator: str
    executed: str
    caller: str  #: the innermost module that was running
    agrees: bool  #: whether it ran in the unit's format all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """A device kernel by name (CUDA only)."""

    __pydantic_config__: ClassVar = STRICT

    unit: str | None
    name: str
    calls: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What one step of a model with a plan in force really ran in."""

    __pydantic_config__: ClassVar = STRICT

    schema: str = "autoprec/audit@1"
    device: str
    backward: bool
    rows: tuple[AuditRow, ...]
    casts: tuple[CastRow, ...]
    behind: tuple[BehindUse, ...]
    #: leaves of units that were never called and whose weight nothing used: no figure holds for them
    unused: tuple[str, ...]
    kernels: tuple[KernelRow, ...]
    step_ms: float  #: of the audited step, slower than a plain one
    origin: Origin
    #: one sentence for each disagreement, with what to do
    disagreements: tuple[str, ...]
