"""Target `keras`: a plan as a `DTypePolicyMap`, a dtype policy for each layer by its path.

`mixed_bfloat16` is what a BF16 unit is: FP32 variables, computing in BF16. Layers that the map does not name (norms,
dropout, sums) keep FP32, as autocast leaves the residual stream on a GPU. A path is matched as a whole; a key is
also a pattern in Keras, so names with regular expressions in them are escaped.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.mapping import paths
from autoprec.exporters.summary import literal, opening
from autoprec.formats import Format
from autoprec.plan import GradScalerSettings, Plan

__all__ = ["LIMITS", "keras_source"]

LIMITS = Limits(
    formats={Format.FP8: "Keras scales FP8 by the history of each tensor, the plan by the tensor as it comes"},
    stream="a policy of a layer says nothing of the stream between layers",
)

_POLICIES = {Format.FP32: "float32", Format.BF16: "mixed_bfloat16", Format.FP16: "mixed_float16"}

_NOTES = """
Give policy_map() as dtype= to your model and let it hand its own dtype on to its layers. Paths are those of the
PyTorch model with "/" for "."; policy_map(rename) takes a function from these to the paths of your layers.
check(model) names the entries that no layer has.
"""

_IMPORTS = """
from collections.abc import Callable
from typing import Any

import keras
"""

_MAP = '''

def policy_map(rename: Callable[[str], str] = str) -> keras.dtype_policies.DTypePolicyMap:
    """Return the plan as a policy for each layer by its path; layers that it does not name keep FP32."""
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    for path, policy in POLICIES.items():
        policies[rename(path)] = keras.dtype_policies.DTypePolicy(policy)
    return policies


def check(model: keras.Model, rename: Callable[[str], str] = str) -> None:
    """Raise ValueError if the plan names a layer that the built model lacks, or one that computes otherwise."""
    layers = {layer.path: layer for layer in model._flatten_layers() if layer.path}
    for path, policy in POLICIES.items():
        wanted = keras.dtype_policies.DTypePolicy(policy).compute_dtype
        layer = layers.get(rename(path))
        if layer is None:
            raise ValueError(f"the model has no layer {rename(path)!r}, which the plan computes in {wanted}")
        if layer.compute_dtype != wanted:
            raise ValueError(f"{layer.path} computes in {layer.compute_dtype}, and the plan says {wanted}")
'''

_SCALED = '''

def scaled(optimizer: Any) -> keras.optimizers.LossScaleOptimizer:
    """Return the optimizer with the loss scale that FP16 layers need; Keras doubles and halves it."""
    return keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale={init_scale!r}, dynamic_growth_steps={growth_interval!r}
    )
'''


def keras_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `policy_map`, `check`, and `scaled` where the plan has FP16 in it."""
    entries = "".join(f"    {literal(path)}: {literal(_POLICIES[f])},\n" for path, f in paths(plan).items())
    text = opening(plan, "Build in Keras:", _NOTES, _IMPORTS, None) + f"\nPOLICIES = {{\n{entries}}}\n" + _MAP
    if plan.grad_scaler is None:
        return text.replace("from typing import Any\n", "")
    return text + _scaled(plan.grad_scaler)


def _scaled(settings: GradScalerSettings) -> str:
    text = _SCALED.format(init_scale=settings.init_scale, growth_interval=settings.growth_interval)
    if (settings.growth_factor, settings.backoff_factor) == (2.0, 0.5):
        return text
    asked = f"The plan asks for factors of {settings.growth_factor!r} and {settings.backoff_factor!r}."
    return text.replace("Keras doubles and halves it.", f"Keras doubles and halves it.\n\n    {asked}\n    ")
