"""Plans: what they promise as values."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from autoprec.errors import PlanError
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import (
    Evidence,
    GradScalerSettings,
    Plan,
    PlanModel,
    check_modules,
    support_of,
)
from autoprec.records import (
    DeviceProfile,
    FormatSupport,
    Leaf,
    LeafKind,
    ModelProfile,
    Origin,
    Pinned,
    Role,
    Support,
    Unit,
)

GEMM = tuple(Format)
LOOKUP = (Format.FP32, Format.BF16, Format.FP16)


def profile() -> ModelProfile:
    """Return the profile of a small model: an embedding, a convolution, two blocks and a head."""
    blocks = [
        (
            Unit(f"blocks.{i}.attention", Role.ATTENTION, (f"h.{i}.attn.qkv", f"h.{i}.attn.proj"), GEMM),
            Unit(f"blocks.{i}.ffn", Role.FFN, (f"h.{i}.mlp.up", f"h.{i}.mlp.down"), GEMM),
        )
        for i in range(2)
    ]
    units = (
        Unit("embedding", Role.EMBEDDING, ("wte",), LOOKUP),
        Unit("stem", Role.CONV, ("stem.conv",), LOOKUP),
        *(unit for block in blocks for unit in block),
        Unit("lm_head", Role.LM_HEAD, ("lm_head",), GEMM),
    )
    return ModelProfile(
        model_id="tiny",
        class_name="TinyModel",
        fingerprint="f" * 64,
        units=units,
        pinned=(Pinned(("h.0.ln", "h.1.ln"), "norms run as autocast runs them"),),
        unassigned=(),
        leaves=tuple(Leaf(m, LeafKind.LINEAR, 8, 8, 64) for u in units for m in u.modules),
        tied=(("wte", "lm_head"),),
        parameters=512,
    )


def device(ambient: Format = Format.BF16) -> DeviceProfile:
    """Return a device on which `ambient` is the native 16-bit format, and FP8 is absent."""
    native, emulated = FormatSupport(Support.NATIVE, "probed"), FormatSupport(Support.EMULATED, "probed")
    formats = {Format.FP32: native, Format.BF16: emulated, Format.FP16: emulated, ambient: native}
    return DeviceProfile(
        name="box",
        kind="cpu",
        origin=Origin.MEASURED,
        formats=formats | {Format.FP8: FormatSupport(Support.ABSENT, "no FP8 units")},
        tf32=FormatSupport(Support.ABSENT, "no such switch"),
    )


def written(plan: Plan) -> dict[str, Any]:
    data = plan.to_json()
    assert json.loads(json.dumps(data)) == data
    return data


# what a plan is


@pytest.mark.parametrize("choice", [Format.FP32, Format.BF16, Format.FP16])
def test_uniform_is_blanket_autocast(choice: Format) -> None:
    plan = Plan.uniform(profile(), choice)
    assert plan.ambient is choice
    assert plan.stream is Format.FP32
    for unit in plan.units:
        assert unit.format is (Format.FP32 if unit.role is Role.EMBEDDING else choice)
    assert plan.fp8_recipe is None
    assert not plan.tf32


@pytest.mark.parametrize(("on", "ambient"), [(Format.BF16, Format.BF16), (Format.FP16, Format.FP16)])
def test_uniform_fp8_has_a_sixteen_bit_ambient_that_the_device_computes_in(on: Format, ambient: Format) -> None:
    plan = Plan.uniform(profile(), "fp8", device=device(on))
    assert plan.ambient is ambient
    assert plan.stream is Format.FP32
    assert plan.fp8_recipe is Fp8Recipe.TENSORWISE
    formats = {u.role: u.format for u in plan.units}
    assert formats[Role.EMBEDDING] is Format.FP32
    assert formats[Role.CONV] is ambient, "a convolution has no FP8 and goes as autocast sends it"
    assert formats[Role.ATTENTION] is formats[Role.FFN] is formats[Role.LM_HEAD] is Format.FP8
    assert (plan.device.name, plan.device.origin) == ("box", Origin.MEASURED)


def test_uniform_fp8_without_a_device_has_a_bf16_ambient() -> None:
    assert Plan.uniform(profile(), "fp8").ambient is Format.BF16


@pytest.mark.parametrize("choice", ["bf16", "fp16", "fp32"])
def test_cast_stores_and_computes_everything_in_one_format(choice: str) -> None:
    plan = Plan.cast(profile(), choice)
    assert {plan.ambient, plan.stream, *plan.formats} == {Format(choice)}


def test_cast_to_fp8_is_refused() -> None:
    with pytest.raises(PlanError, match=r"cannot be stored in fp8.*Plan\.uniform"):
        Plan.cast(profile(), "fp8")


def test_replace_changes_units_and_neither_ambient_nor_stream() -> None:
    before = Plan.uniform(profile(), "bf16").with_evidence(Evidence(seed=1))
    after = before.replace({"blocks.0.ffn": "fp8", "embedding": "bf16"})
    assert (after.ambient, after.stream) == (Format.BF16, Format.FP32)
    assert after.fp8_recipe is Fp8Recipe.TENSORWISE
    changed = {name for name in after.assignment if after.assignment[name] is not before.assignment[name]}
    assert changed == {"blocks.0.ffn", "embedding"}
    assert after.evidence == Evidence(), "what was measured of another plan says nothing of this one"
    assert before.assignment["blocks.0.ffn"] is Format.BF16, "plans are values"


def test_replace_keeps_a_recipe_and_one_that_changes_nothing_is_the_same_plan() -> None:
    plan = dataclasses.replace(Plan.uniform(profile(), "fp8"), fp8_recipe=Fp8Recipe.ROWWISE, evidence=Evidence(seed=3))
    assert plan.replace({"lm_head": "bf16"}).fp8_recipe is Fp8Recipe.ROWWISE
    assert plan.replace({"lm_head": "fp8"}) == plan
    assert plan.replace({}) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block.0.ffn": "bf16"}, r"no unit 'block\.0\.ffn'; closest: blocks\.0\.ffn"),
        ({"lm_head": "int8"}, r"'int8' is no format; choose one of fp32, bf16, fp16, fp8"),
        ({"embedding": "fp8"}, r"unit 'embedding' cannot take fp8: .*lookup has no matmul"),
        ({"stem": "fp8"}, r"unit 'stem' cannot take fp8: .*convolution"),
    ],
)
def test_replace_and_assign_refuse_what_cannot_be(change: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.uniform(profile(), "bf16").replace(change)
    with pytest.raises(PlanError, match=message):
        Plan.assign(profile(), change)


def test_assign_refuses_what_the_unit_itself_cannot_take() -> None:
    whole = profile()
    narrow = dataclasses.replace(whole.units[-1], formats=LOOKUP)
    with pytest.raises(PlanError, match="unit 'lm_head' cannot take fp8: it takes fp32, bf16, fp16"):
        Plan.assign(dataclasses.replace(whole, units=(*whole.units[:-1], narrow)), {"lm_head": "fp8"})


def test_assign_refuses_unknown_settings() -> None:
    with pytest.raises(PlanError, match="'blockwise' is not known; choose one of tensorwise, rowwise"):
        Plan.assign(profile(), {}, fp8_recipe="blockwise")
    with pytest.raises(PlanError, match="'serve' is not known; choose one of train, infer"):
        Plan.assign(profile(), {}, mode="serve")


def test_assign_gives_unnamed_units_what_the_ambient_gives() -> None:
    plan = Plan.assign(profile(), {"lm_head": "fp32"}, ambient="fp16", reason={"lm_head": "sensitive"})
    assert plan.assignment["blocks.0.ffn"] is Format.FP16
    assert plan.assignment["embedding"] is Format.FP32
    assert plan.unit("lm_head").reason == "sensitive"


def test_fp16_in_training_asks_for_a_gradient_scaler() -> None:
    bf16 = Plan.uniform(profile(), "bf16")
    fp16 = bf16.replace({"lm_head": "fp16"})
    assert (bf16.grad_scaler, fp16.grad_scaler) == (None, GradScalerSettings())
    assert fp16.replace({"lm_head": "bf16"}).grad_scaler is None
    assert Plan.uniform(profile(), "fp16", mode="infer").grad_scaler is None
    assert bf16.training_arguments["bf16"] and not bf16.training_arguments["fp16"]
    assert fp16.training_arguments["fp16"] and not fp16.training_arguments["bf16"]


def test_replace_keeps_training_arguments_that_are_not_about_formats() -> None:
    plan = Plan.uniform(profile(), "bf16")
    plan = dataclasses.replace(plan, training_arguments={**plan.training_arguments, "gradient_checkpointing": True})
    changed = plan.replace({"lm_head": "fp16"})
    assert changed.training_arguments["gradient_checkpointing"] is True
    assert changed.training_arguments["fp16"] is True


def test_diff_names_units_and_settings() -> None:
    a, b = Plan.uniform(profile(), "bf16"), Plan.uniform(profile(), "fp16").replace({"lm_head": "bf16"})
    difference = a.diff(b)
    assert "lm_head" not in difference.units
    assert difference.units["stem"] == (Format.BF16, Format.FP16)
    assert difference.settings["ambient"] == (Format.BF16, Format.FP16)
    assert "blocks.0.ffn: bf16 -> fp16" in str(difference)
    assert not a.diff(a)
    assert str(a.diff(a)) == "no difference"


def test_diff_of_plans_for_different_models() -> None:
    a = Plan.uniform(profile(), "bf16")
    b = dataclasses.replace(a, model=PlanModel(id="other", class_name="TinyModel", fingerprint="0" * 64))
    assert a.diff(b).settings == {"model": ("tiny", "other")}
    fewer = dataclasses.replace(a, units=a.units[:-1])
    assert a.diff(fewer).units == {"lm_head": (Format.BF16, None)}


def test_unknown_unit_is_named_with_its_closest() -> None:
    with pytest.raises(PlanError, match="no unit 'lmhead'; closest: lm_head"):
        Plan.uniform(profile(), "bf16").unit("lmhead")


def test_modules_that_the_model_lacks_are_named() -> None:
    plan = Plan.uniform(profile(), "bf16")
    modules = [m for u in plan.units for m in u.modules]
    check_modules(plan, modules)
    with pytest.raises(PlanError, match=r"unit 'blocks\.1\.ffn' names module 'h\.1\.mlp\.up'.*closest.*made for tiny"):
        check_modules(plan, [m for m in modules if m != "h.1.mlp.up"])


def test_support_names_the_units_a_device_cannot_run() -> None:
    (missing,) = support_of(Plan.uniform(profile(), "fp8"), device())
    assert missing == "fp8 in 5 units (first blocks.0.attention): box lacks it (no FP8 units)"
    assert support_of(Plan.uniform(profile(), "bf16"), device()) == ()
