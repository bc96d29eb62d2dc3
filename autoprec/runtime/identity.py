"""Who a model is, whatever is wrapped around it: canonical names, original classes, fingerprint, digest of weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import nn

from autoprec.errors import ModelError
from autoprec.records import structure_fingerprint

__all__ = [
    "aliases",
    "base_class",
    "canonical_modules",
    "canonical_parameters",
    "fingerprint",
    "let_go",
    "tied_parameters",
    "weights_digest",
]

#: what DDP, torch.compile, activation checkpointing and FSDP1 call the module they stand around
_WRAPPED = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: what PEFT calls it; a model's own module may well be called so, hence only on PEFT's classes
_PEFT_WRAPPED = frozenset({"base_model", "model"})
#: their children are called what the user likes
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by canonical name, in registration order; '' is the model inside its wrappers.

    A wrapper is a module that owns no parameters and only stands around one other: it is left out, and its part of
    the path with it. A module of the user's that is called `module` or `base_model` keeps its name where it has
    siblings or its owner has parameters. A module reached by several names is listed under its first (`aliases`).

    Raises:
        ModelError: two modules come down to one name.
    """
    return _walk(model)[0]


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the further names of modules reached by several, each with the name they are listed under.

    What stands below such a module is in it too: with `again` for `h.0` there is `again.attn` for `h.0.attn`.
    """
    modules, further = _walk(model)
    names: dict[str, str] = {}
    for second, first in further.items():
        for name in modules:
            if name == first or name.startswith(_join(first, "")):
                names.setdefault(_join(second, name.removeprefix(first).lstrip(".")).rstrip("."), name)
    return {second: first for second, first in names.items() if second not in modules}


def _join(path: str, rest: str) -> str:
    return f"{path}.{rest}" if path else rest


def _walk(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return modules by canonical name, and for each further way to one of them: its name there and its first."""
    found: dict[str, nn.Module] = {}
    paths: dict[str, str] = {}
    first: dict[int, str] = {}
    further: dict[str, str] = {}
    waiting: list[tuple[str, str, nn.Module]] = [("", "", model)]
    while waiting:
        name, path, module = waiting.pop()
        if id(module) in first:
            further.setdefault(name, first[id(module)])
            continue
        first[id(module)] = name
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        wrapped = _wrapped(module, children)
        if wrapped is None:
            if name in found:
                raise _clash(name, (paths[name], found[name]), (path, module))
            found[name], paths[name] = module, path
        else:  # what is inside comes first, so that its names stay its own
            children.sort(key=lambda item: item[0] != wrapped)
        for key, child in reversed(children):
            waiting.append((name if key == wrapped else _join(name, key), _join(path, key), child))
    return found, further


def _wrapped(module: nn.Module, children: list[tuple[str, nn.Module]]) -> str | None:
    """Return the name of the child that a module only stands around, None where it is a module in its own right."""
    keys = [key for key, _ in children]
    if len(keys) == 1 and keys[0] in _WRAPPED:
        key = keys[0]
    elif not _PEFT_WRAPPED.isdisjoint(keys) and _from_peft(type(module)):
        key = next(key for key in keys if key in _PEFT_WRAPPED)  # prompt encoders and the like stand beside the model
    else:
        return None
    return None if isinstance(module, _CONTAINERS) or not _owns_nothing(module) else key


def _owns_nothing(module: nn.Module) -> bool:
    # a counter, as of torch.optim.swa_utils.AveragedModel, computes nothing
    buffers = (b for b in module._buffers.values() if b is not None and b.dim() > 0)
    return not any(p is not None for p in module._parameters.values()) and not any(True for _ in buffers)


def _from_peft(cls: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in cls.__mro__)


def _clash(name: str, one: tuple[str, nn.Module], other: tuple[str, nn.Module]) -> ModelError:
    (path, module), (second_path, second) = one, other
    return ModelError(
        f"two modules are both called '{name}' once wrapper names are removed: the {type(module).__name__} at "
        f"'{path}' and the {type(second).__name__} at '{second_path}'; rename one of them"
    )


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
    return _parameters(canonical_modules(model))


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield _join(name, key), parameter


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return groups of parameter names that share one Parameter object (this holds on the meta device too)."""
    return _tied(canonical_modules(model))


def _tied(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in _parameters(modules):
        owners[id(parameter)].append(name)
    return tuple(tuple(names) for names in owners.values() if len(names) > 1)


def fingerprint(model: nn.Module) -> str:
    """Return the sha256 of a model's structure: sorted names, classes, parameter shapes and ties.

    Equal before and after `autoprec.apply`, deepcopy, DDP, torch.compile and on the meta device. Weights and
    configuration values that leave no trace in shapes (such as dropout) are not in it.
    """
    modules = canonical_modules(model)
    rows: list[list[object]] = []
    for name, module in modules.items():
        shapes = {k: list(p.shape) for k, p in module._parameters.items() if p is not None}
        rows.append([name, base_class(module).__name__, sorted(shapes.items())])
    return structure_fingerprint(rows, _tied(modules))


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


def let_go(model: nn.Module) -> None:
    """Free the memory of a model that need not run any more: its tensors go to meta, shapes and ties kept."""
    moved: dict[int, nn.Parameter] = {}
    for module in canonical_modules(model).values():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:  # all were there at once, so no id comes up twice
                    moved[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
