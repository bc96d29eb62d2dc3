"""Units of every architecture of the zoo: leaves placed once, and tables by hand where leaves are no plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from reference_meaning import meaning
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO

from autoprec import Plan, applied, audit
from autoprec.formats import Format
from autoprec.probe.units import probe_units
from autoprec.records import LeafKind, ModelProfile

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # bitsandbytes and PEFT import torch.jit
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]

_LEAVES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


def rows(profile: ModelProfile, block: str = "") -> list[tuple[str, str, list[str]]]:
    """Units by name, role and modules; `block` keeps those whose name starts so."""
    return [(u.name, u.role.value, list(u.modules)) for u in profile.units if u.name.startswith(block)]


def pins(profile: ModelProfile, word: str) -> list[str]:
    return [m for p in profile.pinned if word in p.reason for m in p.modules]


def under(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


@pytest.mark.parametrize("name", list(ZOO))
def test_every_leaf_stands_once(name: str) -> None:
    model = ZOO[name]().model
    profile = probe_units(model)
    placed = [m for u in profile.units for m in u.modules] + [m for p in profile.pinned for m in p.modules]
    assert len(placed) == len(set(placed))
    assert profile.unassigned == ()
    # PEFT's own path parts are left out of names
    modules = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    assert {n for n, m in modules.items() if isinstance(m, _LEAVES)} <= set(placed)
    # BERT's head keeps its decoder's bias under a second name: the decoder's unit decides about it
    held = {id(p) for m in model.modules() if isinstance(m, _LEAVES) for p in m.parameters(recurse=False)}
    owners = {n for n, m in modules.items() for p in m.parameters(recurse=False) if id(p) not in held}
    assert owners <= set(placed), "a parameter whose owner has no place"
    assert all(Format.FP32 in u.formats and Format.BF16 in u.formats for u in profile.units)


@pytest.mark.parametrize(("name", "inner"), [("mixtral", 64), ("qwen3_moe", 32)])
def test_experts_are_one_leaf_and_the_router_is_pinned(name: str, inner: int) -> None:
    profile = probe_units(ZOO[name]().model)
    assert rows(profile, "blocks.0.ffn") == [("blocks.0.ffn", "ffn", ["model.layers.0.mlp.experts"])]
    assert pins(profile, "router") == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    leaf = next(x for x in profile.leaves if x.module == "model.layers.0.mlp.experts")
    assert (leaf.kind, leaf.inputs, leaf.outputs) == (LeafKind.EXPERTS, 32, inner)
    assert leaf.parameters == 4 * 3 * 32 * inner
    assert profile.unit("blocks.0.ffn").formats == tuple(Format)


class Experts(nn.Module):
    """Experts in the transposed layout [experts, in, out], with biases."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(count, width, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 2 * inner))
        self.down_proj = nn.Parameter(torch.zeros(count, inner, width))
        self.down_proj_bias = nn.Parameter(torch.zeros(count, width))


