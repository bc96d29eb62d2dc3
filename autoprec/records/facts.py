"""The numbers of a model's configuration that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autoprec.records.figures import STRICT

__all__ = ["Architecture", "ModelFacts"]


class Architecture(StrEnum):
    """How a model's blocks are arranged."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_DECODER = "encoder-decoder"
    VISION = "vision"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a configuration says of a model's size. Counts of features, blocks, heads, rows and positions."""

    __pydantic_config__: ClassVar = STRICT

    model_id: str
    architecture: Architecture
    #: width of the residual stream
    hidden: int
    #: blocks; of an encoder-decoder those of the encoder
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    #: inner width of a block's FFN; with experts, of one expert
    ffn: int
    #: the FFN multiplies two projections (gate and up), so it has three matrices
    gated: bool
    #: rows of the token embedding; 0 where there is none
    vocab: int
    #: longest sequence the positions allow, in tokens or patches; None where they set no limit
    max_positions: int | None
    #: token embedding and output head are one storage
    tied: bool
    #: experts in a block that has them; 0 in a dense model
    experts: int = 0
    experts_per_token: int = 0
    #: blocks of the decoder of an encoder-decoder
    decoder_layers: int = 0
