"""Names made short: runs of equal blocks as 'layers.0-23', modules of one unit under their common parent."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Run", "few", "runs", "short_modules", "span"]

T = TypeVar("T")
_INTEGER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Run(Generic[T]):
    """Items that differ only in their block's number, under one name such as 'layers.0-23.attention'."""

    name: str
    items: tuple[T, ...]


def runs(items: Iterable[T], name: Callable[[T], str], same: Callable[[T], Hashable]) -> list[Run[T]]:
    """Gather items of consecutive block numbers that are otherwise alike; order is that of each run's first item.

    Args:
        items: units in the order of the model; attention and FFN of a block may alternate.
        name: the name of an item; its first integer is the block's number.
        same: what must be equal within a run, beside the rest of the name.
    """
    found: list[list[tuple[int, T]]] = []
    latest: dict[str, tuple[Hashable, list[tuple[int, T]]]] = {}
    for item in items:
        match = _INTEGER.search(name(item))
        shape = _INTEGER.sub("#", name(item), count=1)
        block = int(match.group()) if match else 0
        key, run = latest.get(shape, (None, []))
        if match and run and key == same(item) and block == run[-1][0] + 1:
            run.append((block, item))
            continue
        run = [(block, item)]
        found.append(run)
        latest[shape] = (same(item), run)
    return [Run(span(name(run[0][1]), name(run[-1][1])), tuple(i for _, i in run)) for run in found]


def span(first: str, last: str) -> str:
    """Return one name for a run, such as 'h.0-11.attn'; `first` alone if more than the first number differs."""
    if first == last or _INTEGER.sub("#", first, count=1) != _INTEGER.sub("#", last, count=1):
        return first
    end = _INTEGER.search(last)
    return _INTEGER.sub(lambda m: f"{m.group()}-{end.group() if end else ''}", first, count=1)


def short_modules(modules: Sequence[str], most: int = 6) -> str:
    """Return modules under their common parent: 'h.0.attn: q k v'; beyond `most` the rest are counted."""
    if len(modules) == 1:
        return modules[0] or "(root)"
    parts = [m.split(".") for m in modules]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    tails = " ".join(".".join(p[shared:]) for p in parts[:most])
    more = f" and {len(modules) - most} more" if len(modules) > most else ""
    parent = ".".join(parts[0][:shared])
    return f"{parent}{': ' if parent else ''}{tails}{more}"


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
