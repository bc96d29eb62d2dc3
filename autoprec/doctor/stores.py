"""What the calls of a script store weights in, and what they run autocast in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autoprec.doctor.scripts import Call
from autoprec.formats import Format

__all__ = ["Placed", "autocast_formats", "cast_of", "format_of", "is_quantised", "load_of", "untyped_load"]

_DTYPES = {
    "float32": Format.FP32, "float": Format.FP32, "fp32": Format.FP32, "bfloat16": Format.BF16, "bf16": Format.BF16,
    "float16": Format.FP16, "half": Format.FP16, "fp16": Format.FP16,
}  # fmt: skip
_TORCH = {Format.FP32: "torch.float32", Format.BF16: "torch.bfloat16", Format.FP16: "torch.float16"}
#: what `.to(dtype)`, `.half()` is called on, where it is a model and not a tensor
_MODULE = re.compile(
    r"(?:model|net|module|encoder|decoder|unet|vae|transformer|lm|llm|backbone|network|gpt|bert)\w*(?:\(.*\))?$",
    re.IGNORECASE,
)
#: what is loaded beside a model
_BESIDE = re.compile(r"[Tt]okenizer|[Pp]rocessor|[Ff]eatureExtractor|(?<!from_)[Cc]onfig\b")
_MODEL_CLASS = re.compile(r"(?:Model|For[A-Z]\w+|LMHeadModel)\w*$")
_ON_TOP = re.compile(r"Peft|Adapter|ValueHead")


@dataclass(frozen=True, slots=True)
class Placed:
    """A value that was found, where, and how it is written there."""

    value: Any
    place: str
    text: str


def format_of(value: Any) -> Format | None:
    """Return the format a dtype's name means: 'torch.bfloat16', 'bf16', 'half'; None for anything else."""
    return _DTYPES.get(str(value).lower().removeprefix("torch.").removeprefix("jnp.").strip())


def load_of(call: Call, place: str) -> tuple[Format, Placed] | None:
    """Return what a `from_pretrained` or the like stores the model in, if it says so."""
    if _BESIDE.search(call.receiver) or is_quantised(call):
        return None
    value = call.keywords.get("dtype", call.keywords.get("torch_dtype"))
    choice = format_of(value)
    return (choice, Placed(value, place, f"{call.last}(…, dtype={value})")) if choice else None


def untyped_load(call: Call, place: str) -> Placed | None:
    """Return a load of a model without a dtype, which takes the checkpoint's."""
    if call.last.endswith("Trainer"):  # TRL's trainers load a model that is given by name
        name = call.keywords.get("model")
        known = isinstance(name, str) and "." not in name.rpartition("/")[0] and "/" in name
        return Placed(name, place, f"{call.last}(model={name!r})") if known else None
    if {"dtype", "torch_dtype"} & set(call.keywords) or is_quantised(call):
        return None
    if not _MODEL_CLASS.search(call.receiver) or _ON_TOP.search(call.receiver):
        return None
    name = call.args[0] if call.args and isinstance(call.args[0], str) else ""
    return Placed(name, place, f"{call.receiver}.from_pretrained({name!r})" if name else f"{call.name}()")


def is_quantised(call: Call) -> bool:
    """Say whether a load holds the weights in 4 or 8 bits, which are never trained themselves."""
    return any(call.keywords.get(k) for k in ("load_in_4bit", "load_in_8bit")) or "quantization_config" in call.keywords


def cast_of(call: Call, place: str) -> Placed | None:
    """Return what a `.half()`, `.bfloat16()`, `.to(dtype)` of a model or `set_default_dtype` stores weights in."""
    if call.last == "set_default_dtype":
        known = format_of(call.args[0]) if call.args else None
        return Placed(known, place, f"torch.set_default_dtype({call.args[0]})") if known else None
    if call.last == "to":
        given = [v for v in (call.keywords.get("dtype"), *call.args) if str(v).startswith("torch.")]
        known = next((f for v in given if (f := format_of(v))), None)
    else:
        known = Format.FP16 if call.last == "half" else Format.BF16
    if known is None or not _is_module(call):
        return None
    return Placed(known, place, f"{call.receiver[:60]}.{call.last}({_TORCH[known] if call.last == 'to' else ''})")


def _is_module(call: Call) -> bool:
    """Tell a model from a tensor by its names: what it is called on, or the name it is given."""
    receiver = call.receiver
    tail = receiver if receiver.endswith(")") else receiver.rpartition(".")[2]
    built = re.match(r"(?:[a-z_]\w*\.)*[A-Z]\w+(?:\.from_\w+)?\(", receiver) and not receiver.startswith("torch.")
    named = _MODULE.search(tail) or _MODULE.search(call.target.rpartition(".")[2])
    return bool(built or named or "from_pretrained(" in receiver)


def autocast_formats(call: Call, place: str) -> Iterator[tuple[Placed, Format]]:
    """Yield the format of a torch autocast, its device's default where no dtype is given."""
    torchs = call.name.startswith(("torch.", "autocast", "amp."))
    if not torchs or call.keywords.get("enabled") is False:
        return
    given = call.keywords.get("dtype", call.args[1] if len(call.args) > 1 else None)
    device = str(call.keywords.get("device_type", call.args[0] if call.args else ""))
    known = format_of(given) if given is not None else None
    if known is None and "dtype" not in call.keywords and given is None:
        # torch's own defaults: float16 on cuda, bfloat16 on cpu
        known = Format.BF16 if device == "cpu" or "cpu" in call.name else Format.FP16
        if device and device not in ("cuda", "cpu", "mps", "xpu") and "cuda" not in call.name:
            known = None
    if known is not None and known is not Format.FP32:
        yield Placed(known, place, f"{call.name}(dtype={given or 'left out: ' + known})"), known
