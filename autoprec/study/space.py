"""The space of a search: what is decided together, among which formats, and what was taken away and why.

A space file is TOML: `grouping` (roles, blocks or modules), a table `formats` of role → formats, and optionally
`pins`, a table of unit-name patterns (`*` as in file names) → the one format such units have.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from autoprec.catalog import search_space_file
from autoprec.errors import StudyError
from autoprec.files import from_json
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.records import DeviceProfile, ModelProfile, Removal, Role, Support, Unit
from autoprec.runtime.fp8 import fp8_misaligned

__all__ = ["Decision", "Grouping", "SearchSpace", "build_space", "describe", "fp8_fault", "split_units", "vetoed"]


class Grouping(StrEnum):
    """What is decided together."""

    ROLES = "roles"  #: all units of a role
    BLOCKS = "blocks"  #: each unit by itself
    MODULES = "modules"  #: a unit's readers and its writer of the stream apart


@dataclass(frozen=True, slots=True, kw_only=True)
class _SpaceFile:
    """A space as it is written."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    grouping: Grouping
    formats: Mapping[Role, tuple[Format, ...]]
    pins: Mapping[str, Format] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of the search: the units it decides, and the formats it chooses from."""

    name: str
    units: tuple[str, ...]
    formats: tuple[Format, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """All decisions over a model's units, whose formats the device and the file have cut down."""

    name: str
    profile: ModelProfile
    decisions: tuple[Decision, ...]
    removed: tuple[Removal, ...]
    ambient: Format

    @property
    def size(self) -> int:
        """Number of assignments in the space."""
        count = 1
        for decision in self.decisions:
            count *= len(decision.formats)
        return count

    def assignment(self, choices: Mapping[str, str]) -> dict[str, Format]:
        """Return the format of every unit for one choice a decision."""
        return {unit: Format(choices[d.name]) for d in self.decisions for unit in d.units}

    def choices(self, assignment: Mapping[str, Format]) -> dict[str, str] | None:
        """Return the choices that give an assignment, or None where the space does not hold it."""
        found: dict[str, str] = {}
        for decision in self.decisions:
            formats = {assignment.get(unit) for unit in decision.units}
            if len(formats) != 1 or not formats <= set(decision.formats):
                return None
            found[decision.name] = str(formats.pop())
        return found

    def of_plan(self, plan: Plan) -> dict[str, str] | None:
        """Return the choices that give a plan, or None where it has other surroundings or units."""
        same = plan.ambient is self.ambient and plan.stream is Format.FP32 and not plan.tf32
        same = same and plan.fp8_recipe in (None, Fp8Recipe.TENSORWISE)
        return self.choices(plan.assignment) if same else None


def build_space(name: str | Path, profile: ModelProfile, device: DeviceProfile) -> SearchSpace:
    """Return the space called `name` (or written in the file of that path) for a model on a device.

    Raises:
        AutoprecError: no such space, or a fault in its file with the place.
        StudyError: a pin that matches no unit or asks what unit or device cannot do, or a role left without a format.
    """
    what = f"search space {name}"
    written = from_json(_SpaceFile, search_space_file(name), what=what, error=StudyError)
    if written.grouping is Grouping.MODULES:
        profile = split_units(profile)
    pins = _pins(written, profile, device, what)
    removed: list[Removal] = []
    allowed: dict[str, tuple[Format, ...]] = {}
    for unit in profile.units:
        if unit.name in pins:
            allowed[unit.name] = (pins[unit.name],)
            continue
        wanted = written.formats.get(unit.role)
        if not wanted:
            raise StudyError(f"{what} gives no formats for role '{unit.role}', which unit '{unit.name}' has")
        if not set(wanted) & set(unit.formats):
            raise StudyError(f"{what} leaves unit '{unit.name}' no format: it takes {', '.join(unit.formats)}")
        allowed[unit.name] = _allowed(unit, wanted, profile, device, removed)
    return SearchSpace(
        name=str(name),
        profile=profile,
        decisions=_decisions(written.grouping, profile, allowed, pins),
        removed=tuple(removed),
        ambient=device.ambient,
    )


def _pins(written: _SpaceFile, profile: ModelProfile, device: DeviceProfile, what: str) -> dict[str, Format]:
    pins: dict[str, Format] = {}
    for pattern, choice in written.pins.items():
        matched = [u for u in profile.units if fnmatch.fnmatchcase(u.name, pattern)]
        if not matched:
            names = ", ".join(u.name for u in profile.units[:4])
            raise StudyError(f"{what} pins '{pattern}', which matches no unit; units are called {names}, …")
        for unit in matched:
            if choice not in unit.formats:
                raise StudyError(f"{what} pins '{unit.name}' to {choice}; it takes {', '.join(unit.formats)}")
            if fault := _unrunnable(unit, choice, profile, device):
                raise StudyError(f"{what} pins '{unit.name}' to {choice}, which cannot run: {fault}")
            if pins.setdefault(unit.name, choice) is not choice:
                raise StudyError(f"{what} pins '{unit.name}' to {pins[unit.name]} and to {choice}; keep one")
    return pins


