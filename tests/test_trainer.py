"""A plan in a real Hugging Face Trainer: the same bits as its own flags, and right where it has no flag."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, gpt2
from torch import nn
from transformers import Trainer, TrainingArguments

import autoprec
from autoprec import Plan
from autoprec.errors import DeviceError, PlanError, TrainingError, UsageError
from autoprec.formats import Format
from autoprec.integrations.transformers import (
    AutoPrecisionArguments,
    PrecisionCallback,
    PrecisionMixin,
    PrecisionTrainer,
)
from autoprec.plan import Evidence, GradScalerSettings
from autoprec.records import Role


def model_of(**changes: Any) -> Any:
    """Return the same tiny GPT-2 each time, two blocks, dropout on."""
    torch.manual_seed(0)
    return gpt2(n_layer=2, n_embd=32, **changes)


def data_of(count: int = 40) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(out: Path, kind: Any = TrainingArguments, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return kind(**settings | changes)


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [float(row[name]) for row in trainer.state.log_history if name in row]


def trained(out: Path, plan: Plan | str, model: Any = None, **changes: Any) -> Any:
    given = model_of() if model is None else model
    made = Plan.uniform(given, plan) if isinstance(plan, str) else plan
    trainer = PrecisionTrainer(
        given, arguments(out, **changes), train_dataset=data_of(), eval_dataset=data_of(4), plan=made, emulate=True
    )
    trainer.train()
    return trainer


def mixed(model: nn.Module) -> Plan:
    """BF16, but one FFN in FP32, one attention in FP16."""
    plan = Plan.uniform(model, "bf16")
    ffn = [u.name for u in plan.units if u.role is Role.FFN]
    attention = [u.name for u in plan.units if u.role is Role.ATTENTION]
    return plan.replace({ffn[0]: "fp32", attention[1]: "fp16"})


# the same bits


def test_uniform_bf16_gives_the_losses_of_the_trainers_own_flag_to_the_bit(tmp_path: Path) -> None:
    own = Trainer(model_of(), arguments(tmp_path, bf16=True, max_steps=100), train_dataset=data_of())
    own.train()
    ours = trained(tmp_path, "bf16", max_steps=100)
    assert len(history(own)) == 100
    assert history(ours) == history(own)
    assert history(ours, "grad_norm") == history(own, "grad_norm")
    for mine, theirs in zip(ours.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_fp32_gives_the_losses_without_a_flag(tmp_path: Path) -> None:
    own = Trainer(model_of(), arguments(tmp_path), train_dataset=data_of())
    own.train()
    assert history(trained(tmp_path, "fp32")) == history(own)


#: its name from 5.20 on, and that before
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


@pytest.mark.parametrize("changes", [{CHECKPOINTING: True}, {"gradient_accumulation_steps": 2}])
def test_mixed_plans_train_the_same_under_the_trainers_options(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = model_of(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    plan = mixed(model)
    plain = trained(tmp_path, plan, model)
    if "gradient_accumulation_steps" in changes:
        changes = changes | {"per_device_train_batch_size": 1}
    other = trained(tmp_path, plan, model_of(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), **changes)
    expected = history(plain)
    # accumulated losses are summed in another order; checkpointing repeats the same sums
    tolerance = 1e-4 if "gradient_accumulation_steps" in changes else 0.0
    assert history(other) == pytest.approx(expected, rel=tolerance, abs=0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
def test_compiled_training_follows_the_plan(tmp_path: Path) -> None:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # a compiler draws its random numbers elsewhere
    plain = trained(tmp_path, mixed(model_of()), model_of(**still))
    # aot_eager runs the same kernels
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trained(tmp_path, mixed(model_of()), model_of(**still), **options)
    torch.compiler.reset()
    assert history(compiled) == history(plain)


# what is in force


def test_units_compute_in_their_formats_in_training_evaluation_and_prediction(tmp_path: Path) -> None:
    model = model_of()
    plan = mixed(model)
    seen: dict[tuple[bool, str], set[torch.dtype]] = {}
    for name in ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.setdefault((module.training, name), set()).add(y.dtype)
        )
    trainer = trained(tmp_path, plan, model)
    trainer.evaluate()
    assert trainer.predict(data_of(4)).predictions[0].dtype == "float32"
    for training in (True, False):
        assert seen[training, "transformer.h.0.mlp.c_fc"] == {torch.float32}
        assert seen[training, "transformer.h.1.mlp.c_fc"] == {torch.bfloat16}
        assert seen[training, "transformer.h.1.attn.c_attn"] == {torch.float16}


def test_evaluation_needs_no_training_and_the_plan_comes_off_again(tmp_path: Path) -> None:
    model = model_of()
    trainer = PrecisionTrainer(
        model, arguments(tmp_path), train_dataset=data_of(), eval_dataset=data_of(4), plan=Plan.uniform(model, "bf16")
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.applied is not None
    low = model(**{k: v[None] for k, v in data_of(1)[0].items()}).logits
    trainer.applied.remove()
    plain = gpt2(n_layer=2, n_embd=32)
    plain.load_state_dict(model.state_dict())
    batch = {k: v[None] for k, v in data_of(1)[0].items()}
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # accelerate's own autocast stays around the model; in it the plain FP32 model gives the same
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain(**batch).logits.float()
        assert torch.equal(model(**batch).logits, expected)
    assert low.dtype is torch.float32 and before > 0


def test_fp16_gradients_are_scaled_and_clipped_unscaled(tmp_path: Path) -> None:
    exact = trained(tmp_path, "fp32")
    low = trained(tmp_path, "fp16")
    scaler = low.accelerator.scaler
    assert scaler.get_scale() == 65536.0 and scaler.is_enabled()
    # scaled gradients would have a norm 65536 times as large, and clipping at 1.0 would then hide it from the losses
    assert history(low, "grad_norm") == pytest.approx(history(exact, "grad_norm"), rel=0.02)
    assert history(low) == pytest.approx(history(exact), rel=1e-3)
    assert history(low) != history(exact)


def test_the_plans_scaler_settings_are_used_and_an_overflow_skips_the_step(tmp_path: Path) -> None:
    model = model_of()
    start = {name: p.clone() for name, p in model.named_parameters()}
    settings = GradScalerSettings(init_scale=2.0**60, backoff_factor=2.0**-20, growth_interval=3)
    plan = dataclasses.replace(Plan.uniform(model, "fp16"), grad_scaler=settings)
    trainer = trained(tmp_path, plan, model, max_steps=1)
    assert trainer.accelerator.scaler.get_scale() == 2.0**40
    assert trainer.accelerator.scaler.get_growth_interval() == 3
    assert all(torch.equal(start[name], p) for name, p in model.named_parameters())


def test_the_ambient_is_the_plans_with_fp16_units_too(tmp_path: Path) -> None:
    model = model_of()
    seen = set()
    model.lm_head.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    trainer = trained(tmp_path, mixed(model), model, max_steps=1)
    assert trainer.args.fp16 and seen == {torch.bfloat16}


def test_fp8_units_train_emulated_and_raise_without(tmp_path: Path) -> None:
    assert history(trained(tmp_path, "fp8"))[-1] < 10
    model = model_of()
    with pytest.raises(DeviceError, match="emulate=True"):
        PrecisionTrainer(model, arguments(tmp_path), train_dataset=data_of(), plan=Plan.uniform(model, "fp8"))


def test_one_trainer_after_another_in_other_formats(tmp_path: Path) -> None:
    made = [arguments(tmp_path), arguments(tmp_path), arguments(tmp_path)]
    for args, choice in zip(made, ("bf16", "fp16", "fp32"), strict=True):
        model = model_of()
        trainer = PrecisionTrainer(model, args, train_dataset=data_of(), plan=Plan.uniform(model, choice))
        trainer.train()
        assert (args.bf16, args.fp16) == (False, False)  # the user's own stay as they are
        assert (trainer.args.bf16, trainer.args.fp16) == (choice == "bf16", choice == "fp16")


# checkpoints


def test_resuming_goes_on_to_the_bit(tmp_path: Path) -> None:
    plan = mixed(model_of())
    whole = trained(tmp_path / "whole", plan, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert Plan.load(checkpoint / "plan.json") == plan
    model = model_of()
    again = PrecisionTrainer(model, arguments(tmp_path / "whole"), train_dataset=data_of(), plan=plan)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert history(again)[-3:] == history(whole)[-3:]
    assert again.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale()


def test_resuming_with_another_plan_raises_and_names_both(tmp_path: Path) -> None:
    trained(tmp_path, "bf16", save_strategy="steps", save_steps=3)
    model = model_of()
    plan = mixed(model)
    trainer = PrecisionTrainer(model, arguments(tmp_path), train_dataset=data_of(), plan=plan)
    with pytest.raises(PlanError, match=r"another plan.*fp32 -> bf16.*checkpoint-6/plan.json"):
        trainer.train(resume_from_checkpoint=True)


def test_a_chosen_plan_gives_way_to_the_checkpoints(tmp_path: Path) -> None:
    model = model_of()
    plan = Plan.uniform(model, "bf16")
    own = plan.replace({plan.units[-1].name: "fp32"})
    trained(tmp_path, own, save_strategy="steps", save_steps=3)
    plan.save(tmp_path / "other.json")
    args = arguments(tmp_path, AutoPrecisionArguments, precision_plan=str(tmp_path / "other.json"), max_steps=8)
    trainer = PrecisionTrainer(model, args, train_dataset=data_of())
    assert trainer.plan == plan
    trainer.train(resume_from_checkpoint=True)
    assert trainer.plan == own


def test_a_final_save_holds_plain_weights_and_the_plan(tmp_path: Path) -> None:
    trainer = trained(tmp_path, mixed(model_of()))
    trainer.save_model(str(tmp_path / "final"))
    loaded = type(gpt2()).from_pretrained(tmp_path / "final")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    autoprec.apply(loaded, Plan.load(tmp_path / "final" / "plan.json"))


# ways to give a plan


def test_automatic_precision_recommends_and_keeps_the_plan(tmp_path: Path) -> None:
    model = model_of()
    args = arguments(tmp_path, AutoPrecisionArguments, auto_precision=True)
    trainer = PrecisionTrainer(model, args, train_dataset=data_of())
    trainer.train()
    assert trainer.plan.device.kind == "cpu"
    assert Plan.load(tmp_path / "plan.json") == trainer.plan
    assert autoprec.runtime.integrity.not_in_force(model, trainer.plan) is None


def test_without_a_plan_or_a_wish_it_says_how(tmp_path: Path) -> None:
    for kind in (TrainingArguments, AutoPrecisionArguments):
        with pytest.raises(UsageError, match="auto_precision=True"):
            PrecisionTrainer(model_of(), arguments(tmp_path, kind), train_dataset=data_of())


def test_the_mixin_goes_before_a_trainer_of_ones_own(tmp_path: Path) -> None:
    class Own(Trainer):  # type: ignore[misc]
        steps = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            Own.steps += 1
            return super().compute_loss(*args, **kwargs)

    class Both(PrecisionMixin, Own):
        pass

    path = tmp_path / "plan.json"
    Plan.uniform(model_of(), "bf16").save(path)
    trainer = Both(args=arguments(tmp_path), model_init=lambda: model_of(), train_dataset=data_of(), plan=str(path))
    trainer.train()
    assert Own.steps == 6
    plain = Trainer(args=arguments(tmp_path, bf16=True), model_init=lambda: model_of(), train_dataset=data_of())
    plain.train()
    assert history(trainer) == history(plain)


def test_the_callback_puts_a_plan_in_force_in_a_plain_trainer(tmp_path: Path) -> None:
    model = model_of()
    plan = Plan.uniform(model, "bf16").replace({Plan.uniform(model, "bf16").units[-1].name: "fp32"})
    trainer = Trainer(
        model,
        arguments(tmp_path, bf16=True, save_strategy="steps", save_steps=3),
        train_dataset=data_of(),
        callbacks=[PrecisionCallback(plan)],
    )
    trainer.train()
    assert history(trainer) == history(trained(tmp_path, plan))
    assert Plan.load(tmp_path / "checkpoint-3" / "plan.json") == plan


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_trains_under_a_plan(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(model_of(), config)
    plan = mixed(model)
    frozen = model.base_model.model.transformer.h[0].mlp.c_fc.base_layer.weight.clone()
    trainer = trained(tmp_path, plan, model, save_strategy="steps", save_steps=3)
    assert torch.equal(frozen, model.base_model.model.transformer.h[0].mlp.c_fc.base_layer.weight)
    assert history(trainer)[0] != history(trainer)[-1]
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() and Plan.load(checkpoint / "plan.json") == plan
    again = PrecisionTrainer(
        peft.get_peft_model(model_of(), config), arguments(tmp_path), train_dataset=data_of(), plan=plan
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    assert history(again)[-3:] == history(trainer)[-3:]


# bad input: before the first step, with the mend


@pytest.mark.parametrize(
    ("choice", "changes", "message"),
    [
        ("fp16", {"bf16": True}, r"bf16=True does not go with this plan.*gradient scaler.*Leave bf16 out"),
        ("bf16", {"fp16": True}, r"fp16=True.*On a CPU, fp16=True trains in fp32"),
        ("fp32", {"bf16": True}, r"bf16=True.*nothing in it is bf16"),
        ("bf16", {"bf16_full_eval": True}, r"bf16_full_eval=True casts the whole model"),
    ],
)
def test_arguments_that_work_against_the_plan(
    tmp_path: Path, choice: str, changes: dict[str, Any], message: str
) -> None:
    model = model_of()
    with pytest.raises(PlanError, match=message):
        PrecisionTrainer(
            model, arguments(tmp_path, **changes), train_dataset=data_of(), plan=Plan.uniform(model, choice)
        )


@pytest.mark.parametrize(
    ("stored", "choice", "message"),
    [
        (torch.float16, "fp16", r"stored in float16.*cannot unscale fp16 gradients.*dtype=torch.float32"),
        (torch.bfloat16, "bf16", r"stored in bfloat16.*no fp32 master copies.*dtype=torch.float32"),
        (torch.bfloat16, "fp32", r"stored in bfloat16.*no fp32 master copies.*dtype=torch.float32"),
    ],
)
def test_weights_loaded_low(tmp_path: Path, stored: torch.dtype, choice: str, message: str) -> None:
    model = model_of()
    model.to(stored).save_pretrained(tmp_path / "low")
    loaded = type(model).from_pretrained(tmp_path / "low")  # Transformers 5: in the checkpoint's own format
    assert loaded.dtype is stored
    with pytest.raises(PlanError, match=message):
        PrecisionTrainer(loaded, arguments(tmp_path), train_dataset=data_of(), plan=Plan.uniform(loaded, choice))


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    plan = Plan.uniform(gpt2(n_layer=1, n_embd=32), "bf16")
    with pytest.raises(PlanError, match="differs in its modules"):
        PrecisionTrainer(model_of(), arguments(tmp_path), train_dataset=data_of(), plan=plan)


def test_a_plan_measured_on_another_revision_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    plan = Plan.uniform(model, "bf16").with_evidence(Evidence(weights_digest="another"))
    PrecisionTrainer(model, arguments(tmp_path), train_dataset=data_of(), plan=plan)
    assert "other weights" in caplog.text


def test_a_plan_for_inference(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(PlanError, match="made for inference"):
        PrecisionTrainer(
            model, arguments(tmp_path), train_dataset=data_of(), plan=Plan.uniform(model, "bf16", mode="infer")
        )


def test_the_callback_cannot_scale_on_a_cpu_and_says_who_can(tmp_path: Path) -> None:
    model = model_of()
    callback = PrecisionCallback(Plan.uniform(model, "fp16"))
    trainer = Trainer(model, arguments(tmp_path, fp16=True), train_dataset=data_of(), callbacks=[callback])
    with pytest.raises(PlanError, match=r"none on cpu.*PrecisionTrainer"):
        trainer.train()


def test_a_callback_that_comes_late(tmp_path: Path) -> None:
    model = model_of()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data_of())
    trainer.add_callback(PrecisionCallback(Plan.uniform(model, "bf16")))
    with pytest.raises(PlanError, match="came after"):
        trainer.train()


def test_a_loss_that_is_nan_in_fp32_too(tmp_path: Path) -> None:
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in data_of(4)]
    model = model_of()
    trainer = PrecisionTrainer(model, arguments(tmp_path), train_dataset=data, plan=Plan.uniform(model, "bf16"))
    with pytest.raises(TrainingError, match=r"loss is nan at the first step, and nan in fp32 as well.*-100"):
        trainer.train()


def test_a_loss_that_the_plan_spoils_names_the_unit(tmp_path: Path) -> None:
    model = model_of()
    ffn = model.transformer.h[1].mlp
    with torch.no_grad():  # at equal function: what goes into the activation is small, so it is near linear there
        ffn.c_proj.weight *= 1e9
        ffn.c_fc.weight *= 1e-3
        ffn.c_fc.bias *= 1e-3
    plan = Plan.uniform(model, "fp16")
    unit = next(u.name for u in plan.units if "transformer.h.1.mlp.c_fc" in u.modules)
    trainer = PrecisionTrainer(model, arguments(tmp_path), train_dataset=data_of(), plan=plan)
    with pytest.raises(TrainingError, match=rf"loss is nan .* in fp32. The first values .* '{unit}' \(fp16\).*bf16"):
        trainer.train()
    assert trainer.plan.assignment[unit] is Format.FP16  # back in force after the look in FP32
