"""What stands in a comparison: plans with the name they are shown by, and the plans that have a name of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoprec.errors import PlanError, closest
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import DeviceProfile, Mode

__all__ = ["BY_NAME", "Candidate", "plan_by_name"]

_TF32, _CAST = "tf32", "cast-"
#: plans that need no file: blanket autocast by its format, TF32's switch alone, and `model.to(dtype)`
BY_NAME = (*(str(f) for f in Format), _TF32, f"{_CAST}{Format.BF16}", f"{_CAST}{Format.FP16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan to compare, the name it is shown by, and where it is from."""

    name: str
    source: str
    plan: Plan


def plan_by_name(name: str, model: Any, *, mode: Mode, device: DeviceProfile | None = None) -> Plan:
    """Return the plan of one of the names of `BY_NAME`.

    Args:
        model: an `nn.Module` or a `ModelProfile`.
        device: whose native formats decide what surrounds FP8; None: BF16 does.

    Raises:
        PlanError: no such name, with the closest.
    """
    if name not in BY_NAME:
        raise PlanError(f"'{name}' is no plan by name: {', '.join(BY_NAME)} are{closest(name, BY_NAME)}")
    if name == _TF32:
        return Plan.uniform(model, Format.FP32, mode=mode, device=device, tf32=True)
    if name.startswith(_CAST):
        return Plan.cast(model, name.removeprefix(_CAST), mode=mode, device=device)
    return Plan.uniform(model, name, mode=mode, device=device)
