"""A model as units: the smallest groups of leaves that must share a format, found by structure alone.

There is no list of models. Repeated blocks are found first (`blocks`), the leaves of a block are told apart by
their shapes (`parts`), and what stands outside blocks is embeddings, convolution stem, the output head, or other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from autoprec.errors import ModelError
from autoprec.formats import Format
from autoprec.probe.blocks import Stack, Tree, find_stacks
from autoprec.probe.leaves import ROUTER, SUPPORTED, Inventory, experts_beside, find_sites, is_mixer, take_inventory
from autoprec.probe.parts import BlockLeaf, BlockShape, Part, place, says_attention
from autoprec.records import Leaf, LeafKind, ModelProfile, Pinned, Role, Unit, role_formats
from autoprec.runtime.identity import base_class, canonical_modules, fingerprint

__all__ = ["probe_units"]

_MATMULS = (LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.QUANTIZED, LeafKind.ATTENTION, LeafKind.EXPERTS)
#: kinds with no FP8 kernel
_NO_FP8 = (LeafKind.QUANTIZED, LeafKind.CONV)
_INNER_LOOKUP = "lookup within a block: its values are added, not multiplied"


def probe_units(model: nn.Module, *, model_id: str | None = None) -> ModelProfile:
    """Return the model's units, pinned modules and leaves; works on the meta device and behind wrappers.

    Units come in the order they run: embeddings (token, position and type lookups are one unit) and convolution
    stem, then each block's attention and FFN, then `other` (poolers, prediction-head transforms, projections), last
    role `lm_head`: the projection to the vocabulary, or the output layer of a classifier. A model with several
    stacks (encoder and decoder) has its units named after them, as in `decoder.blocks.0.cross_attention`. Modules
    that own nothing and only compute (activations, containers) are not listed; they run in the ambient format. What
    owns a matrix and is no known leaf is pinned: its code multiplies in the format of what is around it.

    Args:
        model: any module; its weights are not read.
        model_id: what the profile calls it; without one, what its configuration says, else its class.

    Raises:
        ModelError: no leaf at all.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    modules = canonical_modules(model)
    root = modules[""]
    inventory = take_inventory(modules)
    _check(modules, inventory)
    units, pinned = _Placement(modules, inventory.leaves).run()
    reasons = {**inventory.pinned, **pinned}
    class_name = base_class(root).__name__
    return ModelProfile(
        model_id=model_id or str(getattr(getattr(root, "config", None), "name_or_path", "") or class_name),
        class_name=class_name,
        fingerprint=fingerprint(model),
        units=units,
        pinned=tuple(Pinned(modules=names, reason=reason) for reason, names in reasons.items()),
        unassigned=(),
        leaves=tuple(inventory.leaves.values()),
        tied=_tied(modules, inventory.leaves),
        parameters=sum(p.numel() for p in root.parameters()),
    )


def _check(modules: Mapping[str, nn.Module], inventory: Inventory) -> None:
    if any(leaf.parameters for leaf in inventory.leaves.values()):
        return
    if inventory.leaves:
        first = next(iter(inventory.leaves))
        raise ModelError(
            f"the layers of the model ({base_class(modules['']).__name__}) have no weights (first: {first}). A size in "
            "its configuration is 0."
        )
    owners = [m for m in modules.values() if any(p is not None and p.dim() > 1 for p in m._parameters.values())]
    owned = ""
    if owners:
        first = ", ".join(f"{k} {list(p.shape)}" for k, p in owners[0]._parameters.items() if p is not None)
        owned = f"; its matrices are used by code of their own (first: {base_class(owners[0]).__name__} with {first})"
    raise ModelError(
        f"the model ({base_class(modules['']).__name__}) has no layer whose format could be chosen{owned}. "
        f"Supported layers are {SUPPORTED}."
    )


