"""Units found by structure, against tables written by hand for real architectures at small sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autoprec.errors import ModelError
from autoprec.probe.units import probe_units
from autoprec.records import LeafKind, ModelProfile, Role, role_formats

#: name, role, modules
Table = list[tuple[str, str, list[str]]]

_BERT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = _BERT | {"vocab_size": 100, "num_key_value_heads": 2, "pad_token_id": 0}


def table(profile: ModelProfile) -> Table:
    return [(u.name, u.role.value, list(u.modules)) for u in profile.units]


def under(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


def check_whole(model: nn.Module, profile: ModelProfile) -> None:
    """Every leaf stands once, in a unit or pinned, with true figures; every named module exists."""
    placed = [m for u in profile.units for m in u.modules] + [m for p in profile.pinned for m in p.modules]
    assert len(placed) == len(set(placed))
    modules = dict(model.named_modules())
    assert set(placed) <= set(modules)
    leaves = {leaf.module for leaf in profile.leaves}
    assert leaves <= set(placed)
    assert {m for u in profile.units for m in u.modules} <= leaves
    expected = {n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)}
    assert expected <= leaves
    assert profile.unassigned == ()
    assert len({u.name for u in profile.units}) == len(profile.units)
    assert all(u.formats == role_formats(u.role) for u in profile.units)
    assert profile.parameters == sum(p.numel() for p in model.parameters())
    for leaf in profile.leaves:
        assert leaf.parameters == sum(p.numel() for p in modules[leaf.module].parameters(recurse=False))


def llama_block(path: str, name: str) -> Table:
    return [
        (f"{name}.attention", "attention", under(f"{path}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")),
        (f"{name}.ffn", "ffn", under(f"{path}.mlp", "gate_proj", "up_proj", "down_proj")),
    ]


def bert_body(prefix: str, embeddings: list[str], *, name: str = "blocks.0") -> Table:
    path = f"{prefix}encoder.layer.0"
    attention = [*under(f"{path}.attention.self", "query", "key", "value"), f"{path}.attention.output.dense"]
    return [
        ("embeddings", "embedding", [f"{prefix}embeddings.{e}" for e in embeddings]),
        (f"{name}.attention", "attention", attention),
        (f"{name}.ffn", "ffn", [f"{path}.intermediate.dense", f"{path}.output.dense"]),
    ]


_BERT_LOOKUPS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
_ROBERTA_LOOKUPS = ["word_embeddings", "token_type_embeddings", "position_embeddings"]


def gpt2() -> tuple[nn.Module, Table]:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    blocks = [
        row
        for i in range(2)
        for row in (
            (f"blocks.{i}.attention", "attention", under(f"transformer.h.{i}.attn", "c_attn", "c_proj")),
            (f"blocks.{i}.ffn", "ffn", under(f"transformer.h.{i}.mlp", "c_fc", "c_proj")),
        )
    ]
    return transformers.GPT2LMHeadModel(config), [
        ("embeddings", "embedding", under("transformer", "wte", "wpe")),
        *blocks,
        ("lm_head", "lm_head", ["lm_head"]),
    ]


def decoder(model: nn.Module) -> tuple[nn.Module, Table]:
    return model, [
        ("embeddings", "embedding", ["model.embed_tokens"]),
        *llama_block("model.layers.0", "blocks.0"),
        ("lm_head", "lm_head", ["lm_head"]),
    ]


def llama() -> tuple[nn.Module, Table]:
    return decoder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)))


def llama_tied() -> tuple[nn.Module, Table]:
    return decoder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)))


def mistral() -> tuple[nn.Module, Table]:
    return decoder(transformers.MistralForCausalLM(transformers.MistralConfig(**_LLAMA)))


def qwen3() -> tuple[nn.Module, Table]:
    # heads wider together than the stream: q and o look like an expand-then-contract pair
    return decoder(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, head_dim=16)))


def bert() -> tuple[nn.Module, Table]:
    model = transformers.BertModel(transformers.BertConfig(**_BERT, vocab_size=100))
    return model, [*bert_body("", _BERT_LOOKUPS), ("pooler", "other", ["pooler.dense"])]


def bert_masked_lm() -> tuple[nn.Module, Table]:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_BERT, vocab_size=100)), [
        *bert_body("bert.", _BERT_LOOKUPS),
        ("cls.predictions.transform", "other", ["cls.predictions.transform.dense"]),
        ("lm_head", "lm_head", ["cls.predictions.decoder"]),
    ]


def bert_classifier() -> tuple[nn.Module, Table]:
    # two labels, as many as token types: the classifier must not pass for a projection to a vocabulary
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT, vocab_size=100)), [
        *bert_body("bert.", _BERT_LOOKUPS),
        ("pooler", "other", ["bert.pooler.dense"]),
        ("classifier", "lm_head", ["classifier"]),
    ]


def roberta() -> tuple[nn.Module, Table]:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_BERT, vocab_size=100)), [
        *bert_body("roberta.", _ROBERTA_LOOKUPS),
        ("lm_head.dense", "other", ["lm_head.dense"]),
        ("lm_head", "lm_head", ["lm_head.decoder"]),
    ]


def opt() -> tuple[nn.Module, Table]:
    config = transformers.OPTConfig(
        num_hidden_layers=1,
        hidden_size=32,
        ffn_dim=64,
        num_attention_heads=4,
        vocab_size=100,
        word_embed_proj_dim=16,
        max_position_embeddings=16,
    )
    layer = "model.decoder.layers.0"
    return transformers.OPTForCausalLM(config), [
        ("embeddings", "embedding", under("model.decoder", "embed_tokens", "embed_positions")),
        ("blocks.0.attention", "attention", under(f"{layer}.self_attn", "k_proj", "v_proj", "q_proj", "out_proj")),
        ("blocks.0.ffn", "ffn", under(layer, "fc1", "fc2")),
        ("project_out", "other", ["model.decoder.project_out"]),
        ("project_in", "other", ["model.decoder.project_in"]),
        ("lm_head", "lm_head", ["lm_head"]),
    ]


def vit() -> tuple[nn.Module, Table]:
    config = transformers.ViTConfig(**_BERT, image_size=8, patch_size=2)
    layer = "vit.layers.0"
    return transformers.ViTForImageClassification(config), [
        ("conv", "conv", ["vit.embeddings.patch_embeddings.projection"]),
        ("blocks.0.attention", "attention", under(f"{layer}.attention", "q_proj", "k_proj", "v_proj", "o_proj")),
        ("blocks.0.ffn", "ffn", under(f"{layer}.mlp", "fc1", "fc2")),
        ("classifier", "lm_head", ["classifier"]),
    ]


def t5() -> tuple[nn.Module, Table]:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100)
    encoder, decoder_ = "encoder.block.0.layer", "decoder.block.0.layer"
    projections = ("q", "k", "v", "o")
    return transformers.T5ForConditionalGeneration(config), [
        ("embeddings", "embedding", ["shared"]),
        ("encoder.embeddings", "embedding", ["encoder.embed_tokens"]),
        ("encoder.blocks.0.attention", "attention", under(f"{encoder}.0.SelfAttention", *projections)),
        ("encoder.blocks.0.ffn", "ffn", under(f"{encoder}.1.DenseReluDense", "wi", "wo")),
        ("decoder.embeddings", "embedding", ["decoder.embed_tokens"]),
        ("decoder.blocks.0.attention", "attention", under(f"{decoder_}.0.SelfAttention", *projections)),
        ("decoder.blocks.0.cross_attention", "attention", under(f"{decoder_}.1.EncDecAttention", *projections)),
        ("decoder.blocks.0.ffn", "ffn", under(f"{decoder_}.2.DenseReluDense", "wi", "wo")),
        ("lm_head", "lm_head", ["lm_head"]),
    ]


class Bare(nn.Module):
    """A GPT as people write it: all leaves of a block stand directly in it. `layers` are (name, inputs, outputs)."""

    def __init__(self, layers: list[tuple[str, int, int]], depth: int = 1) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(64, 32), nn.Embedding(16, 32)
        blocks = [nn.ModuleDict({n: nn.Linear(i, o) for n, i, o in layers}) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 64, bias=False)


_FFN = [("fc1", 32, 128), ("fc2", 128, 32)]
_SEPARATE = [("q", 32, 32), ("k", 32, 32), ("v", 32, 32), ("o", 32, 32)]
_GATED = [("w1", 32, 96), ("w2", 96, 32), ("w3", 32, 96)]

BARE: dict[str, tuple[list[tuple[str, int, int]], list[str]]] = {
    "fused": ([("qkv", 32, 96), ("proj", 32, 32), *_FFN], ["qkv", "proj"]),
    "separate": ([*_SEPARATE, *_FFN], ["q", "k", "v", "o"]),
    "ffn first": ([*_FFN, *_SEPARATE], ["q", "k", "v", "o"]),
    "grouped, gated": (
        [("wq", 32, 64), ("wk", 32, 16), ("wv", 32, 16), ("wo", 64, 32), *_GATED],
        ["wq", "wk", "wv", "wo"],
    ),
    "no telling names": ([("a", 32, 96), ("b", 32, 32), ("c", 32, 128), ("d", 128, 32)], ["a", "b"]),
    "ffn as wide as qkv": ([("a", 32, 96), ("b", 32, 32), ("c", 32, 96), ("d", 96, 32)], ["a", "b"]),
    "fused key and value": ([("a", 32, 32), ("b", 32, 64), ("c", 32, 32), *_FFN], ["a", "b", "c"]),
    "all square": ([*_SEPARATE, ("f", 32, 32), ("g", 32, 32)], ["q", "k", "v", "o"]),
    "all square, ffn first": ([("f", 32, 32), ("g", 32, 32), *_SEPARATE], ["q", "k", "v", "o"]),
}

MODELS = (
    gpt2,
    llama,
    llama_tied,
    mistral,
    qwen3,
    bert,
    bert_masked_lm,
    bert_classifier,
    roberta,
    opt,
    vit,
    t5,
)


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_table(build: Callable[[], tuple[nn.Module, Table]], device: str) -> None:
    with torch.device(device):
        model, expected = build()
    profile = probe_units(model)
    assert table(profile) == expected
    check_whole(model, profile)


@pytest.mark.parametrize("case", BARE)
def test_bare_blocks(case: str) -> None:
    layers, attention = BARE[case]
    model = Bare(layers, depth=2)
    profile = probe_units(model)
    ffn = [name for name, _, _ in layers if name not in attention]
    expected: Table = [("embeddings", "embedding", ["wte", "wpe"])]
    for i in range(2):
        expected.append((f"blocks.{i}.attention", "attention", under(f"blocks.{i}", *attention)))
        expected.append((f"blocks.{i}.ffn", "ffn", under(f"blocks.{i}", *ffn)))
    assert table(profile) == [*expected, ("lm_head", "lm_head", ["head"])]
    check_whole(model, profile)


def test_leaves_and_ties() -> None:
    model, _ = gpt2()
    profile = probe_units(model, model_id="gpt2-small")
    assert (profile.model_id, profile.class_name) == ("gpt2-small", "GPT2LMHeadModel")
    leaves = {leaf.module: leaf for leaf in profile.leaves}
    fused = leaves["transformer.h.0.attn.c_attn"]
    assert (fused.kind, fused.inputs, fused.outputs, fused.parameters) == (LeafKind.CONV1D, 32, 96, 33 * 96)
    tokens = leaves["transformer.wte"]
    assert (tokens.kind, tokens.inputs, tokens.outputs, tokens.parameters) == (LeafKind.EMBEDDING, 100, 32, 3200)
    assert profile.tied == (("transformer.wte", "lm_head"),)
    assert probe_units(llama()[0]).tied == ()
    assert probe_units(llama_tied()[0]).tied == (("model.embed_tokens", "lm_head"),)


def test_pinned_with_reasons() -> None:
    reasons = {m: p.reason for p in probe_units(vit()[0]).pinned for m in p.modules}
    assert reasons["vit.embeddings"] == "parameters are added, not multiplied"
    assert reasons["vit.layernorm"].startswith("norm")
    assert reasons["vit.embeddings.dropout"].startswith("dropout")
    reasons = {m: p.reason for p in probe_units(qwen3()[0]).pinned for m in p.modules}
    assert reasons["model.layers.0.self_attn.q_norm"].startswith("norm")
    assert reasons["model.rotary_emb"].startswith("rotary")
    reasons = {m: p.reason for p in probe_units(t5()[0]).pinned for m in p.modules}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert reasons[bias] == "lookup within a block: its values are added, not multiplied"


class Scaled(nn.Module):
    """A layer scale and a PReLU: vectors that no matmul uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))
        self.act = nn.PReLU(8)
        self.fc = nn.Linear(8, 3)


