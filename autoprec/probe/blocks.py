"""Where the repeated blocks of a model are: members of a ModuleList, of a Sequential, or equal siblings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from autoprec.runtime.identity import base_class

__all__ = ["Block", "Stack", "Tree", "find_stacks"]

_HEADS = re.compile(r"(^|_)n?heads?(_|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated block: `index` is its place in its stack ('3', or '1.3' in stages), `path` its module.

    What a stage holds besides its own blocks (a downsampling layer) is a block of the stage's path, `without` those.
    """

    index: str
    path: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks in a row. `label` tells stacks apart ('' where there is one); `region` is the subtree it names."""

    label: str
    region: str
    blocks: tuple[Block, ...]


class Tree:
    """Names of a model's modules as a tree, with the leaves under each."""

    def __init__(self, modules: Mapping[str, nn.Module], leaves: Collection[str]) -> None:
        self.modules = modules
        self.leaves = frozenset(leaves)
        self.below: defaultdict[str, list[str]] = defaultdict(list)
        self._children: defaultdict[str, list[str]] = defaultdict(list)
        for name in modules:
            if name:
                self._children[name.rpartition(".")[0]].append(name)
        for leaf in leaves:
            node = leaf
            while node:
                self.below[node].append(leaf)
                node = node.rpartition(".")[0]
            self.below[""].append(leaf)

    def children(self, name: str) -> list[str]:
        """Return the children of a module that are or hold leaves."""
        return [c for c in self._children[name] if self.below[c]]

    def containers(self, name: str) -> list[str]:
        """Return the children of a module that hold leaves and are none."""
        return [c for c in self.children(name) if c not in self.leaves]

    def alike(self, names: Collection[str]) -> bool:
        """Tell whether all these modules were of one class before any swap."""
        return len({base_class(self.modules[n]) for n in names}) == 1

    def counts_heads(self, name: str) -> bool:
        """Tell whether a module itself keeps a number of heads (`n_head`, `num_heads`, `head_dim`, …)."""
        own = vars(self.modules[name])
        return any(type(value) is int and value > 0 and _HEADS.search(key) for key, value in own.items())


def find_stacks(tree: Tree) -> tuple[Stack, ...]:
    """Return the stacks of repeated blocks in registration order; none for a model that repeats nothing."""
    found: dict[str, list[Block]] = {}
    _visit(tree, "", found)
    if not found:
        _siblings(tree, "", found)
    labels = _labels(list(found))
    return tuple(Stack(*labels[path], tuple(blocks)) for path, blocks in found.items())


def _visit(tree: Tree, name: str, found: dict[str, list[Block]]) -> None:
    if name in tree.leaves:
        return
    members = _members(tree, name)
    if members:
        found[name] = _blocks(tree, members)
        return
    for child in tree.containers(name):
        _visit(tree, child, found)


def _members(tree: Tree, name: str) -> list[str]:
    """Return the blocks a ModuleList or Sequential holds; a Sequential must hold two alike to count."""
    module, containers = tree.modules[name], tree.containers(name)
    if isinstance(module, nn.ModuleList):
        return containers if len(containers) == len(tree.children(name)) else []
    if isinstance(module, nn.Sequential):
        many = [c for c in containers if len(tree.below[c]) > 1]
        return many if len(many) > 1 and tree.alike(many) else []
    return []


def _blocks(tree: Tree, members: list[str], outer: str = "") -> list[Block]:
    """Return members as blocks; a member that holds a further stack (a stage) gives that stack's blocks."""
    blocks = []
    for place, member in enumerate(members):
        key = member.rpartition(".")[2]
        index = f"{outer}{key if key.isdigit() else place}"
        inner = _stage(tree, member)
        if not inner:
            blocks.append(Block(index, member))
            continue
        beside = _beside(tree, member, inner)
        before = bool(beside) and tree.below[member].index(beside[0]) == 0
        rest = [Block(index, member, tuple(inner))] if beside else []
        further = _blocks(tree, inner, f"{index}.")
        blocks += [*rest, *further] if before else [*further, *rest]
    return blocks


def _stage(tree: Tree, name: str) -> list[str]:
    """Return the blocks of a stage: the members of the one homogeneous list in it, beside which little stands.

    Little is convolutions and lookups, or one layer more that changes the width; experts with their router, and
    attention beside a list of equal FFNs, are a block.
    """
    for node in _only_lists(tree, name):
        members = _members(tree, node)
        if not tree.alike(members):
            continue
        beside = [tree.modules[leaf] for leaf in _beside(tree, name, members)]
        others = [m for m in beside if not isinstance(m, nn.modules.conv._ConvNd | nn.Embedding)]
        if not others:
            return members
        if len(others) == 1 and isinstance(others[0], nn.Linear) and others[0].out_features != len(members):
            return members
    return []


def _only_lists(tree: Tree, name: str) -> list[str]:
    """Return the lists of blocks within a module that are in no other such list."""
    found: list[str] = []
    pending = tree.containers(name) if not _members(tree, name) else [name]
    while pending:
        node = pending.pop(0)
        if _members(tree, node):
            found.append(node)
        else:
            pending += tree.containers(node)
    return found


def _beside(tree: Tree, name: str, members: list[str]) -> list[str]:
    """Return the leaves of a module that are in none of the members."""
    inside = {leaf for member in members for leaf in tree.below[member]}
    return [leaf for leaf in tree.below[name] if leaf not in inside]


def _siblings(tree: Tree, name: str, found: dict[str, list[Block]]) -> None:
    """Find blocks that stand side by side as attributes (`block1`, `block2`)."""
    containers = tree.containers(name)
    groups: defaultdict[type, list[str]] = defaultdict(list)
    for child in containers:
        if len(tree.below[child]) > 1:
            groups[base_class(tree.modules[child])].append(child)
    alike = max(groups.values(), key=len, default=[])
    if len(alike) > 1:
        found[name] = [Block(str(i), path) for i, path in enumerate(alike)]
        return
    for child in containers:
        _siblings(tree, child, found)


def _labels(paths: list[str]) -> dict[str, tuple[str, str]]:
    """Return for each stack the shortest path part that tells it apart, and the subtree that part names."""
    if len(paths) == 1:
        return {paths[0]: ("", "")}
    split = {p: p.split(".") for p in paths}
    common = 0
    while all(len(s) > common + 1 for s in split.values()) and len({s[common] for s in split.values()}) == 1:
        common += 1
    labels = {}
    for path, parts in split.items():
        stop = common + 1
        while stop < len(parts) and sum(s[:stop] == parts[:stop] for s in split.values()) > 1:
            stop += 1
        labels[path] = (".".join(parts[common:stop]), ".".join(parts[:stop]))
    return labels
