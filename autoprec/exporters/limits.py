"""What an export target can express, and the nearest plan that it can, where it cannot express one.

A target whose program calls `autoprec.apply` takes nearly any plan. The others have settings of their own: `Limits`
says what their layers can have. Nothing is dropped silently: a plan outside the limits is refused, its layers named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoprec.errors import ExportError
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Evidence, Plan, PlanUnit
from autoprec.records import Mode, Role

__all__ = ["ANY", "Limits", "check_limits", "nearest_plan"]

#: layers named in a message before the rest is counted
_MOST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a target cannot express, each with the reason; empty is what can be expressed."""

    formats: Mapping[Format, str] = field(default_factory=dict)  #: formats that no unit can have
    mixed: str | None = None  #: units that are not in FP8 must all have the ambient format
    lookups: str | None = None  #: embeddings stay in FP32
    stream: str | None = None  #: weights and residual stream stay in FP32
    recipes: Mapping[Fp8Recipe, str] = field(default_factory=dict)  #: ways of scaling FP8
    inference: str | None = None  #: plans made for inference


#: a target that expresses every plan
ANY = Limits()


def nearest_plan(plan: Plan, limits: Limits) -> Plan:
    """Return `plan` where it is within `limits`, else the one within them that differs least, without evidence.

    A unit whose format is out of reach takes the ambient's, or FP32 where that is out of reach too.
    """
    settings: dict[str, Any] = {name: new for name, new, _ in _settings(plan, limits)}
    around = dataclasses.replace(plan, **settings)
    formats = {unit.name: new for unit, new, _ in _units(around, limits)}
    if not settings and not formats:
        return plan
    changed = around.replace(formats)
    if not any(unit.format is Format.FP8 for unit in changed.units):
        changed = dataclasses.replace(changed, fp8_recipe=None)
    return dataclasses.replace(changed, evidence=Evidence()).with_training_needs()


def check_limits(plan: Plan, limits: Limits, target: str) -> None:
    """Check that a target can express a plan.

    Raises:
        ExportError: it cannot; names the layers and offers the nearest plan that it can.
    """
    found = [f"{name} {getattr(plan, name)} (it can: {new}): {why}" for name, new, why in _settings(plan, limits)]
    groups: dict[tuple[Format, Format, str], list[PlanUnit]] = {}
    changed = nearest_plan(plan, limits)
    for unit, _, why in _units(plan, limits):
        groups.setdefault((unit.format, changed.unit(unit.name).format, why), []).append(unit)
    for (old, new, why), units in groups.items():
        layers = [module for unit in units for module in unit.modules]
        count = f"{len(units)} unit{'s' if len(units) > 1 else ''}"
        found.append(f"{old} in {count}, layers {_listed(layers)} (it can: {new}): {why}")
    if not found:
        return
    raise ExportError(
        f"'{target}' cannot express this plan. {'. '.join(found)}. The nearest plan that it can express: "
        f"autoprec.exporters.nearest(autoprec.Plan.load('plan.json'), '{target}').save('nearest.json'); export that, "
        "after autoprec verify nearest.json has shown what it costs.",
        nearest=changed,
    )


def _settings(plan: Plan, limits: Limits) -> Iterator[tuple[str, Format | Fp8Recipe | Mode, str]]:
    """Yield the settings of a plan that are out of reach, with what is nearest, and why."""
    if plan.ambient in limits.formats:
        low = Format.BF16 if Format.BF16 not in limits.formats else Format.FP32
        yield "ambient", low, limits.formats[plan.ambient]
    if limits.stream and plan.stream is not Format.FP32:
        yield "stream", Format.FP32, limits.stream
    if limits.inference and plan.mode is Mode.INFER:
        yield "mode", Mode.TRAIN, limits.inference
    if plan.fp8_recipe is not None and plan.fp8_recipe in limits.recipes and Format.FP8 in plan.formats:
        yield "fp8_recipe", next(r for r in Fp8Recipe if r not in limits.recipes), limits.recipes[plan.fp8_recipe]


def _units(plan: Plan, limits: Limits) -> Iterator[tuple[PlanUnit, Format, str]]:
    """Yield the units whose format is out of reach, with what is nearest, and why."""
    for unit in plan.units:
        lookup = unit.role is Role.EMBEDDING
        if lookup and limits.lookups and unit.format is not Format.FP32:
            yield unit, Format.FP32, limits.lookups
        elif unit.format in limits.formats:
            new = Format.FP32 if lookup or plan.ambient in limits.formats else plan.ambient
            yield unit, new, limits.formats[unit.format]
        elif limits.mixed and not lookup and unit.format not in (Format.FP8, plan.ambient):
            yield unit, plan.ambient, limits.mixed


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")
