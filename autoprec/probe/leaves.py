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

__all__ = ["ROUTER", "SUPPORTED", "Inventory", "experts_beside", "find_sites", "is_mixer", "take_inventory"]

SUPPORTED = (
    "Linear, convolutions and transposed ones, Embedding, MultiheadAttention, the Conv1D of Hugging Face and experts "
    "held as 3-D parameters"
)

_NORM = "norm: runs as the ambient autocast runs it"
_ROTARY = "rotary positions: no weight, angles need FP32"
_DROPOUT = "dropout: no weight"
_VECTOR = "parameters are vectors, applied elementwise, not multiplied as matrices"
_ADDED = "parameters are added, not multiplied"
_STATE = "state of a recurrence: exponentiated and applied elementwise, not multiplied as a layer's weight"
_PARAMETRIZED = "parametrization: what a layer's weight is computed from"
_OWN = "matrices used by code of its own: they run in the format of what is around them"
ROUTER = "router: chooses experts, so a rounding error changes which weights are used"

#: a base layer with eight adapters
_MOST_IN_SITE = 17

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found: leaves by name in registration order, and pinned names by reason."""

    leaves: Mapping[str, Leaf]
    pinned: Mapping[str, tuple[str, ...]]


def take_inventory(modules: Mapping[str, nn.Module]) -> Inventory:
    """Sort modules into leaves and pinned; containers that own nothing are neither.

    Raises:
        ModelError: a lazy module whose shape is not known yet.
    """
    leaves = {name: leaf for name, module in modules.items() if (leaf := _leaf(name, module)) is not None}
    # a prediction head may keep the bias of its leaf under a second name; the leaf's unit decides about it
    held = {id(p) for name in leaves for p in _own(modules[name])}
    pinned: defaultdict[str, list[str]] = defaultdict(list)
    for name, module in modules.items():
        own = [p for p in _own(module) if id(p) not in held]
        if name in leaves:
            continue
        reason = _pin(module, own) or _pin_by_neighbours(name, module, own, modules)
        if reason or own:
            pinned[reason or _OWN].append(name)
    fixed = {reason: tuple(names) for reason, names in pinned.items()}
    return Inventory(MappingProxyType(leaves), MappingProxyType(fixed))


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
    count = sum(p.numel() for p in own)
    if kind is LeafKind.QUANTIZED:  # what is stored is packed
        count = inputs * outputs + sum(
            p.numel() for key, p in module._parameters.items() if p is not None and key == "bias"
        )
    return Leaf(module=name, kind=kind, inputs=inputs, outputs=outputs, parameters=count)


def _kind(module: nn.Module) -> tuple[LeafKind, int, int] | None:
    """Return kind, inputs and outputs of a leaf, None for any other module."""
    if isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_floating_point() and weight.dim() == 2:
            return LeafKind.LINEAR, weight.shape[1], weight.shape[0]
        packed = weight is not None and not weight.is_floating_point()
        return LeafKind.QUANTIZED if packed else LeafKind.LINEAR, module.in_features, module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return LeafKind.ATTENTION, module.embed_dim, module.embed_dim
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return LeafKind.EMBEDDING, module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.modules.conv._ConvNd):
        return LeafKind.CONV, module.in_channels, module.out_channels
    weight = module._parameters.get("weight")
    # told from nn.Conv1d by its 2-D weight [in, out]; transformers itself need not be imported
    if weight is not None and weight.dim() == 2 and any(c.__name__ == "Conv1D" for c in type(module).__mro__):
        return LeafKind.CONV1D, weight.shape[0], weight.shape[1]
    widths = _expert_widths(module)
    return (LeafKind.EXPERTS, *widths) if widths else None


def _expert_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the outer and inner width of experts held as 3-D parameters, None for any other module.

    Each matrix is [experts, a, b], in either order of a and b: some expand the stream's width (once or, with a fused
    gate, twice), one contracts it again. Biases [experts, n] may stand beside them.
    """
    own = _own(module)
    matrices = [p for p in own if p.dim() == 3]
    called_so = "expert" in base_class(module).__name__.lower()
    if not 1 <= len(matrices) <= 3 or any(p.dim() not in (2, 3) for p in own):
        return None
    if 1 in (counts := {p.shape[0] for p in own}) or (len(counts) > 1 and not called_so):
        return None  # counts differ where some experts are the identity and have no second matrix
    if len(matrices) == 1:
        return (matrices[0].shape[2], matrices[0].shape[1]) if called_so else None
    if {tuple(p.shape[1:]) for p in matrices} == {tuple(matrices[0].shape[1:])} and len(matrices) == 2:
        if matrices[0].shape[1] == matrices[0].shape[2] and not called_so:
            return None  # two equal squares are as well the block-diagonal gates of a recurrence
    down = matrices[-1] if len(matrices) == 2 else min(matrices, key=lambda p: p.numel())
    for outer, inner in (down.shape[1:], reversed(down.shape[1:])):
        if all(sorted(p.shape[1:]) in (sorted((outer, inner)), sorted((outer, 2 * inner))) for p in matrices):
            wide = [p for p in matrices if sorted(p.shape[1:]) == sorted((outer, 2 * inner))]
            if len(wide) == len(matrices) - 1 or not wide:
                return _oriented(outer, inner, matrices)
    return None


