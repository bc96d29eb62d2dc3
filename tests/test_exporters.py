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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autoprec
from autoprec.errors import UsageError
from autoprec.exporters import TARGETS, export
from autoprec.plan import GradScalerSettings, Plan, PlanModel
from autoprec.records import Mode
from autoprec.runtime.scope import Scope


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", plans())
def test_every_target_compiles_and_names_formats_and_plan(target: str, name: str) -> None:
    plan = plans()[name]
    text = export(plan, target, "some folder/plan.json")
    compiled(text)
    assert 'PLAN = "some folder/plan.json"' in text
    assert "autoprec.apply(" in text
    assert f"ambient {plan.ambient}, residual stream {plan.stream}" in text
    for choice in plan.formats:
        assert f"  {choice}: " in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_unknown_targets_are_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"'pyton' is no export target; choose one of python, transformers; closest: "):
        export(samples.plan(), "pyton")


def test_the_facade_exports_too() -> None:
    assert autoprec.export(samples.plan(), "python") == export(samples.plan(), "python")


@pytest.mark.parametrize("target", TARGETS)
def test_names_from_elsewhere_cannot_become_code(target: str) -> None:
    evil = 'x"""\nimport os\nos.abort()\n"""'
    plan = samples.plan()
    unit = replace(plan.units[0], name='u"""\nraise SystemExit("""')
    plan = replace(plan, model=replace(plan.model, id=evil), units=(unit, *plan.units[1:]))
    code = compiled(export(plan, target))
    assert "os" not in code.co_names
    assert "SystemExit" not in code.co_names


@pytest.mark.parametrize("choice", ["bf16", "fp16"])
def test_the_python_target_trains_a_model_under_the_plan(choice: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    plan = Plan.uniform(model, choice).replace({"lm_head": "fp32"})
    plan.save(tmp_path / "plan.json")
    exported = run(export(plan, "python", str(tmp_path / "plan.json")))

    assert exported["prepare"](model) is model
    assert any(isinstance(module, Scope) for module in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = exported["train"](model, tiny_batches(12), optimizer)

    assert len(losses) == 12
    # one sequence learned by heart: far below the ln 64 = 4.16 of a model that knows nothing
    assert losses[0] == pytest.approx(4.16, abs=0.5)
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert ("make_scaler" in exported) is (choice == "fp16")


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
    assert any(isinstance(module, Scope) for module in model.modules())


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
