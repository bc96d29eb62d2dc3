"""Ratios of times that were measured in turns, as benchmarks write them.

Not in `record.py`: that stays without torch, because a child's peak memory counts what its parent held when it forked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autoprec.probe.compare import median_ci95

__all__ = ["ratio_row"]


def ratio_row(ratios: Iterable[float]) -> dict[str, Any]:
    """Return the median of ratios of paired times, with its 95 % interval (empty for too few)."""
    median, interval = median_ci95(ratios)
    return {"median": round(median, 4), "ci95": [round(x, 4) for x in interval or ()]}
