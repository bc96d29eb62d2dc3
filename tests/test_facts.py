"""Facts from configurations as publishers wrote them: their names, and what they leave out."""

from __future__ import annotations

from typing import Any

import pytest

from autoprec.errors import ModelError
from autoprec.facts import facts_of
from autoprec.records import Architecture

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def test_a_decoder() -> None:
    facts = facts_of(LLAMA, "meta-llama/Meta-Llama-3-8B")
    assert facts.model_id == "meta-llama/Meta-Llama-3-8B" and facts.architecture is Architecture.DECODER
    assert (facts.hidden, facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (4096, 32, 32, 8, 128)
    assert (facts.ffn, facts.gated, facts.vocab, facts.max_positions) == (14336, True, 128256, 8192)
    assert not facts.tied and facts.experts == facts.experts_per_token == facts.decoder_layers == 0


def test_what_a_configuration_leaves_out_is_its_familys_default() -> None:
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "tie_word_embeddings", "hidden_act")}
    facts = facts_of(bare)
    assert facts.kv_heads == 32 and not facts.tied and facts.gated
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    facts = facts_of(gpt2)
    assert (facts.ffn, facts.gated, facts.tied, facts.max_positions) == (3072, False, True, 1024)


def test_arrangements() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
    assert facts_of({**sizes, "model_type": "bert"}).architecture is Architecture.ENCODER
    assert (
        facts_of({**sizes, "model_type": "x", "architectures": ["XForMaskedLM"]}).architecture is Architecture.ENCODER
    )
    t5 = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6}
    facts = facts_of({**t5, "num_layers": 8, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu"})
    assert facts.architecture is Architecture.ENCODER_DECODER and facts.gated
    assert (facts.layers, facts.decoder_layers, facts.head_dim, facts.ffn) == (8, 4, 64, 1024)
    vit = {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    facts = facts_of({**vit, "intermediate_size": 3072, "image_size": 224, "patch_size": 16})
    assert facts.architecture is Architecture.VISION and facts.max_positions == 14 * 14 + 1 and facts.vocab == 0


def test_experts_and_parts() -> None:
    moe = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
    facts = facts_of({**moe, "moe_intermediate_size": 768, "head_dim": 64})
    assert (facts.experts, facts.experts_per_token, facts.ffn, facts.head_dim) == (128, 8, 768, 64)
    assert facts_of({"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}}).hidden == 4096


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "does not give its hidden size"),
        ({"num_attention_heads": 0}, "does not give its attention heads"),
        ({"num_hidden_layers": "32"}, "has num_hidden_layers = '32'; it must be a whole number"),
        ({"vocab_size": -1}, "vocab_size = -1"),
    ],
)
def test_missing_and_impossible_numbers(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        facts_of(LLAMA | change, "broken/model")