class SharedMoe(nn.Module):
    """Routed experts, a Linear router, and a shared expert of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = Experts(4, 32, 32)
        self.shared = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})


class MoeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})
        self.moe = SharedMoe()


def test_a_layers_experts_are_one_unit_with_the_shared_one() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(64, 32), "blocks": nn.ModuleList(MoeBlock() for _ in range(2))})
    profile = probe_units(model)
    assert rows(profile, "blocks.1") == [
        ("blocks.1.attention", "attention", under("blocks.1.attn", *"qkvo")),
        ("blocks.1.ffn", "ffn", under("blocks.1.moe", "experts", "shared.up", "shared.down")),
    ]
    assert pins(profile, "router") == under("blocks", "0.moe.router", "1.moe.router")


def test_state_space_mixer_is_one_unit_without_fp8() -> None:
    profile = probe_units(ZOO["mamba"]().model)
    mixer = under("backbone.layers.0.mixer", "conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")
    assert rows(profile, "blocks.0") == [("blocks.0.mixer", "other", mixer)]
    assert profile.unit("blocks.0.mixer").formats == (Format.FP32, Format.BF16, Format.FP16)
    assert pins(profile, "recurrence") == under("backbone.layers", "0.mixer", "1.mixer")


def test_multihead_attention_holds_its_output_projection() -> None:
    profile = probe_units(ZOO["torch_encoder"]().model)
    assert rows(profile) == [
        ("embeddings", "embedding", ["embedding"]),
        ("blocks.0.attention", "attention", under("encoder.layers.0", "self_attn", "self_attn.out_proj")),
        ("blocks.0.ffn", "ffn", under("encoder.layers.0", "linear1", "linear2")),
        ("blocks.1.attention", "attention", under("encoder.layers.1", "self_attn", "self_attn.out_proj")),
        ("blocks.1.ffn", "ffn", under("encoder.layers.1", "linear1", "linear2")),
        ("head", "lm_head", ["head"]),
    ]
    leaf = next(x for x in profile.leaves if x.kind is LeafKind.ATTENTION)
    assert (leaf.inputs, leaf.outputs, leaf.parameters) == (32, 32, 3 * 32 * 32 + 3 * 32)


def test_decoder_layer_of_torch_has_two_attentions() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 64, batch_first=True), 1)
    assert rows(probe_units(model), "blocks.0") == [
        ("blocks.0.attention", "attention", ["layers.0.self_attn", "layers.0.self_attn.out_proj"]),
        ("blocks.0.cross_attention", "attention", ["layers.0.multihead_attn", "layers.0.multihead_attn.out_proj"]),
        ("blocks.0.ffn", "ffn", under("layers.0", "linear1", "linear2")),
    ]


def test_packed_weights_take_no_fp8_and_count_as_what_they_stand_for() -> None:
    profile = probe_units(ZOO["qlora"]().model)
    unit = profile.unit("blocks.0.attention")
    assert unit.formats == (Format.FP32, Format.BF16, Format.FP16)
    base = next(x for x in profile.leaves if x.module == "model.layers.0.self_attn.q_proj.base_layer")
    assert (base.kind, base.inputs, base.outputs, base.parameters) == (LeafKind.QUANTIZED, 32, 32, 32 * 32)
    assert [m.rpartition("q_proj.")[2] for m in unit.modules[:3]] == [
        "base_layer",
        "lora_A.default",
        "lora_B.default",
    ]


def test_one_module_that_runs_often_is_one_unit() -> None:
    names = [u.name for u in probe_units(ZOO["albert"]().model).units]
    assert names[1:3] == ["blocks.0.0.attention", "blocks.0.0.ffn"]
    assert not any(n.startswith("blocks.1") for n in names)


def test_residual_network_has_its_convolutions_by_block_and_pins_batch_norms() -> None:
    profile = probe_units(ZOO["batchnorm_cnn"]().model)
    assert rows(profile)[0] == ("conv", "conv", ["resnet.embedder.embedder.convolution"])
    layers = "resnet.encoder.stages.0.layers.0.layer"
    assert rows(profile, "blocks.0.0") == [
        ("blocks.0.0.conv", "conv", under(layers, "0.convolution", "1.convolution")),
    ]
    assert rows(profile)[-1] == ("classifier", "lm_head", ["classifier.1"])
    assert any(m.endswith("normalization") for m in pins(profile, "norm"))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(functional.relu(self.second(self.first(x))))
        return y


def test_a_leaf_of_two_names_stands_under_its_first() -> None:
    profile = probe_units(Twice())
    assert [list(u.modules) for u in profile.units] == [["first"], ["head"]]


def test_low_rank_attention_is_one_unit_and_a_dense_first_block_an_ordinary_ffn() -> None:
    profile = probe_units(ZOO["deepseek_v3"]().model)
    layer = "model.layers.1"
    low_rank = under(f"{layer}.self_attn", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    shared = [f"shared_experts.{n}_proj" for n in ("gate", "up", "down")]
    assert rows(profile, "blocks.1") == [
        ("blocks.1.attention", "attention", low_rank),
        ("blocks.1.ffn", "ffn", under(f"{layer}.mlp", "experts", *shared)),
    ]
    dense = under("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj")
    assert rows(profile, "blocks.0.ffn") == [("blocks.0.ffn", "ffn", dense)]
    assert pins(profile, "router") == ["model.layers.1.mlp.gate"]


def test_heads_that_are_experts_are_attention() -> None:
    profile = probe_units(ZOO["jetmoe"]().model)
    attention = under("model.layers.0.self_attention", "experts.input_linear", "experts.output_linear", "kv_proj")
    assert rows(profile, "blocks.0") == [
        ("blocks.0.attention", "attention", attention),
        ("blocks.0.ffn", "ffn", under("model.layers.0.mlp", "input_linear", "output_linear")),
    ]
    routers = [f"model.layers.{i}.{part}.router.layer" for i in (0, 1) for part in ("mlp", "self_attention.experts")]
    assert sorted(pins(profile, "router")) == sorted(routers)


def test_a_router_below_a_module_of_its_own_is_pinned_beside_experts_in_a_dict() -> None:
    profile = probe_units(ZOO["switch"]().model)
    assert pins(profile, "router") == [
        "encoder.block.1.layer.1.mlp.router.classifier",
        "decoder.block.1.layer.2.mlp.router.classifier",
    ]
    experts = [f"expert_{i}.{n}" for i in range(4) for n in ("wi", "wo")]
    assert rows(profile, "encoder.blocks.1.ffn") == [
        ("encoder.blocks.1.ffn", "ffn", under("encoder.block.1.layer.1.mlp.experts", *experts))
    ]


def test_stages_give_their_blocks_and_what_stands_beside_them() -> None:
    profile = probe_units(ZOO["swin"]().model)
    names = [u.name for u in profile.units]
    blocks = [f"blocks.{stage}.{i}.{part}" for stage in (0, 1) for i in (0, 1) for part in ("attention", "ffn")]
    assert names == ["conv", *blocks[:4], "blocks.0.other", *blocks[4:], "classifier"]
    assert rows(profile, "blocks.0.other") == [
        ("blocks.0.other", "other", ["swin.encoder.layers.0.downsample.reduction"])
    ]
    assert len(pins(profile, "code of its own")) == 4  # the position tables


def test_a_recurrence_with_gates_of_its_own_is_one_mixer() -> None:
    profile = probe_units(ZOO["recurrent_gemma"]().model)
    mixer = under("model.layers.0.temporal_block", "linear_y", "linear_x", "linear_out", "conv_1d")
    assert rows(profile, "blocks.0.mixer") == [("blocks.0.mixer", "other", mixer)]
    assert pins(profile, "code of its own") == under(
        "model.layers", "0.temporal_block.rg_lru", "1.temporal_block.rg_lru"
    )


def test_computed_weights_and_a_ctc_head() -> None:
    profile = probe_units(ZOO["wav2vec2"]().model)
    assert rows(profile)[-1] == ("lm_head", "lm_head", ["lm_head"])
    assert rows(profile, "encoder.conv") == [("encoder.conv", "conv", ["wav2vec2.encoder.pos_conv_embed.conv"])]
    assert pins(profile, "parametrization") == ["wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"]


def test_transposed_convolutions_are_convolutions() -> None:
    profile = probe_units(ZOO["upsampler"]().model)
    assert rows(profile) == [("conv", "conv", ["down", "middle", "up", "out"])]
    assert profile.unit("conv").formats == (Format.FP32, Format.BF16, Format.FP16)


def test_channel_mixing_with_a_gate_behind_it_is_an_ffn() -> None:
    block = nn.ModuleDict(
        {
            "time": nn.ModuleDict({n: nn.Linear(32, 32, bias=False) for n in ("key", "value", "receptance", "output")}),
            "channel": nn.ModuleDict(
                {"key": nn.Linear(32, 128), "receptance": nn.Linear(32, 32), "value": nn.Linear(128, 32)}
            ),
        }
    )
    model = nn.ModuleDict({"emb": nn.Embedding(64, 32), "blocks": nn.ModuleList([block, copy.deepcopy(block)])})
    assert [(u.name, u.role.value) for u in probe_units(model).units][1:3] == [
        ("blocks.0.attention", "attention"),
        ("blocks.0.ffn", "ffn"),
    ]


def test_matrices_in_einsums_are_pinned_and_the_rest_is_placed() -> None:
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=2, d_inner=64)
    profile = probe_units(transformers.XLNetLMHeadModel(config))
    assert [u.name for u in profile.units] == ["embeddings", "blocks.0.ffn", "blocks.1.ffn", "lm_head"]
    assert pins(profile, "code of its own") == under("transformer.layer", "0.rel_attn", "1.rel_attn")


def bare(block: nn.Module, **beside: nn.Module) -> nn.ModuleDict:
    """Two such blocks after a lookup, and what else is given."""
    blocks = nn.ModuleList([block, copy.deepcopy(block)])
    return nn.ModuleDict({"wte": nn.Embedding(64, 32), "blocks": blocks, **beside})


def linears(**widths: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in widths.items()})


def test_a_shared_expert_of_as_many_channels_as_there_are_experts_is_no_router() -> None:
    moe = nn.ModuleDict({"gate": nn.Linear(32, 16), "experts": Experts(16, 32, 16)})
    moe["shared"] = linears(gate=(32, 16), up=(32, 16), down=(16, 32))
    profile = probe_units(
        bare(nn.ModuleDict({"attn": linears(q=(32, 32), k=(32, 32), v=(32, 32), o=(32, 32)), "m": moe}))
    )
    assert pins(profile, "router") == ["blocks.0.m.gate", "blocks.1.m.gate"]
    assert rows(profile, "blocks.0.ffn") == [
        ("blocks.0.ffn", "ffn", under("blocks.0.m", "experts", "shared.gate", "shared.up", "shared.down"))
    ]


def test_a_router_of_several_layers_is_pinned_whole() -> None:
    moe = nn.ModuleDict({"route": linears(up=(32, 48), score=(48, 4)), "experts": Experts(4, 32, 64)})
    profile = probe_units(
        bare(nn.ModuleDict({"attn": linears(q=(32, 32), k=(32, 32), v=(32, 32), o=(32, 32)), "m": moe}))
    )
    assert pins(profile, "router")[:2] == under("blocks.0.m.route", "up", "score")
    assert rows(profile, "blocks.0.ffn") == [("blocks.0.ffn", "ffn", ["blocks.0.m.experts"])]


@pytest.mark.parametrize(
    "widths",
    [
        {"q_proj": (32, 48), "k_proj": (32, 8), "v_proj": (32, 8), "o_proj": (48, 32), "gate_proj": (32, 48)},
        {"q": (32, 16), "k": (32, 16), "v": (32, 32), "ogate": (32, 32), "igate": (32, 2), "out": (32, 32)},
    ],
    ids=["gated", "matrix memory"],
)
def test_queries_keys_and_values_with_gates_are_attention(widths: dict[str, tuple[int, int]]) -> None:
    block = nn.ModuleDict({"mix": linears(**widths), "mlp": linears(gate=(32, 96), up=(32, 96), down=(96, 32))})
    assert rows(probe_units(bare(block)), "blocks.0") == [
        ("blocks.0.attention", "attention", under("blocks.0.mix", *widths)),
        ("blocks.0.ffn", "ffn", under("blocks.0.mlp", "gate", "up", "down")),
    ]


def test_mixing_of_positions_and_of_channels_are_two_ffns() -> None:
    block = nn.ModuleDict(
        {"tokens": linears(up=(16, 24), down=(24, 16)), "channels": linears(up=(32, 64), down=(64, 32))}
    )
    assert rows(probe_units(bare(block)), "blocks.0") == [
        ("blocks.0.ffn", "ffn", under("blocks.0.tokens", "up", "down")),
        ("blocks.0.ffn_2", "ffn", under("blocks.0.channels", "up", "down")),
    ]


def test_two_loose_ffns_are_two_units() -> None:
    attention = linears(query=(32, 32), key=(32, 32), value=(32, 32), out=(32, 32))
    loose = {"up_a": (32, 64), "down_a": (64, 32), "up_b": (32, 64), "down_b": (64, 32)}
    block = nn.ModuleDict({"attn": attention, **linears(**loose)})
    assert rows(probe_units(bare(block)), "blocks.0.ffn") == [
        ("blocks.0.ffn", "ffn", under("blocks.0", "up_a", "down_a")),
        ("blocks.0.ffn_2", "ffn", under("blocks.0", "up_b", "down_b")),
    ]


def test_a_network_for_boxes_is_no_attention() -> None:
    chains = nn.ModuleList(nn.Sequential(*(nn.Linear(64, n) for n in (64, 64, 4))) for _ in range(2))
    roles = {u.role.value for u in probe_units(nn.ModuleDict({"boxes": chains, "x": nn.Linear(64, 64)})).units}
    assert "attention" not in roles


def test_pooling_by_attention_beside_the_blocks() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    with torch.device("meta"):
        profile = probe_units(transformers.SiglipVisionModel(config))
    assert [(u.name, u.role.value, len(u.modules)) for u in profile.units][-2:] == [
        ("head.attention", "attention", 2),
        ("head.ffn", "ffn", 2),
    ]


def test_what_stands_before_the_blocks_or_before_a_convolution_is_no_head() -> None:
    block = MoeBlock()
    stem = nn.ModuleDict({"patches": nn.Linear(48, 32), "blocks": nn.ModuleList([block, copy.deepcopy(block)])})
    assert [u.role.value for u in probe_units(stem).units if u.modules == ("patches",)] == ["other"]
    image = bare(block, out=nn.Linear(32, 48), pixels=nn.ConvTranspose2d(48, 16, 2))
    assert [u.role.value for u in probe_units(image).units if u.modules == ("out",)] == ["other"]
    assert [u.role.value for u in probe_units(bare(block, out=nn.Linear(32, 48))).units][-1] == "lm_head"


class Recurrent(nn.Module):
    """A bag of lookups, a recurrence and a layer whose weight is computed and which has nothing else of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(64, 32)
        self.rnn = nn.LSTM(32, 32, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32, bias=False))
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [B, 16]."""
        hidden, _ = self.rnn(self.bag(ids)[:, None])
        logits: Tensor = self.head(torch.relu(self.normed(hidden[:, -1])))
        return logits


def runs_lstm_in_bf16() -> bool:
    """Say whether this CPU does: oneDNN has no BF16 LSTM without AVX512."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(8, 8)(torch.zeros(1, 1, 8))
    except RuntimeError:
        return False
    return True


def test_bags_recurrences_and_computed_weights() -> None:
    profile = probe_units(Recurrent())
    assert profile.unassigned == ()
    assert rows(profile)[0] == ("embeddings", "embedding", ["bag"])
    assert pins(profile, "code of its own") == ["rnn"]
    assert pins(profile, "parametrization") == ["normed.parametrizations.weight"]


def test_bags_recurrences_and_computed_weights_run_as_planned() -> None:
    if not runs_lstm_in_bf16():
        pytest.skip("PyTorch itself runs no LSTM in BF16 on this CPU")
    model = Recurrent()
    profile = probe_units(model)
    plan = Plan.uniform(profile, "bf16").replace({"embeddings": "fp16", profile.units[-1].name: "fp32"})
    ids = torch.randint(64, (2, 8))
    with applied(model, plan):
        assert audit(model, plan, ids).disagreements == ()
        found = model(ids)
    with meaning(model, plan):
        assert torch.equal(found, model(ids))
