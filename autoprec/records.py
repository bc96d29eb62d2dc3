"""The frozen records that flow through the house. Units are in the field names; every figure has its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format, Fp8Family, Fp8Recipe

__all__ = [
    "AuditReport",
    "AuditRow",
    "BehindUse",
    "CastRow",
    "DeviceProfile",
    "Direction",
    "Estimate",
    "FormatSupport",
    "GemmRate",
    "KernelRow",
    "Leaf",
    "LeafKind",
    "Measurement",
    "MeasurementOrigins",
    "Mode",
    "ModelProfile",
    "OpKind",
    "Origin",
    "Pinned",
    "Progress",
    "Removal",
    "Role",
    "SearchResult",
    "Support",
    "Task",
    "Unit",
    "Verdict",
    "VerdictDecision",
    "role_formats",
]

_STRICT = {"extra": "forbid"}  #: read by pydantic: a field nobody knows is an error, not a shrug


class Role(StrEnum):
    """What a unit or a pinned module does in the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    FFN = "ffn"
    LM_HEAD = "lm_head"
    CONV = "conv"
    ROUTER = "router"
    NORM = "norm"
    RESIDUAL = "residual"
    OTHER = "other"


class Mode(StrEnum):
    """What one step is: `train` is forward, backward and optimizer step; `infer` is forward."""

    TRAIN = "train"
    INFER = "infer"


class Task(StrEnum):
    """What a model's outputs mean, which decides the counted positions of the drop."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    CLASSIFICATION = "classification"
    ENCODER = "encoder"
    IMAGE = "image"
    SEQ2SEQ = "seq2seq"


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured"  #: measured here, on this device
    EMULATED = "emulated"  #: drop measured with emulated formats
    PREDICTED = "predicted"  #: from our model
    DATASHEET = "datasheet"  #: the vendor's word
    RECORDED = "recorded"  #: measured elsewhere, source named


class Support(StrEnum):
    """How a device computes in a format."""

    NATIVE = "native"  #: in hardware
    EMULATED = "emulated"  #: runs, but without units of its own, so without speed
    ABSENT = "absent"  #: refuses to run


class LeafKind(StrEnum):
    """How a leaf uses its weight."""

    LINEAR = "linear"  #: nn.Linear, weight [out, in]
    CONV1D = "conv1d"  #: Hugging Face Conv1D, weight [in, out]
    CONV = "conv"  #: convolution
    EMBEDDING = "embedding"  #: lookup
    ATTENTION = "attention"  #: nn.MultiheadAttention: all its projections, its `out_proj` listed beside it
    EXPERTS = "experts"  #: 3-D parameters, one matrix an expert; `inputs` the stream's width, `outputs` the inner one
    QUANTIZED = "quantized"  #: a linear layer whose stored weight is packed in 4 or 8 bits (QLoRA's base)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval and origin."""

    __pydantic_config__: ClassVar = _STRICT

    value: float
    low: float
    high: float
    origin: Origin


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest group of leaves that must share a format, with the formats it can take at all."""

    __pydantic_config__: ClassVar = _STRICT

    name: str
    role: Role
    modules: tuple[str, ...]
    formats: tuple[Format, ...]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Modules without a choice, and why."""

    __pydantic_config__: ClassVar = _STRICT

    modules: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module that owns a weight: `inputs` and `outputs` are its feature counts (for a lookup: rows and columns)."""

    __pydantic_config__: ClassVar = _STRICT

    module: str
    kind: LeafKind
    inputs: int
    outputs: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model as units: every leaf is in exactly one unit or pinned; `unassigned` must be empty."""

    __pydantic_config__: ClassVar = _STRICT

    model_id: str
    class_name: str
    fingerprint: str
    units: tuple[Unit, ...]
    pinned: tuple[Pinned, ...]
    unassigned: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    #: groups of leaves that share one storage
    tied: tuple[tuple[str, ...], ...]
    parameters: int

    def unit(self, name: str) -> Unit:
        """Return the unit called `name`; KeyError where there is none."""
        for unit in self.units:
            if unit.name == name:
                return unit
        raise KeyError(name)


def role_formats(role: Role) -> tuple[Format, ...]:
    """Return the formats a unit of this role can take: convolutions and embeddings have no FP8."""
    if role in (Role.EMBEDDING, Role.CONV):
        return (Format.FP32, Format.BF16, Format.FP16)
    return tuple(Format)


