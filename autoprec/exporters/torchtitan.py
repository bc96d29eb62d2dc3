"""Target `torchtitan`: the float8 converter with its list of layers to leave alone, and the training dtypes.

torchtitan converts every linear layer whose name holds no entry of `filter_fqns`. Entries are substrings, so each is
checked here to hit no layer that is to be converted. Names are those of torchtitan's own models: for Llama they are
translated as its `Llama3StateDictAdapter` does.

What torchtitan makes of the rest: on one device and under DDP it runs in `torch.autocast`, as the plan says; under
FSDP `mixed_precision_param` casts all parameters, so that the residual stream is BF16 too. That is said in the file.

Checked, not run: the file is read against torchtitan 0.3.0; the converter needs a GPU.
"""

from __future__ import annotations

import re

from autoprec.errors import ExportError
from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import opening, source_list
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.records import Role

__all__ = ["LIMITS", "titan_name", "torchtitan_source"]

LIMITS = Limits(
    formats={Format.FP16: "torchtitan trains in BF16 or FP32 only"},
    mixed="torchtitan has one format for every layer that is not in FP8",
    lookups="torchtitan has no format for one embedding",
    stream="torchtitan keeps master weights, which is training.dtype = float32",
    recipes={Fp8Recipe.TENSORWISE: "torchtitan's converter has row-wise scales only"},
    inference="it is a training framework",
)

#: torchtitan's names of Llama's parts, from the map of its Llama3StateDictAdapter
_LLAMA = (
    (r"model\.embed_tokens", "tok_embeddings"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"layers.\1.attention.qkv_linear.w\2"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"layers.\1.attention.wo"),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj", r"layers.\1.feed_forward.w1"),
    (r"model\.layers\.(\d+)\.mlp\.up_proj", r"layers.\1.feed_forward.w3"),
    (r"model\.layers\.(\d+)\.mlp\.down_proj", r"layers.\1.feed_forward.w2"),
)

_NOTES = """
In a config function of yours: config.training.dtype = "float32", config.training.mixed_precision_param =
MIXED_PRECISION_PARAM, and converters=converters() in model_registry(...). Under FSDP torchtitan casts all parameters
to that format, so the residual stream, which the plan keeps in FP32, is in it too; on one device and under DDP it
uses torch.autocast, which leaves the stream as the plan has it. Checked against torchtitan 0.3.0, not run.
"""

_IMPORTS = """
from typing import Any
"""

_CONVERTERS = '''
#: what computes in neither FP8 nor FP32; master weights stay in FP32
MIXED_PRECISION_PARAM = "{ambient}"


def converters(model_compile_enabled: bool = True) -> list[Any]:
    """Return the converter of the plan's FP8 layers."""
    from torchtitan.components.quantization import Float8LinearConverter

    return [
        Float8LinearConverter.Config(
            recipe_name="rowwise", filter_fqns=FILTER_FQNS, model_compile_enabled=model_compile_enabled
        )
    ]
'''

_NONE = '''
#: what computes not in FP32; master weights stay in FP32
MIXED_PRECISION_PARAM = "{ambient}"


def converters(model_compile_enabled: bool = True) -> list[Any]:
    """Return no converter, as the plan has no FP8."""
    return []
'''


def torchtitan_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `FILTER_FQNS`, `MIXED_PRECISION_PARAM` and `converters`.

    Raises:
        ExportError: a layer that is to stay as it is has a name that is part of one that is to be converted.
    """
    kept = [titan_name(m) for u in plan.units if u.format is not Format.FP8 and _linear(u.role) for m in u.modules]
    converted = [titan_name(m) for u in plan.units if u.format is Format.FP8 for m in u.modules]
    for name in kept:
        if hit := next((other for other in converted if name in other), None):
            raise ExportError(
                f"'torchtitan' leaves out layers by parts of names: '{name}', which is not to be in fp8, is part of "
                f"'{hit}', which is. Give both one format."
            )
    ambient = {Format.FP32: "float32", Format.BF16: "bfloat16"}[plan.ambient]
    text = opening(plan, "Train with torchtitan:", _NOTES, _IMPORTS, None)
    if not converted:
        return text + _NONE.format(ambient=ambient)
    text += "\n#: parts of names of the layers that stay out of FP8\n" + source_list("FILTER_FQNS", kept, "list")
    return text + _CONVERTERS.format(ambient=ambient)


def titan_name(module: str) -> str:
    """Return torchtitan's name of a Hugging Face Llama's layer; other names stay."""
    for pattern, name in _LLAMA:
        if match := re.fullmatch(pattern, module):
            return match.expand(name)
    return module


def _linear(role: Role) -> bool:
    return role is not Role.EMBEDDING