def test_vectors_are_pinned() -> None:
    profile = probe_units(Scaled())
    assert [(p.modules, p.reason.split(",")[0]) for p in profile.pinned] == [(("", "act"), "parameters are vectors")]
    assert table(profile) == [("fc", "lm_head", ["fc"])]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 48)


class SparseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)})
        self.moe = nn.ModuleDict({"gate": nn.Linear(32, 4), "experts": nn.ModuleList(Expert() for _ in range(4))})


def test_router_is_pinned_and_experts_are_one_unit() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(SparseBlock() for _ in range(2))})
    profile = probe_units(model)
    assert [u.name for u in profile.units] == [f"blocks.{i}.{p}" for i in range(2) for p in ("attention", "ffn")]
    assert len(profile.unit("blocks.1.ffn").modules) == 12
    (router,) = profile.pinned
    assert router.modules == ("layers.0.moe.gate", "layers.1.moe.gate")
    assert router.reason.startswith("router")
    check_whole(model, profile)


def test_shared_layer_is_one_unit() -> None:
    block = nn.ModuleDict({n: nn.Linear(i, o) for n, i, o in (*_SEPARATE, *_FFN)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block, block])})
    profile = probe_units(model)
    assert [u.name for u in profile.units] == ["blocks.0.attention", "blocks.0.ffn"]
    assert len(profile.leaves) == 6


