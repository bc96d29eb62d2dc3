"""Target `torch-compile`: a plan in blocks that are compiled one by one, so that equal blocks share their code.

Compiling the whole model unrolls its blocks; regional compilation compiles one for each distinct set of formats.
Within a compiled region the compiler may keep a 16-bit value in FP32 registers between two elementwise operations,
where eager code rounds it: `exact` switches that off, at some speed.
"""

from __future__ import annotations

from autoprec.exporters.loops import PREDICT, training_loop
from autoprec.exporters.summary import opening
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = ["compiled_source"]

_NOTES = "model = prepare(model), then {run}."

_IMPORTS = """
from collections.abc import Callable, Iterable
from typing import Any

import torch
"""

_PREPARE = '''

def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the entries of the outermost module lists: the repeated blocks."""
    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            found += list(module)
            inside |= {id(inner) for inner in module.modules()}
    return list(dict.fromkeys(found))


def prepare(model: torch.nn.Module, exact: bool = False, **options: Any) -> torch.nn.Module:
    """Put the plan in force on a model with FP32 weights, then compile its blocks, in place.

    Equal blocks of equal formats share one compiled graph; `options` are those of torch.compile. `exact` makes the
    compiler round every 16-bit intermediate as eager code does.
    """
    autoprec.apply(model, autoprec.Plan.load(PLAN))
    if exact:
        torch._inductor.config.emulate_precision_casts = True
    for block in blocks(model):
        block.compile(**options)
    return model
'''


def compiled_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `prepare` and `train` (or `predict` for a plan made for inference)."""
    training = plan.mode is Mode.TRAIN
    notes = _NOTES.format(run="train(model, batches, optimizer)" if training else "predict(model, batches)")
    imports = _IMPORTS if training else _IMPORTS.replace("Callable, ", "")
    text = opening(plan, "Train" if training else "Run", notes, imports, plan_path) + _PREPARE
    return text + (training_loop(plan) if training else PREDICT)
