"""Code that puts a recommended plan in force: a few lines to paste, and a script that runs as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.setup import TrainMethod
from autoprec.records import Mode

__all__ = ["ADAPTERS", "is_own", "loading_lines", "snippet_text"]

#: rank and layers of adapters that memory is counted for (`predict.setup.Setup`)
ADAPTERS = 'LoraConfig(r=16, target_modules="all-linear")'
#: adapters and packed weights change the layers that a plan names
REFIT = 'autoprec.Plan.load("plan.json").refit(model)'


def snippet_text(plan: Plan, arguments: Mapping[str, Any], method: TrainMethod) -> str:
    """Return the lines that load the model as the plan needs it and train, or run, with it."""
    own = is_own(plan)
    loaded = "model = ...  # yours, with fp32 weights" if own else loading_lines(plan, method)
    if plan.mode is Mode.INFER:
        names = "" if own else f"from transformers import {plan.model.class_name}\n\n"
        return f'import autoprec\n{names}{loaded}\nautoprec.apply(model.eval(), autoprec.Plan.load("plan.json"))\n'
    classes = sorted({"TrainingArguments"} | (set() if own else {plan.model.class_name} | _needed(method)))
    lines = ["import torch"] if method is TrainMethod.QLORA and not own else []
    if method is not TrainMethod.FULL:
        lines.append("from peft import LoraConfig, get_peft_model")
    lines += [
        f"from transformers import {', '.join(classes)}",
        "",
        "from autoprec.integrations.transformers import PrecisionTrainer",
    ]
    if method is not TrainMethod.FULL:
        lines.insert(-1, "import autoprec")
    if plan.model.id == "demo":
        lines.insert(-1, "from autoprec.demo import folder")
    lines += ["", loaded]
    if method is not TrainMethod.FULL:
        lines += [f"model = get_peft_model(model, {ADAPTERS})", f"plan = {REFIT}"]
    settings = "".join(f"    {name}={_source(value)},\n" for name, value in arguments.items())
    plan_source = '"plan.json"' if method is TrainMethod.FULL else "plan"
    lines += [
        f'arguments = TrainingArguments(\n    output_dir="output",\n{settings})',
        f"PrecisionTrainer(model, arguments, train_dataset=dataset, plan={plan_source}).train()",
    ]
    return "\n".join(lines) + "\n"


def is_own(plan: Plan) -> bool:
    """Say whether the model is no Hugging Face id or folder, so that only its owner can load it."""
    return ".py:" in plan.model.id or plan.model.id == plan.model.class_name


def _source(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _needed(method: TrainMethod) -> set[str]:
    return {"BitsAndBytesConfig"} if method is TrainMethod.QLORA else set()


def loading_lines(plan: Plan, method: TrainMethod) -> str:
    """Return the lines that load the model: FP32 weights to train, a frozen base in 16 bits or 4."""
    name = "folder()" if plan.model.id == "demo" else json.dumps(plan.model.id)
    low = {Format.FP32: "float32", Format.BF16: "bfloat16", Format.FP16: "float16"}[plan.ambient]
    if method is TrainMethod.QLORA:
        return (
            "packed = BitsAndBytesConfig(\n"
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
            f"    bnb_4bit_compute_dtype=torch.{low},\n)\n"
            f"model = {plan.model.class_name}.from_pretrained({name}, quantization_config=packed, dtype=torch.{low})"
        )
    # a layer norm of a CPU refuses 16-bit weights beside an fp32 stream, which CUDA's autocast widens
    frozen = method is TrainMethod.LORA and Format.FP32 not in plan.formats and plan.device.kind != "cpu"
    stored = low if frozen else "float32"
    return f'model = {plan.model.class_name}.from_pretrained({name}, dtype="{stored}")'
