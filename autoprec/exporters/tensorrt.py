"""Target `tensorrt`: the exported program with the plan's casts, and the call that compiles it with torch-tensorrt.

TensorRT's networks are strongly typed: each operation runs in the types of its operands, so the casts of the program
are the plan, with as many formats as it has. torch-tensorrt's own `enable_autocast` knows two formats and excludes
layers by name; it stays off. Settings are passed where the installed version knows them: older ones need
`use_explicit_typing`, newer ones build nothing else. Never passed: `enabled_precisions`, which would lift the types,
and `use_fp32_acc`, which puts casts of its own around products.

Checked, not run: up to the compile call. An engine needs an NVIDIA GPU and TensorRT.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import opening
from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["LIMITS", "tensorrt_source"]

LIMITS = Limits(
    formats={Format.FP8: "TensorRT takes FP8 from calibrated quantize operations, not from casts"},
    stream="the plan's casts are put in the graph around FP32 weights",
)

_NOTES = """
engine = compile_model(model, input_ids=ids). trace() alone needs no TensorRT: it gives the program with the plan's
casts, after every product of the graph was found in its format. Checked up to the compile call, not run.
"""

_IMPORTS = """
import inspect
from typing import Any

import torch
"""

_COMPILE = '''

def trace(model: torch.nn.Module, *args: Any, **inputs: Any) -> torch.export.ExportedProgram:
    """Return the program of `model`, which has FP32 weights and keeps no cache, with the plan as casts in its graph."""
    return traced(model, autoprec.Plan.load(PLAN), args, inputs)


def settings(known: Any) -> dict[str, Any]:
    """Return the settings that keep the program's types, of those that torch_tensorrt's compile knows."""
    wanted = {{
        "use_explicit_typing": True,  # the types of the program decide; gone where nothing else is possible
        "enable_autocast": False,  # the plan is in the program already
        "disable_tf32": {disable_tf32!r},
        "truncate_double": True,
    }}
    return {{name: value for name, value in wanted.items() if name in known}}


def compile_model(model: torch.nn.Module, *args: Any, **inputs: Any) -> Any:
    """Return `model` compiled by TensorRT for inputs of this shape; needs an NVIDIA GPU."""
    import torch_tensorrt

    program = trace(model, *args, **inputs)
    known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    return torch_tensorrt.dynamo.compile(program, arg_inputs=args, kwarg_inputs=inputs, **settings(known))
'''


def tensorrt_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `trace`, `settings` and `compile_model`."""
    text = opening(plan, "Compile with TensorRT:", _NOTES, _IMPORTS, plan_path)
    text = text.replace("import autoprec\n", "import autoprec\nfrom autoprec.exporters.program import traced\n")
    return text + _COMPILE.format(disable_tf32=not plan.tf32)
