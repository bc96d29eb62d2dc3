"""Whole tables of units, ties and routers, written by hand from the models' own code, for each architecture."""

from __future__ import annotations

import pytest
from zoo import ZOO

from autoprec.probe.units import probe_units

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # bitsandbytes and PEFT import torch.jit
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Row = tuple[str, str, list[str]]
Ties = tuple[tuple[str, ...], ...]
#: units, groups of one storage, routers
Table = tuple[list[Row], Ties, list[str]]

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
KVQO = ["k_proj", "v_proj", "q_proj", "out_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]


def under(prefix: str, names: list[str]) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


def blocks(prefix: str, *parts: tuple[str, str, str, list[str]]) -> list[Row]:
    """Two blocks: (name, role, path of the block with {}, leaves within it) for each part."""
    return [
        (f"{prefix}blocks.{i}.{name}", role, under(path.format(i), names))
        for i in (0, 1)
        for name, role, path, names in parts
    ]


def decoder(ffn: list[str], tied: bool = False, attention: list[str] = QKVO, routed: bool = False) -> Table:
    """A decoder of the Llama family."""
    attend = ("attention", "attention", "model.layers.{}.self_attn", attention)
    rows = blocks("", attend, ("ffn", "ffn", "model.layers.{}.mlp", ffn))
    units = [("embeddings", "embedding", ["model.embed_tokens"]), *rows, ("lm_head", "lm_head", ["lm_head"])]
    routers = [f"model.layers.{i}.mlp.gate" for i in (0, 1)] if routed else []
    return units, (("model.embed_tokens", "lm_head"),) if tied else (), routers


def adapted(names: list[str]) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("base_layer", "lora_A.default", "lora_B.default")]


def lora() -> Table:
    return decoder(adapted(GATED), attention=adapted(QKVO))


def albert() -> Table:
    layer, tables = "albert.encoder.albert_layer_groups.0.albert_layers.0", "albert.embeddings"
    return (
        [
            ("embeddings", "embedding", under(tables, [f"{n}_embeddings" for n in ("word", "position", "token_type")])),
            ("blocks.0.0.attention", "attention", under(f"{layer}.attention", ["query", "key", "value", "dense"])),
            ("blocks.0.0.ffn", "ffn", under(layer, ["ffn", "ffn_output"])),
            ("embedding_hidden_mapping_in", "other", ["albert.encoder.embedding_hidden_mapping_in"]),
            ("predictions.dense", "other", ["predictions.dense"]),
            ("lm_head", "lm_head", ["predictions.decoder"]),
        ],
        ((f"{tables}.word_embeddings", "predictions.decoder"),),
        [],
    )


def deberta() -> Table:
    layer, word = "deberta.encoder.layer.{}", "deberta.embeddings.word_embeddings"
    projections = [*under("attention.self", ["query_proj", "key_proj", "value_proj"]), "attention.output.dense"]
    rows = blocks(
        "",
        ("attention", "attention", layer, projections),
        ("ffn", "ffn", layer, ["intermediate.dense", "output.dense"]),
    )
    lookups = [word, "deberta.embeddings.position_embeddings", "deberta.encoder.rel_embeddings"]
    transform = ("cls.predictions.transform", "other", ["cls.predictions.transform.dense"])
    head = "cls.predictions.decoder"
    return [("embeddings", "embedding", lookups), *rows, transform, ("lm_head", "lm_head", [head])], ((word, head),), []


def gpt_neox() -> Table:
    rows = blocks(
        "",
        ("attention", "attention", "gpt_neox.layers.{}.attention", ["query_key_value", "dense"]),
        ("ffn", "ffn", "gpt_neox.layers.{}.mlp", ["dense_h_to_4h", "dense_4h_to_h"]),
    )
    return [("embeddings", "embedding", ["gpt_neox.embed_in"]), *rows, ("lm_head", "lm_head", ["lm_head"])], (), []


def phi() -> Table:
    return decoder(["fc1", "fc2"], attention=["q_proj", "k_proj", "v_proj", "dense"])


def two_sided(first: list[Row], before: list[Row], tied: Ties, decoder_lookups: list[str], head: str) -> Table:
    """An encoder and a decoder of the BART family; `before` stands before the encoder's blocks."""
    attend, cross = "model.{}.layers.{{}}.self_attn", "model.{}.layers.{{}}.encoder_attn"
    sides = {
        side: [
            ("attention", "attention", attend.format(side), KVQO),
            *([("cross_attention", "attention", cross.format(side), KVQO)] if side == "decoder" else []),
            ("ffn", "ffn", f"model.{side}.layers.{{}}", ["fc1", "fc2"]),
        ]
        for side in ("encoder", "decoder")
    }
    units = [
        *first,
        *before,
        *blocks("encoder.", *sides["encoder"]),
        ("decoder.embeddings", "embedding", under("model.decoder", decoder_lookups)),
        *blocks("decoder.", *sides["decoder"]),
        ("lm_head", "lm_head", [head]),
    ]
    return units, tied, []


