"""Target `swift`: an external plugin for ms-swift, and the arguments that go with it.

ms-swift has no precision flag for a layer. The plugin puts the plan in force where `SftArguments` has loaded the
model, before adapters and the Trainer are put around it. `--torch_dtype float32` keeps master weights; beside it
`--bf16` must be said, because ms-swift would choose FP16 for FP32 weights by itself.

Checked, not run: the names and signatures are those of ms-swift 4.6.0, read in an environment of its own.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import one_line, opening
from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["LIMITS", "swift_source"]

LIMITS = Limits(
    formats={
        Format.FP8: "ms-swift has no FP8 training for a layer (its fp8 packs weights, Megatron's is for all layers)"
    },
    inference="it is written as a plugin of swift sft; use 'python' or 'transformers'",
    stream="ms-swift casts the whole model itself: --torch_dtype is all that such a plan needs",
)

_NOTES = """
swift sft --external_plugins THIS_FILE --torch_dtype float32 {flags} --model {model} --dataset ...

The flags say what is global; the plugin puts the plan in force unit by unit. Leave --quant_method unset. Checked
against ms-swift 4.6.0, not run.
"""

_IMPORTS = """
from functools import wraps
from typing import Any

from swift.arguments import SftArguments
"""

_PLUGIN = """
_load = SftArguments.get_model_processor


@wraps(_load)
def _load_with_plan(self: SftArguments, *args: Any, **kwargs: Any) -> Any:
    model, processor = _load(self, *args, **kwargs)
    if model is not None:
        autoprec.apply(model, autoprec.Plan.load(PLAN))
    return model, processor


SftArguments.get_model_processor = _load_with_plan
"""


def swift_source(plan: Plan, plan_path: str) -> str:
    """Return the plugin; its docstring holds the command."""
    if plan.grad_scaler is not None:
        flags = "--fp16 true --bf16 false"
    else:
        low = plan.ambient is Format.BF16 or Format.BF16 in plan.formats
        flags = f"--bf16 {'true' if low else 'false'} --fp16 false"
    notes = _NOTES.format(flags=flags, model=one_line(plan.model.id))
    return opening(plan, "Train with ms-swift:", notes, _IMPORTS, plan_path) + _PLUGIN