def test_leaf_reached_by_two_names_is_listed_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 5)
    model.second = model.first
    profile = probe_units(model)
    assert [leaf.module for leaf in profile.leaves] == ["first"]
    assert profile.parameters == 25


def test_blocks_side_by_side_and_in_sequential() -> None:
    layers = (*_SEPARATE, *_FFN)
    blocks = [nn.ModuleDict({n: nn.Linear(i, o) for n, i, o in layers}) for _ in range(2)]
    names = ["blocks.0.attention", "blocks.0.ffn", "blocks.1.attention", "blocks.1.ffn"]
    side = nn.ModuleDict({"early": blocks[0], "late": blocks[1]})
    assert [u.name for u in probe_units(side).units] == names
    row = nn.Sequential(nn.Embedding(64, 32), nn.Sequential(*blocks), nn.Linear(32, 64))
    assert [u.name for u in probe_units(row).units] == ["embeddings", *names, "lm_head"]


def test_model_without_blocks() -> None:
    one = nn.ModuleDict({n: nn.Linear(i, o) for n, i, o in (*_SEPARATE, *_FFN)})
    assert [u.name for u in probe_units(one).units] == ["attention", "ffn"]
    mlp = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    assert table(probe_units(mlp)) == [("layer.0", "other", ["0"]), ("layer.2", "lm_head", ["2"])]
    assert table(probe_units(nn.Linear(3, 4))) == [("layer", "lm_head", [""])]


