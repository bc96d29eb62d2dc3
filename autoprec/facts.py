"""Facts of a model from its configuration, a Hugging Face config.json as a mapping; transformers is not needed.

Families name the same number differently, and leave out what is their default. The names are those of the
configuration classes of transformers 5.23 (`attribute_map` and fields).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprec.errors import ModelError
from autoprec.records import Architecture, ModelFacts

__all__ = ["SIZES", "facts_of"]

_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
_LAYERS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layer", "n_layers")
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", "num_layers")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "d_kv", "qk_head_dim", "v_head_dim")
_EXPERT_FFN = ("moe_intermediate_size", "expert_ffn_hidden_size")
_FFN = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "hidden_dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "seq_length")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
#: what a model's sizes are called
SIZES = {
    "hidden": _HIDDEN,
    "layers": _LAYERS,
    "heads": _HEADS,
    "kv_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "ffn": _FFN,
    "vocab": ("vocab_size",),
    "positions": _POSITIONS,
}

#: inner width of the FFN as a multiple of the stream's where the configuration leaves it to its default
_FFN_MULTIPLE = 4
#: activations that transformers' gated FFNs use and others do not
_GATED_ACTIVATIONS = frozenset({"silu", "swish"})
#: families whose FFN is gated whatever its activation, and those with a plain one though it is SiLU
_GATED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "modernbert", "gpt_oss"})
_PLAIN = frozenset({"mpt", "falcon", "nemotron"})
#: families whose output head has its own weight unless the configuration says otherwise
_UNTIED = frozenset(
    {
        "codegen", "deepseek_v2", "deepseek_v3", "gpt_neox", "gpt_oss", "gptj", "granite", "llama", "mistral",
        "mixtral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm",
    }
)  # fmt: skip
#: families without `is_encoder_decoder` or a class name that would tell
_ENCODERS = frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
     "xlm-roberta"}
)  # fmt: skip


def facts_of(config: Mapping[str, Any], model_id: str = "") -> ModelFacts:
    """Return the facts of a model from its configuration.

    Args:
        config: the contents of a config.json; of a model of several parts, its `text_config` is read.
        model_id: the name the facts carry; '' takes the configuration's own.

    Raises:
        ModelError: hidden size, layers or heads are missing, or a number is not a whole one above zero.
    """
    name = model_id or str(config.get("_name_or_path") or "")
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {**config, **inner}
    kind = _architecture(config)
    said = _Reader(config, name or "the model")
    hidden, heads = said.needed("hidden size", _HIDDEN), said.needed("attention heads", _HEADS)
    layers, decoder = said.needed("layers", _LAYERS), 0
    if kind is Architecture.ENCODER_DECODER:
        decoder = said.number(_DECODER_LAYERS) or layers
    experts = said.number(_EXPERTS) or 0
    ffn = (said.number(_EXPERT_FFN) if experts else None) or said.number(_FFN)
    return ModelFacts(
        model_id=name,
        architecture=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(config, said, heads),
        head_dim=_head_dim(said, hidden, heads),
        ffn=ffn or _expansion(said) * hidden,
        gated=_gated(config),
        vocab=0 if kind is Architecture.VISION else said.number(("vocab_size",)) or 0,
        max_positions=_patches(config) if kind is Architecture.VISION else said.number(_POSITIONS),
        tied=_tied(config, kind),
        experts=experts,
        experts_per_token=(said.number(_EXPERTS_PER_TOKEN) or 1) if experts else 0,
        decoder_layers=decoder,
    )


class _Reader:
    """Numbers of a configuration under any of the names families give them."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def number(self, names: tuple[str, ...]) -> int | None:
        """Return the first of `names` that is given; None where none is."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ModelError(f"the configuration of {self.name} has {name} = {value!r}; it must be a whole number")
            return value
        return None

    def needed(self, what: str, names: tuple[str, ...]) -> int:
        """Return the first of `names` that is given and above zero."""
        value = self.number(names)
        if not value:
            raise ModelError(f"the configuration of {self.name} does not give its {what} (any of {', '.join(names)})")
        return value


def _architecture(config: Mapping[str, Any]) -> Architecture:
    """Tell the arrangement of blocks by what the configuration says, then by its classes and family."""
    if config.get("is_encoder_decoder"):
        return Architecture.ENCODER_DECODER
    if "patch_size" in config and "vocab_size" not in config:
        return Architecture.VISION
    classes = " ".join(str(name) for name in config.get("architectures") or ())
    if "CausalLM" in classes or "LMHeadModel" in classes or config.get("is_decoder"):
        return Architecture.DECODER
    masked = "MaskedLM" in classes or "PreTraining" in classes
    return Architecture.ENCODER if masked or config.get("model_type") in _ENCODERS else Architecture.DECODER


def _kv_heads(config: Mapping[str, Any], said: _Reader, heads: int) -> int:
    # Falcon: one key and value head where `multi_query` is set, unless the newer arrangement counts them
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return said.number(_KV_HEADS) or heads


def _head_dim(said: _Reader, hidden: int, heads: int) -> int:
    # DeepSeek: queries and keys have a part without and a part with positions
    rotated, plain = said.number(("qk_rope_head_dim",)), said.number(("qk_nope_head_dim",))
    if rotated and plain:
        return rotated + plain
    return said.number(_HEAD_DIM) or hidden // heads


def _expansion(said: _Reader) -> int:
    return said.number(("expansion_ratio",)) or _FFN_MULTIPLE


def _gated(config: Mapping[str, Any]) -> bool:
    """Tell whether the FFN has gate and up projections."""
    family = config.get("model_type")
    if "is_gated_act" in config:
        return bool(config["is_gated_act"])
    if isinstance(config.get("feed_forward_proj"), str):
        return bool(config["feed_forward_proj"].startswith("gated"))
    if family in _GATED or family in _PLAIN:
        return family in _GATED
    activation = config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function")
    if activation is None:  # the default of the families that leave it out
        return family in _UNTIED - {"codegen", "gpt_neox", "gptj", "phi"}
    return activation in _GATED_ACTIVATIONS


def _tied(config: Mapping[str, Any], kind: Architecture) -> bool:
    if kind is Architecture.VISION:
        return False
    said = config.get("tie_word_embeddings")
    return config.get("model_type") not in _UNTIED if said is None else bool(said)


def _patches(config: Mapping[str, Any]) -> int | None:
    """Return the positions of an image model: its patches and the class token."""
    image, patch = config.get("image_size"), config.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and patch > 0:
        return (image // patch) ** 2 + 1
    return None
