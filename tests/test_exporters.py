"""Exported code: it compiles, says what the plan says, and trains a real model with the plan in force."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import samples
import torch
from export_worker import not_as_planned
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autoprec
from autoprec.errors import ExportError, UsageError
from autoprec.exporters import TARGETS, export, nearest
from autoprec.formats import Format
from autoprec.plan import Evidence, GradScalerSettings, Plan, PlanModel
from autoprec.records import Mode


def plans() -> dict[str, Plan]:
    profile = samples.model_profile()
    return {
        "mixed": samples.plan(),
        "fp16": Plan.uniform(profile, "fp16"),
        "fp8": Plan.uniform(profile, "fp8"),
        "cast": Plan.cast(profile, "bf16"),
        "infer": Plan.uniform(profile, "bf16", mode=Mode.INFER),
    }


def compiled(text: str) -> CodeType:
    return compile(text, "exported", "exec")


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compiled(text), names)
    return names


def tiny_gpt2() -> Any:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config)


def tiny_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of one repeated sequence, which a few steps can learn."""
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for _ in range(count)]


#: targets whose text is a configuration, and no Python
CONFIGURATIONS = ("accelerate", "jax")
#: targets whose text holds all it needs
WITHOUT_PLAN = ("torchao", "keras", "torchtitan", "transformer-engine")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", plans())
def test_every_target_compiles_and_names_formats_and_plan(target: str, name: str) -> None:
    plan = nearest(plans()[name], target)
    text = export(plan, target, "some folder/plan.json")
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert max(map(len, text.splitlines())) <= 120
    if target == "jax":
        assert json.loads(text)["plan"] == "some folder/plan.json"
        return
    assert f"ambient {plan.ambient}, residual stream {plan.stream}" in text
    for choice in plan.formats:
        assert f"  {choice}: " in text
    if target not in CONFIGURATIONS:
        compiled(text)
    if target not in WITHOUT_PLAN and target not in CONFIGURATIONS:
        assert 'PLAN = "some folder/plan.json"' in text
        assert "autoprec.apply(" in text or "traced(" in text


