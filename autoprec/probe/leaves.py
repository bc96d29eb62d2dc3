"""Which modules own a weight that is multiplied or looked up (leaves), and which have no choice of format (pinned).

A module is judged by its class and by the shapes of the parameters it owns itself, never by the model it stands in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.nn.parameter import is_lazy

from autoprec.errors import ModelError
from autoprec.records import Leaf, LeafKind
from autoprec.runtime.identity import base_class

__all__ = ["SUPPORTED", "Inventory", "find_sites", "take_inventory"]

SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, Embedding and the Conv1D of Hugging Face"

_NORM = "norm: runs as the ambient autocast runs it"
_ROTARY = "rotary positions: no weight, angles need FP32"
_DROPOUT = "dropout: no weight"
_VECTOR = "parameters are vectors, applied elementwise, not multiplied as matrices"
_ADDED = "parameters are added, not multiplied"

#: a base layer with eight adapters
_MOST_IN_SITE = 17

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found: leaves by name in registration order, pinned names by reason, and what has no place."""

    leaves: Mapping[str, Leaf]
    pinned: Mapping[str, tuple[str, ...]]
    unassigned: tuple[str, ...]


def take_inventory(modules: Mapping[str, nn.Module]) -> Inventory:
    """Sort modules into leaves, pinned and unassigned; containers that own nothing are none of these.

    Raises:
        ModelError: a lazy module whose shape is not known yet.
    """
    leaves = {name: leaf for name, module in modules.items() if (leaf := _leaf(name, module)) is not None}
    # a prediction head may keep the bias of its leaf under a second name; the leaf's unit decides about it
    held = {id(p) for name in leaves for p in _own(modules[name])}
    pinned: defaultdict[str, list[str]] = defaultdict(list)
    unassigned = []
    for name, module in modules.items():
        own = [p for p in _own(module) if id(p) not in held]
        if name in leaves:
            continue
        reason = _pin(module, own)
        if reason:
            pinned[reason].append(name)
        elif own:
            unassigned.append(name)
    fixed = {reason: tuple(names) for reason, names in pinned.items()}
    return Inventory(MappingProxyType(leaves), MappingProxyType(fixed), tuple(unassigned))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _leaf(name: str, module: nn.Module) -> Leaf | None:
    own = _own(module)
    if any(is_lazy(p) for p in own):
        raise ModelError(
            f"module '{name}' ({type(module).__name__}) is lazy and has no shape yet; run the model on one batch first"
        )
    shape = _kind(module)
    if shape is None:
        return None
    kind, inputs, outputs = shape
    return Leaf(module=name, kind=kind, inputs=inputs, outputs=outputs, parameters=sum(p.numel() for p in own))


def _kind(module: nn.Module) -> tuple[LeafKind, int, int] | None:
    """Return kind, inputs and outputs of a leaf, None for any other module."""
    if isinstance(module, nn.Linear):
        return LeafKind.LINEAR, module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return LeafKind.EMBEDDING, module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LeafKind.CONV, module.in_channels, module.out_channels
    weight = module._parameters.get("weight")
    # told from nn.Conv1d by its 2-D weight [in, out]; transformers itself need not be imported
    if weight is not None and weight.dim() == 2 and any(c.__name__ == "Conv1D" for c in type(module).__mro__):
        return LeafKind.CONV1D, weight.shape[0], weight.shape[1]
    return None


def _pin(module: nn.Module, own: list[nn.Parameter]) -> str | None:
    """Return why a module has no choice of format, None where it owns a matrix or nothing at all."""
    cls = base_class(module).__name__.lower()
    vectors = all(sum(size > 1 for size in p.shape) <= 1 for p in own)
    if isinstance(module, _NORMS) or ("norm" in cls and own and vectors):
        return _NORM
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return _DROPOUT
    if own and vectors:
        return _VECTOR
    # [1, positions, width]: broadcast over the batch, so it is added, as class tokens and position tables are
    if own and all(p.dim() == 3 and p.shape[0] == 1 for p in own):
        return _ADDED
    rotary = "inv_freq" in module._buffers or "rotary" in cls or "rope" in cls
    return _ROTARY if rotary and not own else None


def find_sites(leaves: Mapping[str, Leaf]) -> dict[str, tuple[str, ...]]:
    """Return the places leaves stand at, each with its leaves: most hold one, an adapted layer several.

    A module that holds one matmul of its own, in → out, and besides it only pairs in → r and r → out of lower rank
    (LoRA) is one place, named after that module: whatever the base layer does in the model, its adapters do too.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in leaves:
        node = name.rpartition(".")[0]
        while node:
            if len(groups[node]) <= _MOST_IN_SITE:  # what is larger is no site, and need not be kept
                groups[node].append(name)
            node = node.rpartition(".")[0]
    site_of = {}
    for node, names in groups.items():
        if 3 <= len(names) <= _MOST_IN_SITE and _is_adapted(node, [leaves[n] for n in names]):
            site_of.update(dict.fromkeys(names, node))
    sites: defaultdict[str, list[str]] = defaultdict(list)
    for name in leaves:
        sites[site_of.get(name, name)].append(name)
    return {site: tuple(names) for site, names in sites.items()}


def _is_adapted(node: str, leaves: list[Leaf]) -> bool:
    bases = [x for x in leaves if x.module.rpartition(".")[0] == node]
    if len(bases) != 1 or any(x.kind not in (LeafKind.LINEAR, LeafKind.CONV1D) for x in leaves):
        return False
    base = bases[0]
    rank_limit = min(base.inputs, base.outputs)
    down = Counter(x.outputs for x in leaves if x is not base and x.inputs == base.inputs and x.outputs < rank_limit)
    up = Counter(x.inputs for x in leaves if x is not base and x.outputs == base.outputs and x.inputs < rank_limit)
    return down == up and 2 * down.total() + 1 == len(leaves)
