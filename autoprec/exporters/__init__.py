"""Plans as text for other programs; one file a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from autoprec.errors import UsageError, closest
from autoprec.exporters.python import python_source
from autoprec.exporters.transformers import trainer_source
from autoprec.plan import Plan

__all__ = ["TARGETS", "export"]

#: what a plan can be written as
TARGETS: Mapping[str, Callable[[Plan, str], str]] = MappingProxyType(
    {"python": python_source, "transformers": trainer_source}
)


def export(plan: Plan, target: str, plan_path: str = "plan.json") -> str:
    """Return the plan as the text of `target`: 'python' (a training loop) or 'transformers' (a Trainer).

    The text does not hold the plan: it reads it from `plan_path` when it runs.

    Raises:
        UsageError: an unknown target.
    """
    write = TARGETS.get(target)
    if write is None:
        raise UsageError(
            f"'{target}' is no export target; choose one of {', '.join(TARGETS)}{closest(target, TARGETS)}"
        )
    return write(plan, plan_path)