def _oriented(outer: int, inner: int, matrices: list[nn.Parameter]) -> tuple[int, int]:
    """Return (stream, inner): for equal counts of both orders, what the first matrix reads by its last size."""
    if all(sorted(p.shape[1:]) == sorted((outer, inner)) for p in matrices) and len(matrices) == 2:
        return (matrices[0].shape[2], matrices[0].shape[1])
    return outer, inner


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
    if own and all((p.dim() > 2 and p.shape[0] == 1) or sum(n > 1 for n in p.shape) <= 1 for p in own):
        return _ADDED
    rotary = "inv_freq" in module._buffers or "rotary" in cls or "rope" in cls
    return _ROTARY if rotary and not own else None


def _pin_by_neighbours(
    name: str, module: nn.Module, own: list[nn.Parameter], modules: Mapping[str, nn.Module]
) -> str | None:
    """Return why a module that owns a matrix has no choice, as told by what stands beside it or in it."""
    if not own:
        return None
    around = modules[name.rpartition(".")[0]] if name else module
    matrices = [p for p in own if p.dim() == 2]
    if name and len(matrices) == 1 and all(p.dim() <= 2 for p in own) and experts_beside(around) & {*matrices[0].shape}:
        return ROUTER
    if is_mixer(module) and all(p.dim() <= 2 for p in own):
        return _STATE
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return _PARAMETRIZED
    return None


def experts_beside(parent: nn.Module) -> set[int]:
    """Return how many experts stand directly in a module, for each list or module of them."""
    counts = set()
    for child in parent.children():
        members = child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else ()
        alike = [m for m in members if next(m.parameters(), None) is not None]
        if len(alike) > 1 and len({base_class(m) for m in alike}) == 1:
            counts.add(len(alike))
        elif _expert_widths(child):
            counts.add(next(p.shape[0] for p in _own(child)))
    return counts


def is_mixer(module: nn.Module) -> bool:
    """Say whether a module is a state-space mixer: state (its own or a child's), projections, a depthwise convolution.

    Kernels for such mixers take all these weights at once, so they share a format.
    """
    children = list(module.children())
    if not any(isinstance(c, nn.Conv1d) and c.groups == c.in_channels > 1 for c in children):
        return False
    state = [m for m in (module, *children) if _own(m) and _kind(m) is None and _pin(m, _own(m)) != _NORM]
    return bool(state) and sum(isinstance(c, nn.Linear) for c in children) > 1


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