@dataclass(frozen=True, slots=True)
class FormatSupport:
    """Whether and how a device computes in a format; `reason` says how it is known."""

    __pydantic_config__: ClassVar = _STRICT

    support: Support
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """Measured rate of a square matmul of side `size`, TFLOP/s, median and 95 % interval."""

    __pydantic_config__: ClassVar = _STRICT

    format: Format
    size: int
    tflops: float
    tflops_low: float
    tflops_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device can compute in, and how fast. Measured on a device that is here, else from the catalogue."""

    __pydantic_config__: ClassVar = _STRICT

    name: str
    kind: str  #: torch device type: cpu, cuda, mps, xpu
    origin: Origin
    formats: Mapping[Format, FormatSupport]
    tf32: FormatSupport
    fp8_family: Fp8Family | None = None
    fp8_recipes: tuple[Fp8Recipe, ...] = ()
    architecture: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    #: instruction sets that matter here (CPU)
    instructions: tuple[str, ...] = ()
    threads: int | None = None
    gemm_rates: tuple[GemmRate, ...] = ()
    copy_gb_per_s: Estimate | None = None
    #: vendor's dense peaks, TFLOP/s with FP32 accumulation, and memory bandwidth
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_gb_per_s: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def supports(self, choice: Format) -> Support:
        """Return the support of a format; what was never said is absent."""
        known = self.formats.get(choice)
        return known.support if known else Support.ABSENT

    @property
    def ambient(self) -> Format:
        """Return the ambient format of low-precision plans: bf16 where native, else fp16, else fp32."""
        for choice in (Format.BF16, Format.FP16):
            if self.supports(choice) is Support.NATIVE:
                return choice
        return Format.FP32


@dataclass(frozen=True, slots=True)
class Removal:
    """A format taken from a unit's choices by the device, the space or a veto, and why."""

    __pydantic_config__: ClassVar = _STRICT

    unit: str
    format: Format
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOrigins:
    """Origin of each figure of a measurement."""

    __pydantic_config__: ClassVar = _STRICT

    drop: Origin | None = None
    step_ms: Origin | None = None
    peak_bytes: Origin | None = None
    metric: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One assignment measured against the reference (design of the figures: docs/measurement.md).

    `speedup` is the median of paired ratios reference / plan. `step_ms` is the median reference step divided by it:
    of `reference_step_ms`, this measurement's own, or of a whole search, so that its figures share one clock. `drop`
    is in nats, or a relative squared error for models of values.
    A figure that was not measured is None; `reason` says why.
    """

    __pydantic_config__: ClassVar = _STRICT

    name: str
    assignment: Mapping[str, Format]
    drop: float | None = None
    drop_ci95: tuple[float, float] | None = None
    drop_percent: float | None = None
    loss_rise: float | None = None
    loss_rise_ci95: tuple[float, float] | None = None
    grad_error: float | None = None
    grad_error_limit: float | None = None
    step_ms: float | None = None
    step_ms_ci95: tuple[float, float] | None = None
    reference_step_ms: float | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    speedup_over_uniform: float | None = None
    peak_bytes: int | None = None
    metric: float | None = None
    origin: MeasurementOrigins = MeasurementOrigins()
    plan: str | None = None
    reason: str | None = None


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

    `executed` is the format of the operands as they reached the kernel: `fp32 tf32 bf16 fp16 fp64`, or `fp8` and
    `fp8 (emulated)`, the latter where FP32 operands hold FP8 values only. `planned` is None where the plan decides
    nothing (norms, softmax, what is outside units). `agrees` is None there too; `reason` explains what differs.
    """

    __pydantic_config__: ClassVar = _STRICT

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CastRow:
    """Casts between floating formats in one unit (None: outside units), counted and timed in one step."""

    __pydantic_config__: ClassVar = _STRICT

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

    __pydantic_config__: ClassVar = _STRICT

    unit: str | None
    parameter: str  #: canonical name
    operator: str
    executed: str
    caller: str  #: the innermost module that was running
    agrees: bool  #: whether it ran in the unit's format all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """A device kernel by name (CUDA only)."""

    __pydantic_config__: ClassVar = _STRICT

    unit: str | None
    name: str
    calls: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What one step of a model with a plan in force really ran in."""

    __pydantic_config__: ClassVar = _STRICT

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


class VerdictDecision(StrEnum):
    """What to do after a search."""

    USE_PLAN = "use-plan"
    USE_UNIFORM = "use-uniform"
    DO_NOTHING = "do-nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer of a search in one sentence, with the best uniform plan within the limit."""

    __pydantic_config__: ClassVar = _STRICT

    decision: VerdictDecision
    text: str
    best_uniform: str | None
    break_even_hours: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All that a search found (`result.json`); `chosen` is an index of `front`, or None for do-nothing."""

    __pydantic_config__: ClassVar = _STRICT

    schema: str = "autoprec/search@1"
    model_id: str
    device: str
    mode: Mode
    max_drop: str
    reference: Measurement
    baselines: tuple[Measurement, ...]
    front: tuple[Measurement, ...]
    chosen: int | None
    verdict: Verdict
    trials: int
    evaluations: int
    seconds: float
    #: what the tables of a solver promise at best; absent until there is a solver
    predicted_bound: Mapping[str, float] | None
    removed: tuple[Removal, ...]
    folder: str | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One line of news from a running search, for whoever shows it."""

    stage: str  #: probe, baselines, search, done
    message: str
    elapsed_seconds: float
    #: expected seconds until the end of this stage, where it can be told
    eta_seconds: float | None = None
    trial: int | None = None
    measurement: Measurement | None = None
