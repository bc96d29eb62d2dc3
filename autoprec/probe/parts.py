"""What the leaves of one block do: attention, FFN, router, convolution, told by shapes and structure.

Attention reads the stream's width w with queries, keys and values (three leaves, or one fused) and returns to w.
An FFN expands w and contracts again (with a gate: two expanders). Both are first looked for in the submodules of
the block. What stands directly in the block is divided in two such that both halves have these shapes; where
several divisions do, neighbours in registration order, the wider FFN and last the leaves' own names decide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import TypeAlias

from autoprec.records import LeafKind, Role

__all__ = ["BlockLeaf", "BlockShape", "Part", "place", "says_attention"]

_MATMULS = (LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.QUANTIZED)
_ATTENTION_WORDS = frozenset("q k v o qkv kv query key value attn attention".split())


@dataclass(frozen=True, slots=True)
class BlockLeaf:
    """A leaf by its path within its block."""

    path: str
    kind: LeafKind
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class BlockShape:
    """All that placing looks at; equal blocks are equal shapes, so a thousand of them are placed once."""

    leaves: tuple[BlockLeaf, ...]
    #: paths of submodules that keep a number of heads
    heads: frozenset[str]
    #: paths and lengths of lists of equal submodules (experts)
    lists: tuple[tuple[str, int], ...] = ()
    #: paths of state-space mixers ('' for the block itself)
    mixers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """Leaves of a block that share a format; a router or a lookup within a block has no choice."""

    name: str
    role: Role
    paths: tuple[str, ...]


_Leaves: TypeAlias = tuple[BlockLeaf, ...]


@lru_cache(maxsize=1024)
def place(shape: BlockShape) -> tuple[Part, ...]:
    """Return the parts of a block: attention first, then FFN, then the rest. Every leaf is in one part."""
    found = list(_whole(shape))
    taken = {x for _, leaves in found for x in leaves}
    matmuls = tuple(x for x in shape.leaves if x.kind in _MATMULS and x not in taken)
    if matmuls:
        width = _stream_width(matmuls)
        loose = _split("", matmuls, _Judge(shape, width), found)
        found += _divide(loose, width, {role for role, _ in found if role is not Role.OTHER})
    for kind, role in ((LeafKind.CONV, Role.CONV), (LeafKind.EMBEDDING, Role.EMBEDDING)):
        some = tuple(x for x in shape.leaves if x.kind is kind and x not in taken)
        if some:
            found.append((role, some))
    return _named(found, shape)


def _whole(shape: BlockShape) -> Iterator[tuple[Role, _Leaves]]:
    """Yield what needs no telling apart: mixers, MultiheadAttention with its output, experts with what is beside."""
    for node in shape.mixers:
        yield Role.OTHER, tuple(x for x in shape.leaves if _within(x.path, node) and x.kind is not LeafKind.EMBEDDING)
    for leaf in shape.leaves:
        if leaf.kind is LeafKind.ATTENTION:
            yield Role.ATTENTION, tuple(x for x in shape.leaves if _within(x.path, leaf.path))
    for home in dict.fromkeys(x.path.rpartition(".")[0] for x in shape.leaves if x.kind is LeafKind.EXPERTS):
        around = next((h for h in sorted(shape.heads, key=len) if _within(home, h)), None)  # each expert a head
        whole = home if around is None else around
        # experts that stand in the block itself share no module of their own with anything
        beside = [x for x in shape.leaves if (_within(x.path, whole) if whole else x.kind is LeafKind.EXPERTS)]
        counts = {n for path, n in shape.lists if path.rpartition(".")[0] == home}
        inside = tuple(x for x in beside if _within(x.path, home))
        routers = [some for some in _children(home, inside).values() if _is_router(some, counts)]
        yield from ((Role.ROUTER, some) for some in routers)
        role = Role.FFN if around is None else Role.ATTENTION
        yield role, tuple(x for x in beside if not any(x in some for some in routers))


def _is_router(leaves: _Leaves, counts: set[int]) -> bool:
    """Tell whether a submodule ends in a score for each expert; a shared expert of that inner width does not."""
    return all(x.kind in _MATMULS for x in leaves) and leaves[-1].outputs in counts


def _children(node: str, leaves: _Leaves) -> dict[str, _Leaves]:
    """Return the leaves under each child of a module; a leaf that is a child stands under its own path."""
    groups: dict[str, list[BlockLeaf]] = {}
    for leaf in leaves:
        tail = leaf.path[len(node) + 1 :] if node else leaf.path
        head = tail.partition(".")[0]
        groups.setdefault(f"{node}.{head}" if node else head, []).append(leaf)
    for leaf in leaves:  # MultiheadAttention is a leaf that holds another
        if leaf.path in groups:
            groups[leaf.path] = [leaf]
    return {child: tuple(some) for child, some in groups.items()}


def _stream_width(leaves: _Leaves) -> int:
    """Return the width most leaves read or write; between equals the one read first."""
    return Counter(n for x in leaves for n in (x.inputs, x.outputs)).most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class _Judge:
    """Tells what a submodule with certain leaves is."""

    shape: BlockShape
    width: int

    def __call__(self, node: str, leaves: _Leaves) -> Role | None:
        heads = [h for h in self.shape.heads if _within(h, node)]
        outermost = [h for h in heads if not any(o != h and _within(h, o) for o in heads)]
        if _is_named_attention(node, leaves):
            return Role.ATTENTION
        # what contracts first and expands then ends one thing and begins another
        ahead = len(leaves) != 2 or leaves[0].inputs == self.width
        if not outermost and ((ahead and _is_ffn(leaves, self.width)) or _is_own_ffn(leaves)):
            return Role.FFN
        if _is_attention(leaves, self.width, bool(outermost) or _attention_words(leaves) > 0):
            return Role.ATTENTION
        if len(outermost) == 1 and len(leaves) > 1:
            outside = [x for x in leaves if not _within(x.path, outermost[0])]
            halves = _halves(leaves, self.width)
            # square leaves (position projections) can pass for an FFN of equal width, so they are no proof of one
            if len(outside) <= 1 and (halves is None or halves[1][-1].inputs == self.width):
                return Role.ATTENTION
        return None


def _split(node: str, leaves: _Leaves, judge: _Judge, found: list[tuple[Role, _Leaves]]) -> _Leaves:
    """Add the parts found in submodules of `node` to `found`; return the leaves in none of them."""
    role = judge(node, leaves) if node else None
    if role:
        found.append((role, leaves))
        return ()
    experts = {n for path, n in judge.shape.lists if path.rpartition(".")[0] == node}
    loose: list[BlockLeaf] = []
    for child, some in _children(node, leaves).items():
        if some[0].inputs == judge.width and _is_router(some, experts):
            found.append((Role.ROUTER, some))
        elif some[0].path != child:
            loose += _split(child, some, judge, found)
        else:
            loose += some
    return tuple(loose)


def _divide(loose: _Leaves, width: int, known: set[Role]) -> list[tuple[Role, _Leaves]]:
    """Place leaves that no submodule of their own holds together."""
    if not loose:
        return []
    if Role.ATTENTION not in known:
        if Role.FFN not in known and (halves := _halves(loose, width)):
            return [(Role.ATTENTION, halves[0]), (Role.FFN, halves[1])]
        if _is_attention(loose, width, _attention_words(loose) > 0):
            return [(Role.ATTENTION, loose)]
    ffn = max(_ffns(loose, width), key=lambda f: _likeness(f, loose), default=None)
    if ffn is None:
        return [(Role.OTHER, loose)]
    home = _common(x.path for x in ffn)
    whole = tuple(x for x in loose if x in ffn or (home and _within(x.path, home)))
    rest = tuple(x for x in loose if x not in whole)
    further = any(_likeness(f, rest)[:2] == (True, True) and f[-1].inputs > width for f in _ffns(rest, width))
    return [(Role.FFN, whole), *(_divide(rest, width, {*Role}) if further else [(Role.OTHER, rest)] if rest else [])]


def _likeness(ffn: _Leaves, leaves: _Leaves) -> tuple[bool, bool, int, int]:
    """Return how much a set of expanding leaves and a contracting one looks like one FFN among its neighbours."""
    places = [leaves.index(x) for x in ffn]
    ups = sum(x.inputs == ffn[-1].outputs and x.outputs == ffn[-1].inputs for x in leaves)
    downs = sum(x.outputs == ffn[-1].outputs and x.inputs == ffn[-1].inputs for x in leaves)
    size = len(ffn) if ups >= 2 * downs else -len(ffn)  # as many of both are pairs, not one with a gate
    in_order = len(ffn) > 2 or places[0] < places[-1]
    return _spread(ffn, leaves) == len(ffn), in_order, ffn[-1].inputs, size


def _halves(leaves: _Leaves, width: int) -> tuple[_Leaves, _Leaves] | None:
    """Return the best division into attention and FFN, None where no division has both shapes."""
    best: tuple[tuple[int, ...], _Leaves, _Leaves] | None = None
    for ffn in _ffns(leaves, width):
        rest = tuple(x for x in leaves if x not in ffn)
        if not _is_attention(rest, width, True):
            continue
        together = (_spread(ffn, leaves) == len(ffn)) + (_spread(rest, leaves) == len(rest))
        words = _attention_words(rest) - _attention_words(ffn)
        first = leaves.index(rest[0]) < leaves.index(ffn[0])
        score = (together, ffn[-1].inputs, words, int(first))
        if best is None or score > best[0]:
            best = (score, rest, ffn)
    return best[1:] if best else None


def _ffns(leaves: _Leaves, width: int) -> Iterator[_Leaves]:
    """Yield every set of one contracting and one or two expanding leaves that fit, the contracting one last."""
    for down in leaves:
        if down.outputs != width:
            continue
        ups = [x for x in leaves if x is not down and x.inputs == width]
        equal = [x for x in ups if x.outputs == down.inputs]
        yield from ((*pair, down) for pair in combinations(equal, 2))
        yield from ((up, down) for up in ups if up.outputs in (down.inputs, 2 * down.inputs))


def _is_ffn(leaves: _Leaves, width: int) -> bool:
    """Tell whether these are expand-then-contract leaves and nothing else; experts repeat the pattern."""
    if len(leaves) == 2 and all(x.inputs == x.outputs == width for x in leaves):
        return True
    gates = [x for x in leaves if x.inputs == x.outputs == width]
    if len(leaves) == 3 and len(gates) == 1:  # the product is gated after it is contracted
        up, down = sorted((x for x in leaves if x not in gates), key=lambda x: x.inputs != width)
        return up.inputs == down.outputs == width and up.outputs == down.inputs > 2 * width
    downs = [x for x in leaves if x.outputs == width and x.inputs != width]
    ups = [x for x in leaves if x.inputs == width and x.outputs != width]
    if not downs or len(downs) + len(ups) != len(leaves) or len({x.inputs for x in downs}) > 1:
        return False
    inner, wide = downs[0].inputs, {x.outputs for x in ups}
    if wide == {inner}:
        return len(ups) in (len(downs), 2 * len(downs))
    # a fused gate; one such pair could also be fused q/k/v with half as many key and value heads
    return wide == {2 * inner} and len(ups) == len(downs) and _attention_words(leaves) == 0


def _is_own_ffn(leaves: _Leaves) -> bool:
    """Tell whether these expand a width of their own, as layers that mix positions do, or a pair of streams."""
    if _attention_words(leaves) or not 2 <= len(leaves) <= 3:
        return False
    up, down = leaves[0], leaves[-1]
    pair = len(leaves) == 2 and up.inputs == up.outputs == down.inputs == 2 * down.outputs
    return pair or (up.outputs > up.inputs and _is_ffn(leaves, up.inputs))


def _is_named_attention(node: str, leaves: _Leaves) -> bool:
    """Tell whether a module holds layers called query, key and value directly, and more than just these."""
    children = _children(node, leaves)
    words = [set(re.split(r"[._]", child[len(node) :].lower())) for child in children]
    named = all(any(word & pair for word in words) for pair in ({"q", "query"}, {"k", "key"}, {"v", "value"}))
    return named and len(leaves) > 4 and all(len(some) == 1 for some in children.values())


def _is_attention(leaves: _Leaves, width: int, hinted: bool) -> bool:
    """Tell whether these are q/k/v and an output projection by shape; `hinted` settles shapes that FFNs share."""
    if len(leaves) == 2:
        return any(
            qkv.inputs == width == out.outputs
            and (hinted or qkv is leaves[0])
            and _is_fused(qkv.outputs, out.inputs, hinted)
            for qkv, out in permutations(leaves)
        )
    if len(leaves) == 3:
        separate_kv = any(
            q.inputs == width == out.outputs
            and q.outputs == out.inputs
            and kv.outputs > 0 == kv.outputs % 2
            and (hinted or (kv.outputs != q.outputs and kv.inputs == width and kv is not leaves[-1]))
            and q.outputs % (kv.outputs // 2) == 0
            for q, kv, out in permutations(leaves)
        )
        return separate_kv or (hinted and _are_qkv(leaves, width))
    if len(leaves) != 4:
        return False
    return any(
        out.outputs == width and _are_qkv(rest, width, out.inputs)
        for out, rest in ((x, tuple(y for y in leaves if y is not x)) for x in leaves)
    )


def _are_qkv(leaves: _Leaves, width: int, inner: int | None = None) -> bool:
    """Tell whether one leaf makes queries of the stream and two read one source alike, for keys and values."""
    return any(
        q.inputs == width
        and inner in (None, q.outputs)
        and k.inputs == v.inputs
        and k.outputs == v.outputs
        and k.outputs > 0 == q.outputs % k.outputs
        for q, k, v in permutations(leaves)
    )


def _is_fused(outputs: int, inner: int, hinted: bool) -> bool:
    """Tell whether `outputs` holds queries of width `inner` and equal keys and values of whole heads."""
    each, odd = divmod(outputs - inner, 2)
    if each <= 0 or odd or inner % each:
        return False
    return hinted or outputs != 2 * inner


def _attention_words(leaves: Iterable[BlockLeaf]) -> int:
    return sum(says_attention(x.path) for x in leaves)


def says_attention(path: str) -> bool:
    """Tell whether a path has a word that queries, keys, values or attention are called by."""
    return bool(_ATTENTION_WORDS & set(re.split(r"[._]", path.lower())))


def _within(path: str, node: str) -> bool:
    return path == node or path.startswith(f"{node}.") or not node


def _common(paths: Iterable[str]) -> str:
    """Return the innermost submodule that holds all these leaves, '' for the block itself."""
    split = [p.split(".")[:-1] for p in paths]
    depth = 0
    while all(len(s) > depth for s in split) and len({s[depth] for s in split}) == 1:
        depth += 1
    return ".".join(split[0][:depth])


def _spread(some: Sequence[BlockLeaf], leaves: _Leaves) -> int:
    places = [leaves.index(x) for x in some]
    return max(places) - min(places) + 1


def _named(found: list[tuple[Role, _Leaves]], shape: BlockShape) -> tuple[Part, ...]:
    """Name parts by role; a second attention is `cross_attention` where its path says so, else numbered."""
    rank = {x.path: i for i, x in enumerate(shape.leaves)}
    priority = [Role.ATTENTION, Role.FFN, Role.CONV, Role.OTHER, Role.ROUTER, Role.EMBEDDING]
    parts: list[Part] = []
    taken: Counter[str] = Counter()
    for role, leaves in sorted(found, key=lambda f: (priority.index(f[0]), min(rank[x.path] for x in f[1]))):
        paths = tuple(sorted((x.path for x in leaves), key=rank.__getitem__))
        name = role.value
        if role is Role.OTHER and any(all(_within(p, node) for p in paths) for node in shape.mixers):
            name = "mixer"
        if role is Role.ATTENTION and taken[name] and re.search(r"cross|enc|multihead_attn", paths[0], re.IGNORECASE):
            name = "cross_attention"
        taken[name] += 1
        parts.append(Part(name if taken[name] == 1 else f"{name}_{taken[name]}", role, paths))
    return tuple(parts)
