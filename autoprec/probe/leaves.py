"""Which modules own a weight that is multiplied or looked up (leaves), and which have no choice of format (pinned).

A module is judged by its class and by the shapes of the parameters it owns itself, never by the model it stands in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.nn.parameter import is_lazy

from autoprec.errors import ModelError
from autoprec.records import Leaf, LeafKind
from autoprec.runtime.identity import base_class

__all__ = ["SUPPORTED", "Inventory", "take_inventory"]

SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, Embedding and the Conv1D of Hugging Face"

_NORM = "norm: runs as the ambient autocast runs it"
_ROTARY = "rotary positions: no weight, angles need FP32"
_DROPOUT = "dropout: no weight"
_VECTOR = "parameters are vectors, applied elementwise, not multiplied as matrices"
_ADDED = "parameters are added, not multiplied"

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
    leaves: dict[str, Leaf] = {}
    pinned: defaultdict[str, list[str]] = defaultdict(list)
    unassigned = []
    for name, module in modules.items():
        leaf = _leaf(name, module)
        if leaf is not None:
            leaves[name] = leaf
            continue
        reason = _pin(module)
        if reason:
            pinned[reason].append(name)
        elif any(p is not None for p in module._parameters.values()):
            unassigned.append(name)
    fixed = {reason: tuple(names) for reason, names in pinned.items()}
    return Inventory(MappingProxyType(leaves), MappingProxyType(fixed), tuple(unassigned))


def _leaf(name: str, module: nn.Module) -> Leaf | None:
    own = [p for p in module._parameters.values() if p is not None]
    if any(is_lazy(p) for p in own):  # type: ignore[no-untyped-call]
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


def _pin(module: nn.Module) -> str | None:
    """Return why a module has no choice of format, None where it owns a matrix or nothing at all."""
    own = [p for p in module._parameters.values() if p is not None]
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
