"""Who a model is, whatever is wrapped around it: canonical names, original classes, fingerprint, digest of weights."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from autoprec.errors import ModelError

__all__ = [
    "base_class",
    "canonical",
    "canonical_modules",
    "canonical_parameters",
    "fingerprint",
    "tied_parameters",
    "weights_digest",
]

#: path parts that DDP, torch.compile and activation checkpointing put around a module
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """Return a fully qualified name without the path parts that wrappers add.

    Removed wherever they stand: `module`, `_orig_mod`, `_checkpoint_wrapped_module`, and PEFT's `base_model.model`.
    """
    parts: list[str] = []
    pieces = [p for p in name.split(".") if p not in _WRAPPERS] if name else []
    for piece in pieces:
        if piece == "model" and parts and parts[-1] == "base_model":
            parts.pop()
        else:
            parts.append(piece)
    return ".".join(parts)


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by canonical name, in registration order; '' is the model inside its wrappers.

    A module reached by several names is listed under its first. Wrappers themselves are left out.

    Raises:
        ModelError: two modules that own parameters come down to one name.
    """
    found: dict[str, nn.Module] = {}
    named = dict(model.named_modules())
    for name, module in named.items():
        if (name == "base_model" or name.endswith(".base_model")) and f"{name}.model" in named:
            continue
        short = canonical(name)
        outer = found.get(short)
        if outer is not None and any(True for _ in outer.parameters(recurse=False)):
            raise ModelError(
                f"two modules are both called '{short}' once wrapper names are removed: a {type(outer).__name__} with "
                f"parameters of its own and a {type(module).__name__} at '{name}'; rename the child called "
                f"'{name.rpartition('.')[2]}'"
            )
        found[short] = module  # a wrapper comes before what it wraps, so the innermost stays
    return found


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module had before autoprec, FSDP2 or torchao swapped it."""
    cls: type = type(module)
    while True:
        swapped_from = getattr(cls, "_autoprec_base", None)
        if swapped_from is not None:
            cls = swapped_from
        elif cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule" and len(cls.__bases__) > 1:
            cls = cls.__bases__[1]  # fully_shard makes type("FSDPX", (FSDPModule, X), {})
        elif cls.__module__.startswith("torchao.float8") and issubclass(cls, nn.Linear):
            cls = nn.Linear
        else:
            return cast("type[nn.Module]", cls)


def canonical_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter by canonical name; a shared parameter comes once for each module that owns it."""
    for name, module in canonical_modules(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{name}.{key}" if name else key), parameter


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return groups of parameter names that share one Parameter object (this holds on the meta device too)."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in canonical_parameters(model):
        owners[id(parameter)].append(name)
    return tuple(tuple(names) for names in owners.values() if len(names) > 1)


def fingerprint(model: nn.Module) -> str:
    """Return the sha256 of a model's structure: sorted names, classes, parameter shapes and ties.

    Equal before and after `autoprec.apply`, deepcopy, DDP, torch.compile and on the meta device. Weights and
    configuration values that leave no trace in shapes (such as dropout) are not in it.
    """
    rows: list[object] = []
    for name, module in canonical_modules(model).items():
        shapes = {k: list(p.shape) for k, p in module._parameters.items() if p is not None}
        rows.append([name, base_class(module).__name__, sorted(shapes.items())])
    ties = sorted(sorted(group) for group in tied_parameters(model))
    text = json.dumps([sorted(rows, key=str), ties], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of all parameters (name, dtype, shape, bytes) in the order of their canonical names.

    About a second for half a gigabyte. A shared parameter counts under each of its names, its bytes once.

    Raises:
        ModelError: a parameter without values (meta device).
    """
    digest = hashlib.sha256()
    hashed: dict[int, str] = {}
    for name, parameter in sorted(canonical_parameters(model), key=lambda item: item[0]):
        if parameter.is_meta:
            raise ModelError(f"parameter '{name}' is on the meta device and has no values; load the weights first")
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {hashed.get(id(parameter), '')}\n".encode())
        if id(parameter) not in hashed:
            hashed[id(parameter)] = name
            flat = parameter.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
