"""Target `jax`: a plan as JSON, a dtype for each layer by its path.

Flax, Equinox and Haiku take `dtype` (what a layer computes in) and `param_dtype` (what it is stored in) when a layer
is built; read this file there. Checked, not run: `examples/jax_dtypes.py` builds a Flax module from it.
"""

from __future__ import annotations

import json

from autoprec.exporters.limits import Limits
from autoprec.exporters.mapping import paths
from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["LIMITS", "jax_dtypes"]

LIMITS = Limits(formats={Format.FP8: "a dtype alone has no scale, and FP8 without one overflows"})

_NAMES = {Format.FP32: "float32", Format.BF16: "bfloat16", Format.FP16: "float16"}


def jax_dtypes(plan: Plan, plan_path: str) -> str:
    """Return the JSON text: `dtypes` by path, `default` for layers that it does not name, `param_dtype`, loss scale."""
    scaler = plan.grad_scaler
    data = {
        "schema": "autoprec/jax@1",
        "model": plan.model.id,
        "plan": plan_path,
        "param_dtype": _NAMES[plan.stream],
        "stream": _NAMES[plan.stream],
        "default": _NAMES[plan.stream],
        "dtypes": {path: _NAMES[choice] for path, choice in paths(plan).items()},
        "loss_scale": None
        if scaler is None
        else {
            "initial": scaler.init_scale,
            "factor": scaler.growth_factor,
            "backoff": scaler.backoff_factor,
            "period": scaler.growth_interval,
        },
    }
    return json.dumps(data, indent=1) + "\n"
