"""What a device can compute in, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.records.figures import STRICT, Estimate, Origin

__all__ = [
    "DeviceProfile",
    "FormatSupport",
    "GemmRate",
    "Hardware",
    "Support",
]


class Support(StrEnum):
    """How a device computes in a format."""

    NATIVE = "native"  #: in hardware
    EMULATED = "emulated"  #: runs, but without units of its own, so without speed
    ABSENT = "absent"  #: refuses to run


@dataclass(frozen=True, slots=True)
class FormatSupport:
    """Whether and how a device computes in a format; `reason` says how it is known."""

    __pydantic_config__: ClassVar = STRICT

    support: Support
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """Measured rate of a square matmul of side `size`, TFLOP/s, median and 95 % interval."""

    __pydantic_config__: ClassVar = STRICT

    format: Format
    size: int
    tflops: float
    tflops_low: float
    tflops_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a time model needs of a device beside its peaks; None where nobody says."""

    __pydantic_config__: ClassVar = STRICT

    vendor: str
    #: streaming multiprocessors, or compute units
    multiprocessors: int | None = None
    #: what the board may draw
    power_watts: float | None = None
    #: FP32 peak of matrix units, where matmuls run on them and not on vector units
    fp32_matrix_tflops: float | None = None
    #: share of the peak that the best measured matmul reaches, by format
    achieved_fraction: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device can compute in, and how fast. Measured on a device that is here, else from the catalogue."""

    __pydantic_config__: ClassVar = STRICT

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
    #: what its host takes to launch one small matmul, in µs; not of CPUs, and only where it was measured
    launch_us: Estimate | None = None
    #: vendor's dense peaks, TFLOP/s with FP32 accumulation, and memory bandwidth
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_gb_per_s: float | None = None
    hardware: Hardware | None = None
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
