"""Plans as a map from paths to formats, for frameworks whose layers have a dtype of their own."""

from __future__ import annotations

from os.path import commonprefix

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Role

__all__ = ["paths"]


def paths(plan: Plan) -> dict[str, Format]:
    """Return the format of every layer of a plan by its path, '/' between names.

    The module around an attention unit is listed too, where no other unit is inside it: the product between its
    layers is the unit's.
    """
    found: dict[str, Format] = {}
    for unit in plan.units:
        around = ".".join(commonprefix([module.split(".") for module in unit.modules]))
        others = [m for other in plan.units if other is not unit for m in other.modules]
        if unit.role is Role.ATTENTION and len(unit.modules) > 1 and around:
            if not any(module.startswith(f"{around}.") for module in others):
                found[around.replace(".", "/")] = unit.format
        for module in unit.modules:
            found[module.replace(".", "/")] = unit.format
    return found