def _allowed(
    unit: Unit, wanted: tuple[Format, ...], profile: ModelProfile, device: DeviceProfile, removed: list[Removal]
) -> tuple[Format, ...]:
    """Return the wanted formats that unit and device can do, FP32 at the least, noting what was removed."""
    kept = []
    for choice in Format:
        if choice not in wanted or choice not in unit.formats:
            continue
        reason = _removal_reason(unit, choice, profile, device)
        if reason is None:
            kept.append(choice)
        else:
            removed.append(Removal(unit.name, choice, reason))
    return tuple(kept) or (Format.FP32,)


def _removal_reason(unit: Unit, choice: Format, profile: ModelProfile, device: DeviceProfile) -> str | None:
    """Return why a format is of no use to a unit: it cannot run, or runs without units of its own."""
    if choice is not Format.FP32 and device.supports(choice) is not Support.NATIVE:
        known = device.formats.get(choice)
        return f"{device.name} has no native {choice}" + (f": {known.reason}" if known else "")
    return _unrunnable(unit, choice, profile, device)


def _unrunnable(unit: Unit, choice: Format, profile: ModelProfile, device: DeviceProfile) -> str | None:
    if choice is not Format.FP32 and device.supports(choice) is Support.ABSENT:
        known = device.formats.get(choice)
        return f"{device.name} lacks {choice}" + (f": {known.reason}" if known else "")
    return fp8_fault(unit, profile) if choice is Format.FP8 else None


def fp8_fault(unit: Unit, profile: ModelProfile) -> str | None:
    """Return why some leaf of a unit has no FP8 kernel, or None if all have."""
    for leaf in profile.leaves:
        if leaf.module in unit.modules and (wrong := fp8_misaligned(leaf.inputs, leaf.outputs)):
            return f"{leaf.module}: {wrong}"
    return None


def _decisions(
    grouping: Grouping, profile: ModelProfile, allowed: Mapping[str, tuple[Format, ...]], pins: Mapping[str, Format]
) -> tuple[Decision, ...]:
    if grouping is not Grouping.ROLES:
        return tuple(Decision(u.name, (u.name,), allowed[u.name]) for u in profile.units)
    groups: dict[str, list[Unit]] = {}
    for unit in profile.units:
        groups.setdefault(unit.name if unit.name in pins else str(unit.role), []).append(unit)
    found = []
    for name, units in groups.items():
        common = [f for f in allowed[units[0].name] if all(f in allowed[u.name] for u in units)]
        found.append(Decision(name, tuple(u.name for u in units), tuple(common) or (Format.FP32,)))
    return tuple(found)


def split_units(profile: ModelProfile) -> ModelProfile:
    """Return the profile with each attention and FFN unit cut in two: its last leaf writes the stream, the rest read.

    `block.attention` becomes `block.attention.in` (q, k, v) and `block.attention.out`. The parts may differ in
    format; the scaled dot product then follows the part `in` where a module holds that part alone, else the ambient.
    """
    units: list[Unit] = []
    for unit in profile.units:
        if unit.role in (Role.ATTENTION, Role.FFN) and len(unit.modules) > 1:
            for end, modules in (("in", unit.modules[:-1]), ("out", unit.modules[-1:])):
                units.append(dataclasses.replace(unit, name=f"{unit.name}.{end}", modules=modules))
        else:
            units.append(unit)
    return dataclasses.replace(profile, units=tuple(units))


def vetoed(space: SearchSpace, vetoes: Iterable[Removal]) -> tuple[Removal, ...]:
    """Return the vetoes that hold in a space: not those that would leave a decision, as one that is pinned, nothing."""
    found = []
    by_unit: dict[str, list[Removal]] = {}
    for veto in vetoes:
        by_unit.setdefault(veto.unit, []).append(veto)
    for decision in space.decisions:
        own = [veto for unit in decision.units for veto in by_unit.get(unit, ()) if veto.format in decision.formats]
        if set(decision.formats) - {veto.format for veto in own}:
            found += own
    return tuple(found)


def describe(space: SearchSpace) -> dict[str, Any]:
    """Return what identifies a space across runs: decisions with their units and formats, and the ambient."""
    decisions = {d.name: [list(d.units), [str(f) for f in d.formats]] for d in space.decisions}
    return {"decisions": decisions, "ambient": str(space.ambient)}
