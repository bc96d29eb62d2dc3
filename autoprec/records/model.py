"""A model as leaves, units and pinned modules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.formats import Format
from autoprec.records.figures import STRICT

__all__ = [
    "Leaf",
    "LeafKind",
    "ModelProfile",
    "Pinned",
    "Role",
    "Task",
    "Unit",
    "role_formats",
    "structure_fingerprint",
]


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


class Task(StrEnum):
    """What a model's outputs mean, which decides the counted positions of the drop."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    CLASSIFICATION = "classification"
    ENCODER = "encoder"
    IMAGE = "image"
    SEQ2SEQ = "seq2seq"


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
class Unit:
    """The smallest group of leaves that must share a format, with the formats it can take at all."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    role: Role
    modules: tuple[str, ...]
    formats: tuple[Format, ...]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Modules without a choice, and why."""

    __pydantic_config__: ClassVar = STRICT

    modules: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module that owns a weight: `inputs` and `outputs` are its feature counts (for a lookup: rows and columns)."""

    __pydantic_config__: ClassVar = STRICT

    module: str
    kind: LeafKind
    inputs: int
    outputs: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model as units: every leaf is in exactly one unit or pinned; `unassigned` must be empty."""

    __pydantic_config__: ClassVar = STRICT

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


def structure_fingerprint(modules: Iterable[Sequence[object]], ties: Iterable[Iterable[str]]) -> str:
    """Return the sha256 of a structure.

    Args:
        modules: of each its name, its class, and its parameters as sorted pairs of name and shape.
        ties: names of parameters that are one.
    """
    rows, groups = sorted(modules, key=str), sorted(sorted(group) for group in ties)
    return hashlib.sha256(json.dumps([rows, groups], separators=(",", ":")).encode()).hexdigest()