class _Placement:
    """One pass over a model's sites (a leaf, or a leaf with its adapters); each goes into one unit or is pinned."""

    def __init__(self, modules: Mapping[str, nn.Module], leaves: Mapping[str, Leaf]) -> None:
        self.root = modules[""]
        self.sites = find_sites(leaves)
        self.leaves = {site: leaves[names[0]] for site, names in self.sites.items()}
        self.tree = Tree(modules, self.leaves)
        self.order = {name: i for i, name in enumerate(leaves)}
        self.kinds = {name: leaf.kind for name, leaf in leaves.items()}
        self.stacks = find_stacks(self.tree)
        self.units: list[Unit] = []
        self.pinned: defaultdict[str, list[str]] = defaultdict(list)
        self.taken: set[str] = set()

    def run(self) -> tuple[tuple[Unit, ...], dict[str, tuple[str, ...]]]:
        """Return units in order, and pinned leaves by reason."""
        inside = {leaf for stack in self.stacks for block in stack.blocks for leaf in self.tree.below[block.path]}
        outside = [name for name in self.leaves if name not in inside]
        matmuls = [n for n in outside if self.leaves[n].kind in _MATMULS]
        vocabulary = self._vocabulary_head(matmuls, outside)
        rest = [n for n in matmuls if n != vocabulary]
        self._stems(outside, ("", *(s.label for s in self.stacks if s.label)))
        if not self.stacks and rest:
            rest = self._unrepeated(rest)
        for path in self._beside():
            rest = self._lone(path, rest)
        head = vocabulary or self._value_head(rest, outside)
        for name in rest:
            if name != head:
                self._add(self._short(name), Role.OTHER, [name])
        if head is not None:
            self._add("lm_head" if vocabulary else self._short(head), Role.LM_HEAD, [head])
        return tuple(self.units), {reason: tuple(names) for reason, names in self.pinned.items()}

    def _stems(self, outside: Iterable[str], labels: Iterable[str]) -> None:
        """Add for each region what stands before its blocks, then the blocks themselves."""
        before: defaultdict[tuple[str, Role], list[str]] = defaultdict(list)
        for name in outside:
            if self.leaves[name].kind not in _MATMULS:
                role = Role.EMBEDDING if self.leaves[name].kind is LeafKind.EMBEDDING else Role.CONV
                before[self._region(name), role].append(name)
        for label in labels:
            for role, word in ((Role.EMBEDDING, "embeddings"), (Role.CONV, "conv")):
                if (label, role) in before:
                    self._add(f"{label}.{word}" if label else word, role, before[label, role])
            for stack in self.stacks:
                if stack.label == label:
                    self._blocks(stack)

    def _region(self, name: str) -> str:
        """Return the label of the stack whose subtree holds a leaf, '' for leaves of the whole model."""
        for stack in self.stacks:
            if stack.label and name.startswith(f"{stack.region}."):
                return stack.label
        return ""

    def _blocks(self, stack: Stack) -> None:
        for block in stack.blocks:
            prefix = f"{stack.label}.blocks.{block.index}" if stack.label else f"blocks.{block.index}"
            apart = {leaf for path in block.without for leaf in self.tree.below[path]}
            for part in place(self._shape(block.path, (n for n in self.tree.below[block.path] if n not in apart))):
                self._part(part, f"{prefix}.{part.name}", f"{block.path}." if block.path else "")

    def _shape(self, path: str, names: Iterable[str]) -> BlockShape:
        """Describe a block by paths within it, so that equal blocks are equal values."""
        cut = len(path) + 1 if path else 0
        leaves, heads, lists, mixers = [], set(), set(), set()
        seen = {path}
        if is_mixer(self.tree.modules[path]):
            mixers.add("")
        for name in names:
            leaf = self.leaves[name]
            leaves.append(BlockLeaf(name[cut:], leaf.kind, leaf.inputs, leaf.outputs))
            node = name.rpartition(".")[0]
            while node not in seen and len(node) > len(path):
                seen.add(node)
                if self.tree.counts_heads(node):
                    heads.add(node[cut:])
                if is_mixer(self.tree.modules[node]):
                    mixers.add(node[cut:])
                lists |= {(f"{node[cut:]}.experts", n) for n in experts_beside(self.tree.modules[node])}
                node = node.rpartition(".")[0]
                lists |= {("experts", n) for n in experts_beside(self.tree.modules[path])} if path else set()
        return BlockShape(tuple(leaves), frozenset(heads), tuple(sorted(lists)), frozenset(mixers))

    def _part(self, part: Part, name: str, prefix: str) -> None:
        names = [f"{prefix}{path}" for path in part.paths]
        if part.role is Role.ROUTER:
            self.pinned[ROUTER] += self._members(names)
        elif part.role is Role.EMBEDDING:
            self.pinned[_INNER_LOOKUP] += self._members(names)
        else:
            self._add(name, part.role, names)

    def _unrepeated(self, names: list[str]) -> list[str]:
        """Place a model that repeats nothing as one block; return the leaves that are neither attention nor FFN."""
        left: list[str] = []
        for part in place(self._shape("", names)):
            if part.role in (Role.ATTENTION, Role.FFN):
                self._part(part, part.name, "")
            else:
                left += part.paths
        return left

    def _beside(self) -> list[str]:
        """Return the outermost modules beside the stacks, if there are stacks."""
        found: list[str] = []
        blocks = {block.path for stack in self.stacks for block in stack.blocks}
        pending = self.tree.containers("") if blocks else []
        while pending:
            path = pending.pop(0)
            if not any(block == path or block.startswith(f"{path}.") for block in blocks):
                found.append(path)
            elif path not in blocks:
                pending += self.tree.containers(path)
        return found

    def _lone(self, path: str, rest: list[str]) -> list[str]:
        """Place the attention of a module beside the stacks, and its FFN (pooling, resampling); return what is left.

        Shapes alone are no proof there: many small networks of projections have them.
        """
        shape = self._shape(path, [n for n in self.tree.below[path] if n in rest])
        whole = {leaf.path for leaf in shape.leaves if leaf.kind is LeafKind.ATTENTION}

        def told(part: Part) -> bool:
            held = any(all(n.startswith(f"{node}.") for n in part.paths) for node in shape.heads)
            return held or any(n in whole or says_attention(n) for n in part.paths)

        parts = [p for p in place(shape) if p.role is Role.FFN or (p.role is Role.ATTENTION and told(p))]
        if any(part.role is Role.ATTENTION for part in parts):
            for part in parts:
                self._part(part, f"{self._short(path)}.{part.name}", f"{path}.")
                placed = {f"{path}.{name}" for name in part.paths}
                rest = [n for n in rest if n not in placed]
        return rest

    def _vocabulary_head(self, matmuls: list[str], outside: list[str]) -> str | None:
        """Return the projection to the vocabulary: by accessor, by a tied weight, by size."""
        by_id = {id(self.tree.modules[n]): n for n in matmuls}
        declared = _accessor(self.root, "get_output_embeddings")
        if declared is not None and id(declared) in by_id:
            return by_id[id(declared)]
        lookups = [n for n in outside if self.leaves[n].kind is LeafKind.EMBEDDING]
        source = _accessor(self.root, "get_input_embeddings")
        tokens = [n for n in lookups if self.tree.modules[n] is source] or lookups
        tables = {self._weight(n) for n in lookups}
        tied = [n for n in matmuls if self._weight(n) in tables]
        sized = [n for n in matmuls if self.leaves[n].outputs in {self.leaves[t].inputs for t in tokens}]
        return next(reversed(tied or sized), None)

    def _value_head(self, rest: list[str], outside: list[str]) -> str | None:
        """Return the output layer of a classifier: the last leaf outside blocks that changes the width, behind them.

        A layer that another follows in its own module, or a convolution in the model, is none.
        """
        changing = [n for n in rest if self.leaves[n].inputs != self.leaves[n].outputs and not self._region(n)]
        widths = [self.leaves[n].outputs for n in changing[-2:]]
        if not changing or (len(self.stacks) > 1 and len(widths) > len(set(widths))):
            return None  # two towers project each into one space
        head = changing[-1]
        parent, rank = head.rpartition(".")[0], {n: i for i, n in enumerate(self.leaves)}
        behind = [n for n in self.leaves if rank[n] > rank[head]]
        followed = any(n.startswith(f"{parent}.") for n in behind) if parent else False
        convolved = any(self.leaves[n].kind is LeafKind.CONV and n in set(outside) for n in behind)
        first = min((rank[leaf] for s in self.stacks for b in s.blocks for leaf in self.tree.below[b.path]), default=-1)
        return None if followed or convolved or rank[head] < first else head

    def _short(self, name: str) -> str:
        """Return a leaf's name without the path of the body, and without a closing `dense` or number if it is alone."""
        parts = name.split(".")
        homes = [block.path for stack in self.stacks for block in stack.blocks[:1]]
        while len(parts) > 1 and any(home.startswith(f"{parts[0]}.") for home in homes):
            head = parts.pop(0)
            homes = [home[len(head) + 1 :] for home in homes if home.startswith(f"{head}.")]
        parent = name.rpartition(".")[0]
        if len(parts) > 1 and (parts[-1] == "dense" or parts[-1].isdigit()) and len(self.tree.below[parent]) == 1:
            parts.pop()
        short = ".".join(parts)
        return f"layer.{short}" if short.isdigit() else short or "layer"

    def _weight(self, site: str) -> int:
        """Return the identity of the weight at a site (an adapted layer's own, not its adapters')."""
        return id(self.tree.modules[self.sites[site][0]]._parameters.get("weight"))

    def _members(self, sites: Iterable[str]) -> list[str]:
        return [leaf for site in sites for leaf in self.sites[site]]

    def _add(self, name: str, role: Role, names: list[str]) -> None:
        unique, count = name, 1
        while unique in self.taken:
            count += 1
            unique = f"{name}_{count}"
        self.taken.add(unique)
        modules = tuple(sorted(self._members(names), key=self.order.__getitem__))
        formats = role_formats(role)
        if any(self.kinds[m] in _NO_FP8 for m in modules):
            formats = tuple(f for f in formats if f is not Format.FP8)
        self.units.append(Unit(name=unique, role=role, modules=modules, formats=formats))


def _accessor(root: nn.Module, method: str) -> nn.Module | None:
    """Call a Hugging Face accessor; a model without it, or that declines, has none."""
    call = getattr(root, method, None)
    if not callable(call):
        return None
    try:
        found = call()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _tied(modules: Mapping[str, nn.Module], leaves: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return groups of leaves that share a Parameter object; identity holds on the meta device too."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name in leaves:
        weight = modules[name]._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(name)
    return tuple(tuple(names) for names in owners.values() if len(names) > 1)
