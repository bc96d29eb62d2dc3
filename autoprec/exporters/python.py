"""Target `python`: a training loop, or an inference function, without any framework around it."""

from __future__ import annotations

from autoprec.exporters.loops import PREDICT, training_loop
from autoprec.exporters.summary import literal, one_line, summary
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = ["python_source"]

_HEAD = '''"""{title}

{summary}

{use}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import autoprec

PLAN = {plan_path}


def prepare(model: torch.nn.Module, plan: str = PLAN) -> torch.nn.Module:
    """Put the plan in force on a model with FP32 weights, in place{before}.

    No torch.autocast is needed around it: each unit computes in its own format.{fp8}
    """
    autoprec.apply(model, autoprec.Plan.load(plan))
    return model
'''

_FP8 = """
    It raises where the device has no FP8; autoprec.apply(..., emulate=True) gives its numbers there, not its speed."""


def python_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `prepare` and `train` (or `predict` for a plan made for inference)."""
    training = plan.mode is Mode.TRAIN
    head = _HEAD.format(
        title=f"{'Train' if training else 'Run'} {one_line(plan.model.id)} with its autoprec plan.",
        summary=summary(plan),
        plan_path=literal(plan_path),
        use="model = prepare(model), then "
        + ("train(model, batches, optimizer)." if training else "predict(model, batches)."),
        before="; before or after the optimizer is made" if training else "",
        fp8=_FP8 if Format.FP8 in plan.formats else "",
    )
    if not training:
        return head.replace("Callable, Iterable", "Iterable") + PREDICT
    return head + training_loop(plan)
