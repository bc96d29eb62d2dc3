"""Target `onnx`: an ONNX file with the plan as casts in its graph.

The runtime sees typed tensors and explicit casts, and needs to know nothing of plans. What it does with them is its
own: onnxruntime's CPU provider has no BF16 product and refuses such a graph; FP16 products it computes in FP32 where
the CPU has no FP16, and rounds the results. FP8 has no place here: ONNX scales FP8 by constants that come from
calibration, and a plan's FP8 is scaled by each tensor as it comes.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import opening
from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["LIMITS", "onnx_source"]

LIMITS = Limits(
    formats={Format.FP8: "ONNX scales FP8 by calibrated constants, the plan by each tensor as it comes"},
    stream="the plan's casts are put in the graph around FP32 weights",
)

_NOTES = """
write(model, "model.onnx", input_ids=ids) writes the file, after every product of the graph was found in its format.
Needs onnx and onnxscript. Exports inference: dropout is off.
"""

_IMPORTS = """
from pathlib import Path
from typing import Any

import torch
"""

_OURS = """\
import autoprec
from autoprec.exporters.onnx_graph import check_graph
from autoprec.exporters.program import products, traced
"""

_WRITE = '''

def write(model: torch.nn.Module, path: str | Path, *args: Any, **inputs: Any) -> Any:
    """Write `model`, which has FP32 weights and keeps no cache, as an ONNX file with the plan in its graph.

    `args` and `inputs` are an example input. Returns torch's ONNXProgram.
    """
    plan = autoprec.Plan.load(PLAN)
    program = traced(model, plan, args, inputs)  # raises where a product is not in the plan's format
    exported = torch.onnx.export(program, dynamo=True, optimize=True)
    check_graph(exported.model_proto, products(program, plan, model), plan)  # and here once more, in the file's graph
    exported.save(str(path))
    return exported
'''


def onnx_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `write`."""
    text = opening(plan, "Write as ONNX:", _NOTES, _IMPORTS, plan_path)
    return text.replace("import autoprec\n", _OURS) + _WRITE