#: which of `plans()` each target refuses; the others it takes as they are
REFUSED = {
    "python": (),
    "transformers": (),
    "torch-compile": (),
    "accelerate": ("infer",),
    "lightning": ("infer",),
    "ddp": ("infer",),
    "fsdp2": ("infer",),
    "torchao": ("mixed", "cast"),
    "onnx": ("fp8", "cast"),
    "tensorrt": ("fp8", "cast"),
    "keras": ("fp8", "cast"),
    "jax": ("fp8",),
    "deepspeed": ("cast", "infer"),
    "swift": ("fp8", "cast", "infer"),
    "torchtitan": ("mixed", "fp16", "fp8", "cast", "infer"),
    "transformer-engine": ("mixed", "cast", "infer"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", plans())
def test_what_a_target_cannot_express_is_refused_and_the_nearest_offered(target: str, name: str) -> None:
    plan = plans()[name]
    if name not in REFUSED[target]:
        assert nearest(plan, target) is plan
        export(plan, target)
        return
    with pytest.raises(ExportError, match=f"'{target}' cannot express this plan") as refused:
        export(plan, target)
    assert f"autoprec.exporters.nearest(autoprec.Plan.load('plan.json'), '{target}')" in str(refused.value)
    offered = refused.value.nearest
    assert isinstance(offered, Plan)
    assert offered == nearest(plan, target)
    assert offered.evidence == Evidence()  # its figures were another plan's
    assert nearest(offered, target) is offered
    export(offered, target)


def test_a_refusal_names_layers_formats_and_reason() -> None:
    with pytest.raises(ExportError) as refused:
        export(plans()["fp8"], "swift")
    message = str(refused.value)
    assert "fp8 in 7 units, layers model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in message
    assert "and 16 more (it can: bf16): ms-swift has no FP8 training for a layer" in message


def test_the_nearest_plan_changes_no_more_than_it_must() -> None:
    plan = plans()["mixed"].replace({"blocks.1.ffn": "fp8", "lm_head": "fp16"})
    assert dict(nearest(plan, "onnx").diff(plan).units) == {"blocks.1.ffn": ("bf16", "fp8")}
    assert dict(nearest(plan, "torchao").diff(plan).units) == {
        "blocks.0.ffn": ("bf16", "fp32"),
        "lm_head": ("bf16", "fp16"),
    }
    assert nearest(plan, "onnx").fp8_recipe is None
    rowwise = nearest(plan, "torchtitan")
    assert (rowwise.fp8_recipe, rowwise.grad_scaler) == ("rowwise", None)
    assert nearest(plans()["infer"], "ddp").training_arguments["bf16"] is True


def test_torchtitan_refuses_names_that_hit_other_layers() -> None:
    plan = Plan.uniform(samples.model_profile(), "fp8", fp8_recipe="rowwise")
    units = tuple(replace(u, modules=("head",), format=Format.BF16) if u.name == "lm_head" else u for u in plan.units)
    units = tuple(replace(u, modules=("model.headroom",)) if u.name == "blocks.1.ffn" else u for u in units)
    with pytest.raises(ExportError, match="'head', which is not to be in fp8, is part of 'model.headroom'"):
        export(replace(plan, units=units), "torchtitan")


def test_configurations_never_cast_parameters() -> None:
    names: dict[str, Any] = run(export(plans()["fp16"], "deepspeed"))
    assert names["CONFIG"]["bf16"] == names["CONFIG"]["fp16"] == {"enabled": False}
    assert names["CONFIG"]["torch_autocast"]["dtype"] == "float16"
    for name, mixed in (("mixed", "bf16"), ("fp16", "fp16"), ("fp8", "bf16"), ("cast", "bf16")):
        assert f"mixed_precision: '{mixed}'\n" in export(plans()[name], "accelerate")


def test_scaler_settings_arrive_or_are_said_not_to() -> None:
    settings = GradScalerSettings(init_scale=1024.0, growth_factor=4.0, growth_interval=7)
    plan = replace(Plan.uniform(samples.model_profile(), "fp16"), grad_scaler=settings)
    for target in ("python", "ddp", "fsdp2", "torch-compile", "torchao", "lightning", "accelerate", "keras", "jax"):
        assert "1024.0" in export(plan, target), target
    assert "DeepSpeed makes its scaler with the defaults" in export(plan, "deepspeed")
    assert "The plan asks for factors of 4.0 and 0.5" in export(plan, "keras")


def test_unknown_targets_are_refused_with_the_list() -> None:
    message = r"'pyton' is no export target; choose one of python, transformers, .*; closest: python"
    for asked in (export, nearest):
        with pytest.raises(UsageError, match=message):
            asked(samples.plan(), "pyton")
    with pytest.raises(UsageError, match="closest: torch-compile"):
        export(samples.plan(), "torch_compile")


def test_the_facade_exports_too() -> None:
    assert autoprec.export(samples.plan(), "python") == export(samples.plan(), "python")


@pytest.mark.parametrize("target", TARGETS)
def test_names_from_elsewhere_cannot_become_code(target: str) -> None:
    evil = 'x"""\nimport os\nos.abort()\n"""'
    plan = samples.plan()
    unit = replace(plan.units[0], name='u"""\nraise SystemExit("""')
    plan = replace(plan, model=replace(plan.model, id=evil), units=(unit, *plan.units[1:]))
    text = export(nearest(plan, target), target)
    if target == "accelerate":
        assert all(line.startswith("#") or line.split(":")[0].isidentifier() for line in text.splitlines())
    elif target == "jax":
        assert json.loads(text)["model"] == evil
    else:
        code = compiled(text)
        assert "abort" not in code.co_names
        assert "SystemExit" not in code.co_names


@pytest.mark.parametrize("choice", ["bf16", "fp16"])
def test_the_python_target_trains_a_model_under_the_plan(choice: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    plan = Plan.uniform(model, choice).replace({"lm_head": "fp32"})
    plan.save(tmp_path / "plan.json")
    exported = run(export(plan, "python", str(tmp_path / "plan.json")))

    assert exported["prepare"](model) is model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = exported["train"](model, tiny_batches(12), optimizer)

    assert len(losses) == 12
    # one sequence learned by heart: far below the ln 64 = 4.16 of a model that knows nothing
    assert losses[0] == pytest.approx(4.16, abs=0.5)
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert ("make_scaler" in exported) is (choice == "fp16")
    assert not_as_planned(autoprec.audit(model, plan, tiny_batches(1)[0]), plan) == []


def test_the_python_target_makes_the_scaler_the_plan_asks_for() -> None:
    settings = GradScalerSettings(init_scale=1024.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=7)
    plan = replace(Plan.uniform(samples.model_profile(), "fp16"), grad_scaler=settings)
    scaler = run(export(plan, "python"))["make_scaler"](tiny_gpt2())
    state = scaler.state_dict()
    assert (state["scale"], state["growth_factor"], state["backoff_factor"]) == (1024.0, 4.0, 0.25)
    assert state["growth_interval"] == 7


def test_the_python_target_predicts_for_a_plan_of_inference(tmp_path: Path) -> None:
    model = tiny_gpt2()
    plan = Plan.uniform(model, "bf16", mode=Mode.INFER)
    plan.save(tmp_path / "plan.json")
    exported = run(export(plan, "python", str(tmp_path / "plan.json")))
    batches = tiny_batches(2)
    outputs = exported["predict"](exported["prepare"](model), batches)
    assert [output.logits.dtype for output in outputs] == [torch.bfloat16] * 2
    assert not model.training


def test_the_transformers_target_trains_with_a_trainer(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    device = samples.device_profile()
    profile = replace(autoprec.probe_units(LlamaForCausalLM(config)), model_id=str(tmp_path / "model"))
    plan = Plan.uniform(profile, "bf16", device=device).replace({"lm_head": "fp32"})
    plan.save(tmp_path / "plan.json")
    exported = run(export(plan, "transformers", str(tmp_path / "plan.json")))

    model = exported["load_model"]()
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype is torch.float32  # although the checkpoint is bf16
    arguments = exported["make_arguments"](
        str(tmp_path / "out"), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
        logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    assert arguments.bf16 and not arguments.fp16 and not arguments.bf16_full_eval
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_batches(1)[0]["input_ids"].repeat(4, 1)]
    trainer = exported["make_trainer"](model, arguments, rows)
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert not_as_planned(autoprec.audit(trainer.model_wrapped, plan, tiny_batches(1)[0]), plan) == []


def test_the_transformers_target_writes_the_plans_arguments() -> None:
    plan = replace(
        Plan.uniform(samples.model_profile(), "fp16"),
        training_arguments={"fp16": True, "bf16": False, "optim": "adamw_torch", "optim_args": {"eps": 1e-7}},
    )
    text = export(plan, "transformers")
    for line in ("fp16=True,", "bf16=False,", 'optim="adamw_torch",', "optim_args={'eps': 1e-07},"):
        assert f"        {line}\n" in text
    assert "use_cpu" not in text  # the plan is for no device in particular


def test_the_transformers_target_says_what_the_trainer_cannot_do() -> None:
    plan = Plan.uniform(samples.model_profile(), "fp16", device=samples.device_profile())
    text = export(replace(plan, grad_scaler=GradScalerSettings(init_scale=1024.0)), "transformers")
    assert "use_cpu=True" in text
    assert "On a CPU the Trainer scales no gradients" in text
    assert "1024" in text
    assert "TrainingArguments has no FP8" in export(plans()["fp8"], "transformers")


@pytest.mark.parametrize(
    ("model_id", "class_name", "loader"),
    [
        ("org/a", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("org/a", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("org/a", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("org/a", "BertModel", "AutoModel"),
        ("demo", "GPT2LMHeadModel", None),
        ("net.py:make", "Net", None),
        ("Net", "Net", None),
    ],
)
def test_a_loader_is_written_for_hub_models_only(model_id: str, class_name: str, loader: str | None) -> None:
    model = PlanModel(id=model_id, class_name=class_name, fingerprint="0")
    text = export(replace(samples.plan(), model=model), "transformers")
    compiled(text)
    assert ("def load_model" in text) is (loader is not None)
    if loader:
        assert f"return {loader}.from_pretrained(model_id, dtype=torch.float32)" in text
        assert f"model_id: str = {json.dumps(model_id)}" in text
