"""Target `deepspeed`: a configuration that keeps parameters in FP32, and the call that goes with it.

The sections `bf16` and `fp16` cast all parameters, which no plan could undo, and switch autocast off inside; they are
never enabled. `torch_autocast` keeps FP32 parameters and puts autocast around the forward, inside which the plan's
scopes decide. It is needed for FP16 only, where it makes the gradient scaler.

Checked, not run: the configuration is read by DeepSpeed's own parser, the call against its signature.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import literal, opening
from autoprec.formats import Format
from autoprec.plan import GradScalerSettings, Plan

__all__ = ["LIMITS", "deepspeed_source"]

LIMITS = Limits(
    inference="it is written as a training program; use 'python' or 'transformers'",
    stream="its only settings for low weights cast all of them, and hold FP32 copies outside the plan",
)

_NOTES = """
deepspeed your_script.py, which calls initialize(model, train_micro_batch_size_per_gpu=8). As a file, for
TrainingArguments(deepspeed=...) with bf16=False and fp16=False: python THIS_FILE > ds_config.json. Checked against
DeepSpeed 0.19.8, not run.{notes}
"""

_IMPORTS = """
import json
from typing import Any

import torch
"""

_CALL = '''
#: never enable "bf16" or "fp16" here: they cast every parameter
CONFIG: dict[str, Any] = {{
    "bf16": {{"enabled": False}},
    "fp16": {{"enabled": False}},
    "torch_autocast": {{
        "enabled": {enabled},
        "dtype": {dtype},
        # what is listed here is sent in that dtype: nothing, since a plan keeps FP32 weights and gradients
        "lower_precision_safe_modules": [],
    }},
    "communication_data_type": "fp32",
    "data_types": {{"grad_accum_dtype": "fp32"}},
    "zero_optimization": {{"stage": 2}},
    "gradient_clipping": 1.0,
}}


def initialize(model: torch.nn.Module, **settings: Any) -> Any:
    """Put the plan in force on a model with FP32 weights, then hand it to DeepSpeed; returns what that returns.

    `settings` are further entries of the configuration, such as train_micro_batch_size_per_gpu and optimizer.
    """
    import deepspeed

    autoprec.apply(model, autoprec.Plan.load(PLAN))
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG | settings)


if __name__ == "__main__":
    print(json.dumps(CONFIG, indent=1))
'''


def deepspeed_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `CONFIG` and `initialize`."""
    notes = _NOTES.format(notes=_scale_note(plan.grad_scaler))
    dtype = "float16" if plan.grad_scaler is not None else "bfloat16"
    enabled = plan.grad_scaler is not None or plan.ambient is not Format.FP32
    text = opening(plan, "Train", notes, _IMPORTS, plan_path)
    return text + _CALL.format(enabled=enabled, dtype=literal(dtype))


def _scale_note(settings: GradScalerSettings | None) -> str:
    if settings is None or settings == GradScalerSettings():
        return ""
    return f"\n\nThe plan asks for {settings}; DeepSpeed makes its scaler with the defaults."
