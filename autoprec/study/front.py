"""The Pareto front of measured plans: pure functions of points."""

from __future__ import annotations

from collections.abc import Sequence

from autoprec.records import Measurement

__all__ = ["feasible", "pareto_front", "pareto_indices"]


def pareto_indices(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats in both coordinates (smaller is better), first rising.

    A point is beaten by one that is no larger in both and smaller in one; of equal points the first stays.
    """
    found: list[int] = []
    best = float("inf")
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def feasible(measurement: Measurement) -> bool:
    """Say whether a measurement has both objectives and keeps its gradient within its limit."""
    if measurement.drop is None or measurement.step_ms is None:
        return False
    if measurement.grad_error is None or measurement.grad_error_limit is None:
        # train mode gives a reason where there is no finite gradient; infer mode has neither
        return not (measurement.reason or "").startswith("the gradient is not finite")
    return measurement.grad_error <= measurement.grad_error_limit


def pareto_front(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the feasible measurements that none beats in both drop and step time, from least drop to least time."""
    usable = [m for m in measurements if feasible(m)]
    points = [(m.drop, m.step_ms) for m in usable if m.drop is not None and m.step_ms is not None]
    return [usable[i] for i in pareto_indices(points)]
