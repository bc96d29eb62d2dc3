"""Target `transformer-engine`: the recipe for `te.autocast`, and the file of its debug feature that excludes layers.

Transformer Engine has one recipe for a region, and its debug feature `DisableQuantizationLayer` takes layers out of
it by name, from a file that NVIDIA's DL Framework Inspect (`nvdlfw-inspect`) reads. What is taken out runs in the
ambient autocast. `Float8CurrentScaling` is what a plan's `tensorwise` FP8 is: a scale from each tensor as it comes,
E4M3 forward, E5M2 for gradients.

Checked, not run: the file is read by nvdlfw-inspect 0.2.2, the recipe built with Transformer Engine 2.20.2's class.
"""

from __future__ import annotations

import json
import re

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import opening
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.records import Role

__all__ = ["LIMITS", "transformer_engine_source"]

LIMITS = Limits(
    mixed="what Transformer Engine does not compute in FP8 runs in one autocast",
    lookups="Transformer Engine has no embedding, and autocast leaves lookups in the format of their weight",
    stream="the plan's casts are autocast's, around FP32 weights",
    recipes={Fp8Recipe.ROWWISE: "Transformer Engine scales whole tensors or blocks, not rows"},
    inference="it is written as a training step; use 'torchao' or 'python'",
)

_NOTES = """
The model's linear layers must be Transformer Engine's own (te.Linear), under the names of the plan. model =
prepare(model) once on each process; with region(): loss = model(**batch).loss; after each optimizer step
debug_api.step(). Pad batches: rows in multiples of 8, features of 16. Checked against Transformer Engine 2.20.2 and
nvdlfw-inspect 0.2.2, not run.
"""

_IMPORTS = """
import contextlib
from pathlib import Path
from typing import Any

import torch
"""

_PREPARE = '''

def prepare(model: torch.nn.Module, folder: str = "te_debug") -> torch.nn.Module:
    """Write the exclusion file to `folder` and let Transformer Engine read it."""
    import nvdlfw_inspect.api as debug_api
    import transformer_engine

    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "autoprec.yaml"
    file.write_text(EXCLUDED)
    features = str(Path(transformer_engine.__file__).parent / "debug" / "features")
    debug_api.initialize(config_file=str(file), feature_dirs=[features], log_dir=folder)
    debug_api.infer_and_assign_layer_names(model)
    return model


def recipe() -> Any:
    """Return the plan's FP8: scales from each tensor as it comes, E4M3 forward, E5M2 for gradients."""
    from transformer_engine.common.recipe import Float8CurrentScaling, Format

    return Float8CurrentScaling(fp8_format=Format.HYBRID)


@contextlib.contextmanager
def region() -> Any:
    """Run the forward pass in FP8, but for what the file excludes, which runs in the ambient format."""
    import transformer_engine.pytorch as te

    with torch.autocast("cuda", {autocast}), te.autocast(enabled={fp8}, recipe=recipe()):
        yield
'''


def transformer_engine_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `EXCLUDED` (the file's text), `prepare`, `recipe` and `region`."""
    low = {Format.BF16: "torch.bfloat16", Format.FP16: "torch.float16"}.get(plan.ambient)
    autocast = f"dtype={low}, cache_enabled=False" if low else "enabled=False"
    text = opening(plan, "Train", _NOTES, _IMPORTS, None) + f"\nEXCLUDED = (\n{_wrapped(_exclusions(plan))})\n"
    return text + _PREPARE.format(autocast=autocast, fp8=Format.FP8 in plan.formats)


def _wrapped(text: str) -> str:
    """Return a text as string literals of at most 100 characters, one a line."""
    lines = (piece for line in text.splitlines(keepends=True) for piece in _pieces(line))
    return "".join(f"    {json.dumps(piece)}\n" for piece in lines)


def _pieces(line: str) -> list[str]:
    return [line[start : start + 90] for start in range(0, len(line), 90)]


def _exclusions(plan: Plan) -> str:
    """Return the YAML that takes every layer out of FP8 that the plan does not have in it.

    By one pattern for whole names: `exact_layer_names` raises for every layer that is not in the list. Names begin
    with `model.`, the root's, where `infer_and_assign_layer_names` gave them.
    """
    names = [m for u in plan.units if u.format is not Format.FP8 and u.role is not Role.EMBEDDING for m in u.modules]
    if not names:
        return "{}\n"
    pattern = "|".join(re.escape(name) for name in names).replace("'", "''")
    return (
        "autoprec_not_fp8:\n"
        "  enabled: True\n"
        "  layers:\n"
        f"    layer_name_regex_pattern: '^model\\.(?:{pattern})$'\n"
        "  transformer_engine:\n"
        "    DisableQuantizationLayer:\n"
        "      enabled: True\n"
    )
