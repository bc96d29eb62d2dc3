"""Target `transformer-engine`: the recipe for `te.autocast`, and the file of its debug feature that excludes layers.

Transformer Engine has one recipe for a region, and its debug feature `DisableQuantizationLayer` takes layers out of
it by name, from a file that NVIDIA's DL Framework Inspect (`nvdlfw-inspect`) reads. What is taken out runs in the
ambient autocast. `Float8CurrentScaling` is what a plan's `tensorwise` FP8 is: a scale from each tensor as it comes,
E4M3 forward, E5M2 for gradients.

Checked, not run: the file is read by nvdlfw-inspect 0.2.2, the recipe built with Transformer Engine 2.20.2's class.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import literal, opening
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
    excluded = literal(_exclusions(plan)).replace("\\n", '\\n"\n    "')
    text = opening(plan, "Train", _NOTES, _IMPORTS, None) + f"\nEXCLUDED = (\n    {excluded}\n)\n"
    text = text.replace('    ""\n)', ")")
    return text + _PREPARE.format(autocast=autocast, fp8=Format.FP8 in plan.formats)


def _exclusions(plan: Plan) -> str:
    """Return the YAML that takes every layer out of FP8 that the plan does not have in it.

    A name is listed with a dot before it as well: that is how nvdlfw-inspect names modules below a root without one.
    """
    names = [m for u in plan.units if u.format is not Format.FP8 and u.role is not Role.EMBEDDING for m in u.modules]
    if not names:
        return "{}\n"
    listed = "".join(f"      - {_quoted(form)}\n" for name in names for form in (name, f".{name}"))
    return (
        "autoprec_not_fp8:\n"
        "  enabled: True\n"
        "  layers:\n"
        "    exact_layer_names:\n"
        f"{listed}"
        "  transformer_engine:\n"
        "    DisableQuantizationLayer:\n"
        "      enabled: True\n"
    )


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