def test_encoder_with_a_head_beside_it() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.BertModel(transformers.BertConfig(**_BERT, vocab_size=100))
            self.head = nn.Linear(32, 1)

    profile = probe_units(Classifier())
    assert [(u.name, u.role) for u in profile.units[-2:]] == [("pooler", Role.OTHER), ("head", Role.LM_HEAD)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks Transformers so
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("wrap", ["compile", "peft"])
def test_wrappers_change_no_role(wrap: str) -> None:
    model, expected = bert_masked_lm()
    if wrap == "compile":
        assert table(probe_units(torch.compile(model))) == expected  # type: ignore[arg-type]
        return
    peft: Any = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "dense", "decoder"]))
    profile = probe_units(adapted)
    assert [(u.name, u.role.value) for u in profile.units] == [(name, role) for name, role, _ in expected]
    prefix = "bert.encoder.layer.0.attention.self.query"
    assert set(under(prefix, "base_layer", "lora_A.default", "lora_B.default")) <= set(profile.units[1].modules)


def test_matrices_that_no_known_layer_uses_are_pinned_and_alone_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no layer whose format could be chosen; .*LSTM with weight_ih_l0 \[16, 3\]"):
        probe_units(nn.LSTM(3, 4))
    model = nn.Sequential(nn.Embedding(8, 3), nn.LSTM(3, 4))
    profile = probe_units(model)
    assert [list(u.modules) for u in profile.units] == [["0"]]
    assert [(list(p.modules), p.reason) for p in profile.pinned] == [
        (["1"], "matrices used by code of its own: they run in the format of what is around them")
    ]


def test_empty_foreign_and_lazy_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"the model \(Module\) has no layer whose format could be chosen"):
        probe_units(nn.Module())
    with pytest.raises(ModelError, match=r"the model \(Sequential\) has no layer"):
        probe_units(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got str"):
        probe_units("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"'1' \(LazyLinear\) is lazy .* run the model on one batch"):
        probe_units(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_no_width_are_placed() -> None:
    empty = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 0), "v": nn.Linear(8, 0), "o": nn.Linear(8, 8)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": empty})])})
    assert sorted(m for u in probe_units(model).units for m in u.modules) == [f"blocks.0.attn.{n}" for n in "koqv"]


def test_deep_model_places_every_block() -> None:
    with torch.device("meta"):
        model = Bare([*_SEPARATE, *_FFN], depth=1000)
    profile = probe_units(model)
    assert len(profile.units) == 2 + 2 * 1000
    assert profile.units[-2].name == "blocks.999.ffn"
