"""The script that `autoprec recommend --out` writes beside its plan: it loads the model and trains or runs it on text.

It reads plan and arguments from its own folder, so either can be edited and the script run again.
"""

from __future__ import annotations

import json

from autoprec.plan import Plan
from autoprec.predict.setup import TrainMethod
from autoprec.recommender.snippet import ADAPTERS, is_own, loading_lines
from autoprec.records import Mode

__all__ = ["ARGUMENTS_FILE", "script_name", "script_text"]

#: where the script reads its arguments, beside the plan
ARGUMENTS_FILE = "training_arguments.json"

#: endings of class names and the `Task` that text is prepared for
_TASKS = {"Classification": "CLASSIFICATION", "MaskedLM": "MASKED_LM", "CausalLM": "CAUSAL_LM", "LMHead": "CAUSAL_LM"}

_TOP = '''"""{verb} {model} with the plan beside this file, on text: written by autoprec recommend, yours to change.

    python {name} --data text.txt

Text is a paragraph a line, or JSONL with `text` and optionally `label`; without --data it is what ships with autoprec.
"""

from __future__ import annotations

import argparse
{imports}
HERE = Path(__file__).resolve().parent
MODEL = {quoted}
SEQ_LEN = {seq_len}
'''

_READ = '''

def read_batches(data: Path | None, batch_size: int, batches: int) -> Workload:
    """Load the model with fp32 weights and cut the text into batches."""
    return workload_from(
        MODEL, data=data, batch_size=batch_size, seq_len=SEQ_LEN, batches=batches, mode="{mode}", device="{device}"
    )
'''

_READ_ADAPTED = '''

def read_batches(data: Path | None, batch_size: int, batches: int) -> tuple[Any, list[Any]]:
    """Load the frozen base, cut the text into batches, and put adapters beside the base."""
    {loading}
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained({name}), MODEL, Task.{task})
    wish = BatchWish(batch_size=batch_size, seq_len=SEQ_LEN, batches=batches)
    made, _ = prepare_batches(loaded, read_examples(data), wish)
    return get_peft_model(model, {adapters}), made
'''

_TRAIN = """

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="text to train on")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    options = parser.parse_args()
    settings = json.loads((HERE / "{arguments}").read_text())
    passes = settings.get("gradient_accumulation_steps", 1)
    {unpacked} = {call}
    rows = [dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(HERE / "output"), max_steps=options.steps, logging_steps=1, report_to="none", **settings
    )
    trainer = PrecisionTrainer(model, arguments, train_dataset=rows, plan={plan})
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
"""

_RUN = """

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="text to run on")
    parser.add_argument("--batches", type=int, default=8, help="batches to run")
    options = parser.parse_args()
    work = read_batches(options.data, {batch_size}, options.batches)
    autoprec.apply(work.model.eval(), autoprec.Plan.load(HERE / "plan.json"))
    with torch.inference_mode():
        for batch in work.batches:
            outputs = work.model(**batch)
            first = next(value for value in outputs.values() if torch.is_tensor(value))
            print(list(outputs), first.float().mean().item())


if __name__ == "__main__":
    main()
"""

_PLAN = 'HERE / "plan.json"'
_PLAN_REFIT = f"autoprec.Plan.load({_PLAN}).refit(model)"

_IMPORTS = {
    Mode.TRAIN: """import json
from pathlib import Path

from transformers import TrainingArguments

from autoprec.integrations.transformers import PrecisionTrainer
from autoprec.probe.workload import Workload, workload_from
""",
    Mode.INFER: """from pathlib import Path

import torch

import autoprec
from autoprec.probe.workload import Workload, workload_from
""",
}


def script_name(plan: Plan) -> str:
    """Return the script's file name: one that is hardly anyone's own, as files of the folder are replaced."""
    return "autoprec_train.py" if plan.mode is Mode.TRAIN else "autoprec_run.py"


def script_text(plan: Plan, method: TrainMethod, *, batch_size: int, seq_len: int) -> str:
    """Return a program that runs as it is for models of text; one of images asks for batches of its own."""
    adapted = method is not TrainMethod.FULL and plan.mode is Mode.TRAIN and not is_own(plan)
    top = _TOP.format(
        verb="Train" if plan.mode is Mode.TRAIN else "Run",
        name=script_name(plan),
        model=" ".join(plan.model.id.replace('"', "'").split()),
        quoted=json.dumps(plan.model.id),
        imports=_adapted_imports(plan, method) if adapted else _IMPORTS[plan.mode],
        seq_len=seq_len,
    )
    if plan.mode is Mode.INFER:
        return top + _READ.format(mode=plan.mode, device=plan.device.kind) + _RUN.format(batch_size=batch_size)
    call = 'read_batches(options.data, settings["per_device_train_batch_size"], options.steps * passes)'
    if adapted:
        return (
            top
            + _adapted(plan, method)
            + _TRAIN.format(arguments=ARGUMENTS_FILE, unpacked="model, batches", call=call, plan=_PLAN_REFIT)
        )
    lines = f"{call}\n    model, batches = work.model, work.batches"
    read = _READ.format(mode=plan.mode, device="cpu")  # the Trainer moves it
    return top + read + _TRAIN.format(arguments=ARGUMENTS_FILE, unpacked="work", call=lines, plan=_PLAN)


def _adapted(plan: Plan, method: TrainMethod) -> str:
    ending = next((task for end, task in _TASKS.items() if end in plan.model.class_name), "ENCODER")
    name = "folder()" if plan.model.id == "demo" else "MODEL"
    loading = loading_lines(plan, method).replace(json.dumps(plan.model.id), "MODEL").replace("\n", "\n    ")
    return _READ_ADAPTED.format(loading=loading, name=name, task=ending, adapters=ADAPTERS)


def _adapted_imports(plan: Plan, method: TrainMethod) -> str:
    classes = ["AutoTokenizer", plan.model.class_name, "TrainingArguments"]
    if method is TrainMethod.QLORA:
        classes.append("BitsAndBytesConfig")
    demo = "from autoprec.demo import folder\n" if plan.model.id == "demo" else ""
    torch = "import torch\n" if method is TrainMethod.QLORA else ""
    return f"""import json
from pathlib import Path
from typing import Any

{torch}from peft import LoraConfig, get_peft_model
from transformers import {", ".join(sorted(classes))}

import autoprec
{demo}from autoprec.integrations.transformers import PrecisionTrainer
from autoprec.probe.loading import LoadedModel
from autoprec.probe.prepare import BatchWish, prepare_batches
from autoprec.probe.text import read_examples
from autoprec.records import Task
"""