def bart() -> Table:
    lookups = ["embed_tokens", "embed_positions"]
    tied = (("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),)
    before: list[Row] = [("encoder.embeddings", "embedding", under("model.encoder", lookups))]
    return two_sided([("embeddings", "embedding", ["model.shared"])], before, tied, lookups, "lm_head")


def whisper() -> Table:
    before: list[Row] = [
        ("encoder.embeddings", "embedding", ["model.encoder.embed_positions"]),
        ("encoder.conv", "conv", ["model.encoder.conv1", "model.encoder.conv2"]),
    ]
    tied = (("model.decoder.embed_tokens", "proj_out"),)
    return two_sided([], before, tied, ["embed_tokens", "embed_positions"], "proj_out")


def clip() -> Table:
    def tower(side: str) -> list[Row]:
        layer = f"{side}_model.encoder.layers.{{}}"
        attend = ("attention", "attention", f"{layer}.self_attn", KVQO)
        return blocks(f"{side}_model.", attend, ("ffn", "ffn", f"{layer}.mlp", ["fc1", "fc2"]))

    tables = under("text_model.embeddings", ["token_embedding", "position_embedding"])
    return (
        [
            ("text_model.embeddings", "embedding", tables),
            *tower("text"),
            ("vision_model.embeddings", "embedding", ["vision_model.embeddings.position_embedding"]),
            ("vision_model.conv", "conv", ["vision_model.embeddings.patch_embedding"]),
            *tower("vision"),
            ("visual_projection", "other", ["visual_projection"]),
            ("text_projection", "other", ["text_projection"]),
        ],
        (),
        [],
    )


def batchnorm_cnn() -> Table:
    """Residual stages of two blocks; the second stage's first block has a shortcut convolution."""
    stages: list[Row] = []
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):
        path = f"resnet.encoder.stages.{stage}.layers.{block}"
        shortcut = [f"{path}.shortcut.convolution"] if (stage, block) == (1, 0) else []
        layers = [*shortcut, *under(f"{path}.layer", ["0.convolution", "1.convolution"])]
        stages.append((f"blocks.{stage}.{block}.conv", "conv", layers))
    stem = ("conv", "conv", ["resnet.embedder.embedder.convolution"])
    return [stem, *stages, ("classifier", "lm_head", ["classifier.1"])], (), []


def mamba() -> Table:
    leaves = ["conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"]
    rows = blocks("", ("mixer", "other", "backbone.layers.{}.mixer", leaves))
    tied = (("backbone.embeddings", "lm_head"),)
    return [("embeddings", "embedding", ["backbone.embeddings"]), *rows, ("lm_head", "lm_head", ["lm_head"])], tied, []


def bare_gpt() -> Table:
    rows = blocks(
        "",
        ("attention", "attention", "blocks.{}", ["qkv", "proj"]),
        ("ffn", "ffn", "blocks.{}", ["fc1", "fc2"]),
    )
    return [("embeddings", "embedding", ["wte", "wpe"]), *rows, ("lm_head", "lm_head", ["head"])], (), []


#: those of the others (BERT, RoBERTa, GPT-2, OPT, T5, ViT, PyTorch's encoder) are in test_units and test_units_zoo
TABLES: dict[str, Table] = {
    "albert": albert(),
    "deberta": deberta(),
    "gpt_neox": gpt_neox(),
    "llama": decoder(GATED),
    "llama_tied": decoder(GATED, tied=True),
    "qwen3": decoder(GATED),
    "gemma3": decoder(GATED, tied=True),
    "phi": phi(),
    "mistral": decoder(GATED),
    "mixtral": decoder(["experts"], routed=True),
    "qwen3_moe": decoder(["experts"], routed=True),
    "bart": bart(),
    "whisper": whisper(),
    "clip": clip(),
    "batchnorm_cnn": batchnorm_cnn(),
    "mamba": mamba(),
    "peft_lora": lora(),
    "qlora": lora(),
    "bare_gpt": bare_gpt(),
}


@pytest.mark.parametrize("name", TABLES)
def test_units_ties_and_routers(name: str) -> None:
    profile = probe_units(ZOO[name]().model)
    units, tied, routers = TABLES[name]
    assert [(u.name, u.role.value, list(u.modules)) for u in profile.units] == units
    assert profile.tied == tied
    assert [m for p in profile.pinned if p.reason.startswith("router") for m in p.modules] == routers
