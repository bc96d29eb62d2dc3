"""Target `torchao`: the filter and the recipe for `convert_to_float8_training`, without autoprec at run time.

torchao swaps the chosen `nn.Linear`s for `Float8Linear`; the rest runs in one autocast. So it expresses FP8 units in
an ambient of one format, and nothing else. The recipes are those that a plan's FP8 means.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.loops import PREDICT, training_loop
from autoprec.exporters.summary import opening, source_list
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = ["LIMITS", "torchao_source"]

LIMITS = Limits(
    mixed="what torchao does not convert to FP8 runs in one autocast",
    lookups="torchao converts nn.Linear only, and autocast leaves lookups in the format of their weight",
    stream="torchao keeps weights as they are stored; cast the model yourself, or use 'python'",
)

_NOTES = """
model = prepare(model), then {run}. FP8 needs compute capability 8.9 (or gfx942); emulate=True gives its numbers
elsewhere, not its speed. Compile the model for speed.
"""

_IMPORTS = """
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear
"""

_PREPARE = '''

def is_fp8(module: torch.nn.Module, name: str) -> bool:
    """Say whether the plan computes a layer in FP8; the filter of convert_to_float8_training."""
    return name in FP8_LAYERS


def prepare(model: torch.nn.Module, emulate: bool = False) -> torch.nn.Module:
    """Convert the plan's FP8 layers in place, and check that they, and no others, were converted."""
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("{recipe}"), emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=is_fp8, config=config)
    converted = {{name for name, module in model.named_modules() if isinstance(module, Float8Linear)}}
    if wrong := sorted(converted ^ FP8_LAYERS):
        raise ValueError(
            f"{{len(wrong)}} layers are not as the plan says, first {{wrong[0]}}: torchao converts nn.Linear only"
        )
    return model


def ambient(device: str) -> torch.autocast:
    """Return the autocast of everything that is not in FP8."""
    return torch.autocast(device, {autocast})
'''


def torchao_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `is_fp8`, `prepare`, `ambient` and `train` (or `predict`)."""
    training = plan.mode is Mode.TRAIN
    layers = [module for unit in plan.units if unit.format is Format.FP8 for module in unit.modules]
    low = {Format.BF16: "torch.bfloat16", Format.FP16: "torch.float16"}.get(plan.ambient)
    autocast = f"dtype={low}, cache_enabled=False" if low else "enabled=False"
    run = "train(model, batches, optimizer)" if training else "predict(model, batches)"
    imports = _IMPORTS if training else _IMPORTS.replace("Callable, ", "")
    text = opening(plan, "Train" if training else "Run", _NOTES.format(run=run), imports, None)
    text += "\n" + source_list("FP8_LAYERS", layers)
    text += _PREPARE.format(recipe=plan.fp8_recipe or "tensorwise", autocast=autocast)
    return text + _in_ambient(training_loop(plan) if training else PREDICT)


def _in_ambient(loop: str) -> str:
    """Return the loop with its forward pass in the ambient autocast."""
    device = "next(model.parameters()).device.type"
    loop = loop.replace(
        "    return model(**batch).loss.float()\n",
        f"    with ambient({device}):\n        return model(**batch).loss.float()\n",
    )
    return loop.replace(
        "    return [model(**batch) for batch in batches]\n",
        f"    with ambient({device}):\n        return [model(**batch) for batch in batches]\n",
    )
