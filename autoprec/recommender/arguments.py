"""The `transformers.TrainingArguments` that go with a plan, in the words of the installed version."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = ["accepted_arguments", "training_arguments"]


def training_arguments(
    plan: Plan, *, batch_size: int, checkpointing: bool = False, accumulation: int = 1
) -> dict[str, Any]:
    """Return keyword arguments for `TrainingArguments`, only such as the installed transformers takes.

    Empty for inference. Without transformers installed nothing is left out.
    """
    if plan.mode is not Mode.TRAIN:
        return {}
    wanted: dict[str, Any] = dict(plan.training_arguments)
    wanted["per_device_train_batch_size"] = batch_size
    if accumulation > 1:
        wanted["gradient_accumulation_steps"] = accumulation
    if Format.FP8 in plan.formats:
        wanted["torch_compile"] = True  # casts that are not fused cost more than FP8 saves (nanochat: 0.23x)
    accepted = accepted_arguments()
    if checkpointing:
        # the old name is deprecated where the new one exists (transformers 5)
        new = accepted is None or "activation_checkpointing" in accepted
        wanted["activation_checkpointing" if new else "gradient_checkpointing"] = True
    return {name: value for name, value in wanted.items() if accepted is None or name in accepted}


@cache
def accepted_arguments() -> frozenset[str] | None:
    """Return the names that the installed `TrainingArguments` takes; None where transformers is not installed.

    Importing `TrainingArguments` takes seconds, so unless that has been done its fields are read from the source.
    """
    loaded = sys.modules.get("transformers.training_args")
    if loaded is not None:
        return frozenset(inspect.signature(loaded.TrainingArguments).parameters)
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return _by_import()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments" and not node.bases:
            fields = (s.target for s in node.body if isinstance(s, ast.AnnAssign))
            return frozenset(f.id for f in fields if isinstance(f, ast.Name))
    return _by_import()


def _by_import() -> frozenset[str]:
    from transformers import TrainingArguments

    return frozenset(inspect.signature(TrainingArguments).parameters)
