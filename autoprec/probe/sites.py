"""Where a unit's error can be seen: its sites, and what puts each of them into another format for a while.

A site is the module that holds a whole unit, as the runtime's scope does (a block's attention, with the scaled dot
product and the casts between its layers), or the block around it where its layers stand loosely among others, which
stay in FP32. Replaying a whole unit sees everything that its format changes inside it; where no module holds it, its
layers are sites of their own, and show only what each does to its own result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from autoprec.formats import Format, layout
from autoprec.plan import Plan, PlanUnit
from autoprec.records import ModelProfile, Role
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.fp8 import KeptScale
from autoprec.runtime.layout import Swap, common_path, holders, swaps_of_units
from autoprec.runtime.scope import enter_scope, leave_scope

__all__ = ["Site", "find_sites", "in_format"]

#: units in a block that is replayed for one of them; more would make a unit cost as much as a model
_MOST_IN_BLOCK = 4


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A module whose output carries a unit's error; `swaps` are by format. `whole`: it holds all of its unit.

    `kept`: modules within it that are sites of other units; what they gave stands while this one is replayed.
    """

    unit: str
    path: str
    module: nn.Module
    whole: bool
    swaps: Mapping[Format, tuple[Swap, ...]]
    kept: tuple[str, ...] = ()


def find_sites(
    profile: ModelProfile,
    modules: Mapping[str, nn.Module],
    formats: Sequence[Format],
    ambient: Format,
    *,
    emulated: bool,
    apart: frozenset[str] = frozenset(),
) -> list[Site]:
    """Return the sites of all units, in the order of the units.

    Args:
        modules: by canonical name.
        formats: those to be replayed; a site has swaps for those its unit takes.
        ambient: format of what is around a unit while it is replayed.
        emulated: whether FP8 is.
        apart: units to be seen layer by layer although they have a container.
    """
    wide = {u.name: Format.FP32 for u in profile.units}
    plan = Plan.assign(profile, wide, ambient=ambient, fp8_recipe="tensorwise", mode="infer")
    containers = holders(plan, modules)
    paths = {unit.name: path for path, unit in containers.items()}
    around = {u.name: common_path(u.modules) for u in plan.units if len(u.modules) > 1 and u.role is not Role.EMBEDDING}
    below = _below(plan, {*containers, *around.values()})
    for name, path in around.items():
        called = type(modules[path]).forward is not nn.Module.forward
        if path and called and len(below[path]) <= _MOST_IN_BLOCK:
            paths.setdefault(name, path)
    paths = {name: path for name, path in paths.items() if name not in apart}
    sites = []
    for given, unit in zip(profile.units, plan.units, strict=True):
        whole = unit.name in paths
        for path in [paths[unit.name]] if whole else list(unit.modules):
            inside = below[path] if whole else [unit]
            near = _surroundings(path, containers, inside)
            swaps: dict[Format, tuple[Swap, ...]] = {
                f: tuple(_swaps(plan, unit, f, path, modules, near, inside, emulated))
                for f in formats
                if f in given.formats and f is not Format.FP32
            }
            others = {p: u for p, u in near.items() if u.name != unit.name and paths.get(u.name) == p}
            kept = tuple(p for p in others if _within(p, path)) if whole else ()
            sites.append(Site(unit.name, path, modules[path], whole, swaps, kept))
    return sites


def _within(path: str, other: str) -> bool:
    """Say whether a module lies in another one."""
    return path != other and (not other or path.startswith(f"{other}."))


def _below(plan: Plan, containers: Collection[str]) -> dict[str, list[PlanUnit]]:
    """Return for each module of some the units that have a layer in it, without asking every pair of them."""
    found: dict[str, list[PlanUnit]] = {path: [] for path in containers}
    for unit in plan.units:
        homes: dict[str, None] = {}
        for name in unit.modules:
            path = name
            while True:
                if path in found:
                    homes[path] = None
                if not path:
                    break
                path = path.rpartition(".")[0]
        for path in homes:
            found[path].append(unit)
    return found


def _surroundings(path: str, containers: Mapping[str, PlanUnit], inside: Sequence[PlanUnit]) -> dict[str, PlanUnit]:
    """Return the containers at, around and within a module that has these units in it."""
    names = {unit.name for unit in inside}
    near = {p: u for p, u in containers.items() if u.name in names} if len(inside) > 1 else {}
    at = path
    while True:
        if at in containers:
            near[at] = containers[at]
        if not at:
            return near
        at = at.rpartition(".")[0]


def _swaps(
    plan: Plan,
    unit: PlanUnit,
    choice: Format,
    path: str,
    modules: Mapping[str, nn.Module],
    near: Mapping[str, PlanUnit],
    inside: Sequence[PlanUnit],
    emulated: bool,
) -> Iterator[Swap]:
    low = dataclasses.replace(unit, format=choice)
    units = [low if u.name == unit.name else u for u in inside]
    around = {p: (low if u.name == unit.name else u) for p, u in near.items()}
    if choice is Format.FP8:
        around = {p: u for p, u in around.items() if u is not low}
    for swap in swaps_of_units(plan, units, modules, around, emulated):
        if not path or swap.module == path or swap.module.startswith(f"{path}."):
            yield swap


@contextmanager
def in_format(
    site: Site,
    choice: Format,
    modules: Mapping[str, nn.Module],
    ambient: Format,
    kept: Callable[[str], KeptScale | None] = lambda leaf: None,
) -> Iterator[None]:
    """Run a block with a site's unit in a format, all else in the site in FP32, and the ambient format around it.

    `kept`: what a leaf scales by in FP8; None for what goes into it.
    """
    device = next(p.device.type for module in (site.module, *modules.values()) for p in module.parameters())
    entered: list[nn.Module] = []
    # the cache of casts is keyed by weight alone, and a weight is replayed in several formats
    with torch.autocast(device, dtype=torch_dtype(layout(ambient)), cache_enabled=False):
        try:
            for swap in site.swaps.get(choice, ()):
                enter_scope(modules[swap.module], swap.kind, name=swap.module, kept=kept(swap.module), **swap.settings)
                entered.append(modules[swap.module])
            yield
        finally:
            for module in reversed(entered):
                leave_scope(module)
