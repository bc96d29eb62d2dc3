"""Rows for the table: what a solved front or a finished search gave each unit, and what the tree asks about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from autoprec.formats import Format
from autoprec.predict.setup import Setup
from autoprec.recommender.features import UnitFacts
from autoprec.recommender.gains import Gains
from autoprec.recommender.measures import unit_measures
from autoprec.recommender.table import DROPS
from autoprec.records import DeviceProfile, Role

__all__ = ["unit_rows"]


def unit_rows(
    facts: Mapping[str, UnitFacts],
    found: Gains,
    device: DeviceProfile,
    setup: Setup,
    limit: float,
    assignment: Mapping[str, Format],
    drops: Mapping[str, Mapping[Format, float]],
    may_fp8: Collection[str],
    *,
    origin: str,
    group: str = "",
) -> dict[str, dict[str, Any]]:
    """Return a row for each unit that the tree is asked about, by the unit's name (which is not in the row).

    Args:
        limit: allowance in percent.
        assignment: what the front, or the search, chose within it.
        drops: of each unit alone in a format, in percent, as far as known.
        may_fp8: as in `unit_measures`.
        origin: `solved` or `search`.
        group: what is left out together where the tree is judged.
    """
    free = {n: f for n, f in facts.items() if f.unit.role not in (Role.EMBEDDING, Role.ROUTER) and f.gemms}
    rows = {}
    for name, measures in unit_measures(free, found, device, setup, limit, may_fp8).items():
        own, known = found.seconds[name], drops.get(name, {})
        ends = [own[Format.FP32] - own[found.half]]
        if name in may_fp8 and Format.FP8 in own:
            ends.append(own[found.half] - own[Format.FP8])
        rows[name] = {
            "origin": origin,
            "group": group,
            "device": device.name,
            "role": str(free[name].unit.role),
            **measures,
            **{f"drop_{f}": known.get(Format(f)) for f in DROPS},
            "stake": 100 * max(map(abs, ends)) / found.step if found.step else 0.0,
            "label": {Format.FP32: "fp32", Format.FP8: "fp8"}.get(assignment[name], "half"),
        }
    return rows
