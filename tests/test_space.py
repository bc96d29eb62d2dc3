"""Tests of search spaces: the shipped ones on real models and two kinds of device, and every fault in a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import samples
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from autoprec.errors import AutoprecError, StudyError
from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.plan import Plan
from autoprec.probe.units import probe_units
from autoprec.records import DeviceProfile, FormatSupport, Mode, ModelProfile, Origin, Role, Support
from autoprec.study.baselines import baselines
from autoprec.study.space import build_space, describe, split_units

FP32, BF16, FP16, FP8 = Format
CPU = samples.device_profile()  # fp32 and bf16 native, fp16 emulated, fp8 absent
ALL = DeviceProfile(
    name="all-native",
    kind="cuda",
    origin=Origin.MEASURED,
    formats={f: FormatSupport(Support.NATIVE, "has units for it") for f in Format},
    tf32=FormatSupport(Support.NATIVE, "tensor cores"),
    fp8_family=Fp8Family.OCP,
    fp8_recipes=(Fp8Recipe.TENSORWISE, Fp8Recipe.ROWWISE),
)
NONE = DeviceProfile(
    name="old",
    kind="cuda",
    origin=Origin.MEASURED,
    formats={Format.FP32: FormatSupport(Support.NATIVE, "always")},
    tf32=FormatSupport(Support.ABSENT, "too old"),
)


@cache
def gpt2() -> ModelProfile:
    # 97 tokens: no multiple of 16, so the head has no FP8 kernel
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return probe_units(GPT2LMHeadModel(config))


@cache
def llama() -> ModelProfile:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=72,  # 72 = 4.5 × 16: the FFN has no FP8 kernel
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return probe_units(LlamaForCausalLM(config))


@cache
def bert() -> ModelProfile:
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return probe_units(BertForMaskedLM(config))


MODELS: list[Callable[[], ModelProfile]] = [gpt2, llama, bert]


# the shipped spaces


@pytest.mark.parametrize("name", ["default", "blocks"])
@pytest.mark.parametrize("model", MODELS)
def test_a_decision_a_unit(name: str, model: Callable[[], ModelProfile]) -> None:
    profile = model()
    space = build_space(name, profile, ALL)
    assert [d.name for d in space.decisions] == [u.name for u in profile.units]
    assert all(d.units == (d.name,) for d in space.decisions)
    assert space.profile is profile
    assert space.ambient is BF16


def test_gpt2_on_a_cpu() -> None:
    space = build_space("default", gpt2(), CPU)
    assert all(d.formats == (FP32, BF16) for d in space.decisions)
    assert space.size == 2**6
    gone = {(r.unit, r.format): r.reason for r in space.removed}
    gemms = [u.name for u in gpt2().units if u.role is not Role.EMBEDDING]
    assert set(gone) == {(unit, choice) for unit in gemms for choice in (FP16, FP8)}
    assert set(gone.values()) == {
        "sample-cpu has no native fp16: 0.47x fp32's matmul rate at 1024",
        "sample-cpu has no native fp8: no FP8 matmul unit on this CPU",
    }


def test_gpt2_where_all_is_native_keeps_fp8_off_a_head_that_does_not_divide_by_16() -> None:
    space = build_space("default", gpt2(), ALL)
    formats = {d.name: d.formats for d in space.decisions}
    assert formats.pop("embeddings") == (FP32, BF16)
    assert formats.pop("lm_head") == (FP32, BF16, FP16)
    assert set(formats.values()) == {(FP32, BF16, FP16, FP8)}
    assert space.size == 2 * 3 * 4**4
    assert [(r.unit, r.format, r.reason) for r in space.removed] == [
        ("lm_head", FP8, "lm_head: FP8 kernels need multiples of 16, and this leaf is 32x97")
    ]


def test_llama_names_the_first_leaf_without_an_fp8_kernel() -> None:
    removed = build_space("default", llama(), ALL).removed
    assert [(r.unit, r.reason) for r in removed] == [
        (
            f"blocks.{i}.ffn",
            f"model.layers.{i}.mlp.gate_proj: FP8 kernels need multiples of 16, and this leaf is 32x72",
        )
        for i in range(2)
    ]


def test_bert_has_a_choice_for_its_transform() -> None:
    formats = {d.name: d.formats for d in build_space("default", bert(), ALL).decisions}
    assert formats["cls.predictions.transform"] == (FP32, BF16, FP16, FP8)


@pytest.mark.parametrize("model", MODELS)
def test_roles_decide_all_units_of_a_role_together(model: Callable[[], ModelProfile]) -> None:
    profile = model()
    space = build_space("roles", profile, ALL)
    assert [d.name for d in space.decisions] == list(dict.fromkeys(str(u.role) for u in profile.units))
    for decision in space.decisions:
        assert decision.units == tuple(u.name for u in profile.units if u.role == decision.name)


def test_a_role_has_the_formats_that_all_its_units_have() -> None:
    formats = {d.name: d.formats for d in build_space("roles", llama(), ALL).decisions}
    assert formats == {
        "embedding": (FP32, BF16),
        "attention": (FP32, BF16, FP16, FP8),
        "ffn": (FP32, BF16, FP16),
        "lm_head": (FP32, BF16, FP16, FP8),
    }


def test_modules_cut_attention_and_ffn_at_the_stream() -> None:
    space = build_space("modules", llama(), CPU)
    names = [d.name for d in space.decisions]
    assert names == [
        "embeddings",
        *(f"blocks.{i}.{part}.{end}" for i in range(2) for part in ("attention", "ffn") for end in ("in", "out")),
        "lm_head",
    ]
    units = {u.name: u.modules for u in space.profile.units}
    assert units["blocks.1.attention.in"] == tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")
    assert units["blocks.1.attention.out"] == ("model.layers.1.self_attn.o_proj",)
    assert units["blocks.1.ffn.in"] == tuple(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up"))
    assert units["blocks.1.ffn.out"] == ("model.layers.1.mlp.down_proj",)
    assert space.size == 2**10


@pytest.mark.parametrize("model", MODELS)
def test_splitting_places_every_module_once(model: Callable[[], ModelProfile]) -> None:
    before, after = model(), split_units(model())
    assert sorted(m for u in after.units for m in u.modules) == sorted(m for u in before.units for m in u.modules)
    assert after.fingerprint == before.fingerprint
    Plan.uniform(after, "bf16")  # a plan refuses modules named twice


def test_what_nothing_is_native_for_stays_fp32() -> None:
    space = build_space("default", gpt2(), NONE)
    assert space.size == 1 and space.ambient is FP32
    assert {d.formats for d in space.decisions} == {(FP32,)}


# to and from assignments


@pytest.mark.parametrize("name", ["default", "roles", "modules"])
@pytest.mark.parametrize("device", [CPU, ALL], ids=lambda d: d.name)
def test_choices_and_assignment_are_inverse(name: str, device: DeviceProfile) -> None:
    space = build_space(name, gpt2(), device)
    for turn in range(12):
        choices = {d.name: str(d.formats[(turn + 5 * i) % len(d.formats)]) for i, d in enumerate(space.decisions)}
        assignment = space.assignment(choices)
        assert set(assignment) == {u.name for u in space.profile.units}
        assert space.choices(assignment) == choices


def test_what_the_space_does_not_hold_has_no_choices() -> None:
    roles, blocks = build_space("roles", gpt2(), CPU), build_space("default", gpt2(), CPU)
    mixed = dict.fromkeys((u.name for u in gpt2().units), BF16) | {"blocks.0.ffn": FP32}
    assert blocks.choices(mixed) is not None
    assert roles.choices(mixed) is None  # the FFNs differ
    assert blocks.choices(mixed | {"blocks.0.ffn": FP8}) is None  # not on this device
    assert blocks.choices({k: v for k, v in mixed.items() if k != "lm_head"}) is None


def test_uniform_bf16_is_in_the_space() -> None:
    for name in ("default", "roles", "modules"):
        space = build_space(name, gpt2(), CPU)
        plan = Plan.uniform(space.profile, "bf16", device=CPU)
        choices = space.of_plan(plan)
        assert choices is not None
        assert space.assignment(choices) == plan.assignment
        assert {v for k, v in choices.items() if not k.startswith("embedding")} == {"bf16"}


def test_plans_with_other_surroundings_are_not_in_the_space() -> None:
    space, profile = build_space("default", gpt2(), CPU), gpt2()
    assert space.of_plan(Plan.uniform(profile, "fp32")) is None  # ambient
    assert space.of_plan(Plan.uniform(profile, "fp16")) is None
    assert space.of_plan(Plan.cast(profile, "bf16")) is None  # stream
    assert space.of_plan(Plan.uniform(profile, "bf16", tf32=True)) is None
    wide = build_space("default", bert(), ALL)
    assert wide.of_plan(Plan.uniform(bert(), "fp8", device=ALL)) is not None
    assert wide.of_plan(Plan.uniform(bert(), "fp8", device=ALL, fp8_recipe="rowwise")) is None


def test_a_space_is_described_by_decisions_units_and_ambient() -> None:
    same, other = (describe(build_space("default", gpt2(), d)) for d in (CPU, CPU))
    assert same == other
    kinds = [describe(build_space(n, gpt2(), d)) for n in ("default", "roles", "modules") for d in (CPU, ALL)]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])


# files


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


FORMATS = """
[formats]
embedding = ["fp32"]
attention = ["fp32", "bf16"]
ffn = ["fp32", "bf16", "fp8"]
lm_head = ["fp32"]
"""


def test_a_file_of_ones_own_with_pins(tmp_path: Path) -> None:
    path = written(tmp_path, f'grouping = "blocks"\n{FORMATS}[pins]\n"blocks.0.*" = "fp16"\n"*.1.ffn" = "bf16"\n')
    space = build_space(path, gpt2(), CPU)
    assert {d.name: d.formats for d in space.decisions} == {
        "embeddings": (FP32,),
        "blocks.0.attention": (FP16,),  # slow on this device, but it runs, and a pin is the user's word
        "blocks.0.ffn": (FP16,),
        "blocks.1.attention": (FP32, BF16),
        "blocks.1.ffn": (BF16,),
        "lm_head": (FP32,),
    }
    assert space.removed == ()


def test_pins_stand_apart_from_their_role(tmp_path: Path) -> None:
    path = written(tmp_path, f'grouping = "roles"\n{FORMATS}[pins]\n"blocks.0.ffn" = "fp32"\n')
    space = build_space(path, gpt2(), CPU)
    assert {d.name: d.units for d in space.decisions} == {
        "embedding": ("embeddings",),
        "attention": ("blocks.0.attention", "blocks.1.attention"),
        "blocks.0.ffn": ("blocks.0.ffn",),
        "ffn": ("blocks.1.ffn",),
        "lm_head": ("lm_head",),
    }


def test_pins_may_name_the_parts_of_a_module_space(tmp_path: Path) -> None:
    path = written(tmp_path, f'grouping = "modules"\n{FORMATS}[pins]\n"blocks.*.ffn.out" = "fp32"\n')
    formats = {d.name: d.formats for d in build_space(path, gpt2(), CPU).decisions}
    assert formats["blocks.1.ffn.out"] == (FP32,)
    assert formats["blocks.1.ffn.in"] == (FP32, BF16)


def test_two_patterns_may_agree(tmp_path: Path) -> None:
    path = written(tmp_path, f'grouping = "blocks"\n{FORMATS}[pins]\n"blocks.0.*" = "bf16"\n"*.ffn" = "bf16"\n')
    formats = {d.name: d.formats for d in build_space(path, gpt2(), CPU).decisions}
    assert formats["blocks.0.ffn"] == (BF16,)


GROUPED = 'grouping = "blocks"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grouping = blocks", "no valid TOML.*line 1"),
        (FORMATS, "not valid at grouping"),
        ('grouping = "layers"' + FORMATS, "not valid at grouping.*'layers'"),
        (GROUPED, "not valid at formats"),
        (GROUPED + "group = 1\n" + FORMATS, "not valid at group"),
        (GROUPED + FORMATS.replace('"fp8"', '"fp4"'), r"not valid at formats\.ffn\.2.*'fp4'"),
        (GROUPED + FORMATS + 'heads = ["fp32"]', r"not valid at formats\.heads"),
        (GROUPED + FORMATS.replace('["fp32", "bf16"]', '"fp32"'), r"not valid at formats\.attention"),
        (GROUPED + FORMATS + '[pins]\n"lm_head" = "fp4"', r"not valid at pins\.lm_head.*'fp4'"),
        (
            GROUPED + FORMATS.replace('lm_head = ["fp32"]', ""),
            "gives no formats for role 'lm_head', which unit 'lm_head' has",
        ),
        (GROUPED + FORMATS.replace('lm_head = ["fp32"]', "lm_head = []"), "gives no formats for role 'lm_head'"),
        (
            GROUPED + FORMATS.replace('embedding = ["fp32"]', 'embedding = ["fp8"]'),
            "leaves unit 'embeddings' no format: it takes fp32, bf16, fp16",
        ),
        (
            GROUPED + FORMATS + '[pins]\n"block.0.*" = "fp32"',
            r"pins 'block\.0\.\*', which matches no unit.*embeddings, blocks\.0\.attention",
        ),
        (
            GROUPED + FORMATS + '[pins]\n"embeddings" = "fp8"',
            "pins 'embeddings' to fp8; it takes fp32, bf16, fp16",
        ),
        (
            GROUPED + FORMATS + '[pins]\n"*.ffn" = "fp8"',
            r"pins 'blocks\.0\.ffn' to fp8, which cannot run: sample-cpu lacks fp8: no FP8 matmul unit",
        ),
        (
            GROUPED + FORMATS + '[pins]\n"blocks.0.*" = "fp32"\n"*.ffn" = "bf16"',
            r"pins 'blocks\.0\.ffn' to fp32 and to bf16; keep one",
        ),
    ],
)
def test_a_fault_in_a_file_names_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(AutoprecError, match=message) as caught:
        build_space(path, gpt2(), CPU)
    assert str(path) in str(caught.value)


def test_no_such_space() -> None:
    with pytest.raises(AutoprecError, match="there is no search space 'block'; closest: blocks"):
        build_space("block", gpt2(), CPU)
    with pytest.raises(AutoprecError, match=re.escape("search space nowhere/mine.toml does not exist")):
        build_space("nowhere/mine.toml", gpt2(), CPU)


def test_faults_of_a_space_are_study_errors(tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        build_space(written(tmp_path, GROUPED), gpt2(), CPU)


# what is measured beside the space


def test_baselines_on_a_cpu() -> None:
    found = {b.name: b for b in baselines(gpt2(), CPU, Mode.TRAIN)}
    runnable = [name for name, b in found.items() if b.plan is not None]
    assert runnable == ["uniform fp32", "uniform bf16", "uniform fp16", "cast bf16"]
    assert found["uniform tf32"].reason == "sample-cpu cannot run tf32: TF32 is a format of CUDA devices"
    assert found["uniform fp8"].reason == "sample-cpu cannot run fp8: no FP8 matmul unit on this CPU"
    assert all(b.plan.mode is Mode.TRAIN and b.plan.device.name == "sample-cpu" for b in found.values() if b.plan)


def test_what_multiplies_twenty_times_slower_than_fp32_is_not_run() -> None:
    rates = tuple(
        replace(rate, tflops=0.0012, tflops_low=0.0011, tflops_high=0.0013) if rate.format is BF16 else rate
        for rate in CPU.gemm_rates
    )
    found = {b.name: b for b in baselines(gpt2(), replace(CPU, gemm_rates=rates), Mode.TRAIN)}
    said = "not run: sample-cpu multiplies in bf16 at 0.0106x fp32's rate at 1024 (at most 0.0128x), measured"
    assert {name: b.reason for name, b in found.items() if "bf16" in name} == {"uniform bf16": said, "cast bf16": said}
    assert found["uniform fp16"].plan is not None and not found["cast bf16"].barred
    unsure = tuple(replace(rate, tflops_high=0.1) if rate.format is BF16 else rate for rate in rates)
    assert baselines(gpt2(), replace(CPU, gemm_rates=unsure), Mode.TRAIN)[2].plan is not None


def test_weights_stored_low_without_copies_are_barred_in_training_alone() -> None:
    train, infer = ({b.name: b for b in baselines(gpt2(), CPU, mode)} for mode in (Mode.TRAIN, Mode.INFER))
    assert [name for name, b in train.items() if b.barred] == ["cast bf16"]
    assert "1/512 of a weight" in str(train["cast bf16"].reason)
    assert not any(b.barred for b in infer.values())


def test_baselines_where_all_is_native() -> None:
    found = {b.name: b.plan for b in baselines(bert(), ALL, Mode.INFER)}
    assert list(found) == [
        "uniform fp32",
        "uniform tf32",
        "uniform bf16",
        "uniform fp16",
        "uniform fp8",
        "cast bf16",
        "fp8 with high edges",
    ]
    tf32, mixed = found["uniform tf32"], found["fp8 with high edges"]
    assert tf32 is not None and tf32.tf32 and tf32.formats == {FP32}
    assert mixed is not None and mixed.ambient is BF16
    assert mixed.assignment == dict.fromkeys((u.name for u in bert().units), BF16) | {"embeddings": FP32}
    assert found["uniform fp8"] is not None and FP8 in found["uniform fp8"].formats


def test_high_edges_are_whole_blocks_whatever_the_grouping() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    profile = probe_units(GPT2LMHeadModel(config))
    for grouped in (profile, split_units(profile)):
        plan = {b.name: b.plan for b in baselines(grouped, ALL, Mode.TRAIN)}["fp8 with high edges"]
        assert plan is not None
        low = {name for name, choice in plan.assignment.items() if choice is FP8}
        assert low == {u.name for u in grouped.units if u.name.startswith(("blocks.1.", "blocks.2."))}
        assert plan.assignment["embeddings"] is FP32


def test_a_leaf_without_an_fp8_kernel_is_told_before_anything_runs() -> None:
    found = {b.name: b for b in baselines(gpt2(), ALL, Mode.TRAIN)}
    assert found["uniform fp8"].plan is None
    assert found["uniform fp8"].reason == "lm_head: FP8 kernels need multiples of 16, and this leaf is 32x97"
    assert found["fp8 with high edges"].plan is not None  # its head is high
