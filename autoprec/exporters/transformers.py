"""Target `transformers`: TrainingArguments for what is global, and `autoprec.apply` for what is decided unit by unit.

TrainingArguments knows bf16, fp16 and tf32 for the whole model and nothing per layer, so it carries the ambient
only; the plan travels through `autoprec.apply`, which must come before the Trainer wraps the model.
"""

from __future__ import annotations

from autoprec.exporters.summary import literal, one_line, summary
from autoprec.formats import Format
from autoprec.plan import GradScalerSettings, Plan
from autoprec.records import Mode

__all__ = ["trainer_source"]

#: endings of class names and the automatic class that loads them
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
}

_HEAD = '''"""{title}

{summary}
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import {names}

import autoprec

PLAN = {plan_path}
'''

_LOAD = '''

def load_model(model_id: str = {model_id}) -> torch.nn.Module:
    """Load the model with FP32 weights; without `dtype` they would come in the checkpoint's own format."""
    return {auto}.from_pretrained(model_id, dtype=torch.float32)
'''

_ARGUMENTS = '''

def make_arguments(output_dir: str = "output", **others: Any) -> TrainingArguments:
    """Return the arguments that go with the plan, and yours with them.

    Leave bf16_full_eval and fp16_full_eval off: they cast the whole model for evaluation, and the plan with it.{notes}
    """
    return TrainingArguments(
        output_dir=output_dir,
{settings}
        **others,
    )


def make_trainer(model: torch.nn.Module, arguments: TrainingArguments, train_dataset: Any, **others: Any) -> Trainer:
    """Put the plan in force on a model with FP32 weights, then hand it to a Trainer."""
    autoprec.apply(model, autoprec.Plan.load(PLAN))
    return Trainer(model=model, args=arguments, train_dataset=train_dataset, **others)
'''

_INFER = '''

def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Put the plan in force on a model with FP32 weights, in place."""
    autoprec.apply(model.eval(), autoprec.Plan.load(PLAN))
    return model
'''


def trainer_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `make_arguments` and `make_trainer`, and `load_model` for a Hugging Face model."""
    training = plan.mode is Mode.TRAIN
    auto = _auto_class(plan)
    names = [*([auto] if auto else []), *(["Trainer", "TrainingArguments"] if training else [])]
    text = _HEAD.format(
        title=f"{'Train' if training else 'Run'} {one_line(plan.model.id)} with its autoprec plan.",
        summary=summary(plan),
        names=", ".join(names),
        plan_path=literal(plan_path),
    )
    if not names:
        text = text.replace("from transformers import \n", "")
    if auto:
        text += _LOAD.format(model_id=literal(plan.model.id), auto=auto)
    if not training:
        return text.replace("from typing import Any\n", "") + _INFER
    settings = "\n".join(f"        {name}={literal(value)}," for name, value in plan.training_arguments.items())
    return text + _ARGUMENTS.format(settings=settings, notes=_notes(plan))


def _auto_class(plan: Plan) -> str | None:
    """Return the class that loads the plan's model; None for what is no Hugging Face id or folder."""
    model = plan.model
    if model.id in ("demo", model.class_name) or ".py:" in model.id:
        return None
    return next((auto for ending, auto in _AUTO.items() if model.class_name.endswith(ending)), "AutoModel")


def _notes(plan: Plan) -> str:
    notes = []
    if plan.grad_scaler and plan.grad_scaler != GradScalerSettings():
        notes.append(f"The plan asks for {plan.grad_scaler}; the Trainer uses the defaults of GradScaler.")
    if plan.grad_scaler and plan.device.kind == "cpu":
        notes.append("On a CPU the Trainer scales no gradients: use the loop of `autoprec export --to python` there.")
    if Format.FP8 in plan.formats:
        notes.append("TrainingArguments has no FP8; the plan's FP8 units are put in force by autoprec.apply.")
    return "".join(f"\n    {note}" for note in notes)
