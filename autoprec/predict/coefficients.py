"""The fitted numbers of the time model: a small table, `profiles/timing.json`, written by `benchmarks/fit_timing.py`.

A number here is a property of a kind of hardware or of a library, never of one card: what a card brings are its peaks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from autoprec.catalog import data_files
from autoprec.errors import AutoprecError
from autoprec.files import from_json

__all__ = [
    "SCHEMA",
    "AttentionShares",
    "Coefficients",
    "Engine",
    "Family",
    "Spread",
    "Sustained",
    "coefficients",
    "read_coefficients",
]

SCHEMA = "autoprec/timing@1"
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the matmuls of vector units, or of matrix units, come near their sustained rate."""

    __pydantic_config__: ClassVar = _STRICT
    #: rate of the best shape over the card's sustained rate
    reach: float
    #: rows and columns of a tile whose loading takes as long as its arithmetic: small tiles are slower
    edge: float
    #: time of a tile beside its arithmetic: filling the pipeline, writing the result
    tile_seconds: float
    #: how much a last wave that is not full costs: 1 a whole wave, 0 its share
    wave: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShares:
    """Rates of fused attention over the sustained matmul rate of its format, and the length at half of it."""

    __pydantic_config__: ClassVar = _STRICT
    forward: float
    backward: float
    half_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What cards of one vendor have in common."""

    __pydantic_config__: ClassVar = _STRICT
    vector: Engine
    matrix: Engine
    #: by architecture; `other` where it has no figures of its own
    attention: Mapping[str, AttentionShares]
    #: inner dimension at which a tile takes twice as long, by architecture; others do not mind long rows
    long_rows: Mapping[str, float]
    #: share of the bandwidth that matmuls get
    matmul_bandwidth: float
    #: share that elementwise kernels get of the datasheet's bandwidth
    move_bandwidth: float
    #: least time of a kernel on the device
    start_seconds: float
    #: of joining the parts of a matmul that was split along K
    split_seconds: float
    #: what timing one eager call by events adds, as some published tables did
    event_seconds: float
    #: what the host needs for an operation of an eager step, and of a compiled one
    eager_seconds: float
    compiled_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sustained:
    """What large matmuls reach of a peak where nobody measured it: a share, less where the board's power is short."""

    __pydantic_config__: ClassVar = _STRICT
    #: share with power to spare, by kind of unit
    share: Mapping[str, float]
    #: TFLOP/s a watt (16-bit matrix units, and vector units) that a process feeds at full clock, by architecture
    matrix_per_watt: Mapping[str, float]
    vector_per_watt: Mapping[str, float]
    #: the rate goes with (power / power wanted) to this exponent
    exponent: float
    #: rate of a format that only widens to FP32, over FP32's
    emulated: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Half-widths of intervals, as logarithms: what the errors were on cards that were left out of the fit."""

    __pydantic_config__: ClassVar = _STRICT
    gemm: Mapping[str, float]
    step: Mapping[str, float]
    #: of one step's time over another's, in another format on the same card
    ratio: float
    #: added in quadrature where the card's sustained rate is itself an estimate
    unmeasured: float
    #: the same for boards of 75 W and less: how warm one runs decides what it sustains
    low_power: float
    #: factor for what lies outside what was fitted
    outside: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """All of the time model's numbers."""

    __pydantic_config__: ClassVar = _STRICT
    families: Mapping[str, Family]
    sustained: Sustained
    spread: Spread
    #: (least, most) of what was fitted: GFLOP of a matmul, and tokens of a step
    fitted_gflop: tuple[float, float]
    fitted_tokens: tuple[int, int]


@cache
def coefficients() -> Coefficients:
    """Return the table that ships with the package.

    Raises:
        AutoprecError: it is missing or damaged.
    """
    files = data_files("profiles", ending=".json")
    if "timing" not in files:
        raise AutoprecError("the table of the time model is missing; install autoprec again")
    return read_coefficients(json.loads(files["timing"].read_text(encoding="utf-8")))


def read_coefficients(document: Any) -> Coefficients:
    """Return the coefficients of a document of schema `autoprec/timing@1`.

    Raises:
        AutoprecError: another schema, or a missing, unknown or ill-typed field.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise AutoprecError(f"the table of the time model is not of schema {SCHEMA}; install autoprec again")
    return from_json(Coefficients, document["coefficients"], what="table of the time model")
