"""The front: drop against step time, with intervals, baselines, the limit and the chosen plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoprec.records import Measurement
from autoprec.report.charts import (
    NAME,
    Chart,
    Data,
    harmless,
    hover,
    interval_bars,
    limit_line,
    log_axis,
    positive_floor,
    ring,
    time_axis,
)
from autoprec.report.figures import number, origins
from autoprec.report.run import Run

__all__ = ["front_chart"]

_SYMBOLS = ("diamond", "square", "triangle-up", "pentagon", "hexagon", "cross", "triangle-left")
#: the eighth, which is the recommended plan where it is none of the others by name, and may lie on one of them
_OPEN = {"symbol": "diamond-open", "size": 16, "color": "@ink"}


def front_chart(run: Run, place: Callable[[Measurement], int]) -> Chart | None:
    """Return the chart; None where nothing has both a drop and a time.

    Args:
        place: the number by which the page knows a plan, so that a click on a point can show it.
    """
    done = [m for m in run.measured if m.drop is not None and m.step_ms is not None]
    if not done:
        return None
    floor = positive_floor(m.drop for m in done if m.drop is not None)
    on_front = {m.name for m in run.front}
    bases = [m for m in run.baselines if m in done]
    others = [m for m in done if m not in bases and m.name not in on_front]
    traces = [_points(run, others, place, floor, "trials", {"symbol": "circle", "size": 7, "color": "@muted"})]
    traces.append(_line(run.front, floor))
    trials = [m for m in run.front if m.name not in {b.name for b in bases}]
    traces.append(_points(run, trials, place, floor, "trials of the front", {"size": 9, "color": "@accent"}))
    for index, m in enumerate(bases):
        known = index < len(_SYMBOLS)
        marker = {"symbol": _SYMBOLS[index], "size": 11, "color": f"@series{index}"} if known else _OPEN
        traces.append(_points(run, [m], place, floor, m.name, marker))
    if run.best is not None:
        name = "the plan to use" if run.result else "fastest within the limit so far"
        traces.append(ring(name, run.best.step_ms, _shown(run.best, floor)))
    times = [m.step_ms for m in done if m.step_ms]
    if run.limit_value and any(m.drop for m in done):
        traces.append(limit_line(f"limit {run.limit}, {number(run.limit_value)} {run.unit}", times, run.limit_value))
    return Chart(
        name="front",
        title="Drop against step time",
        caption="Left is faster, down is closer to FP32; bars are 95 % intervals. The line joins the plans that no "
        "measured one beats in both. A drop of exactly 0 stands at the bottom edge. Click a point to see "
        "its plan in the grid below.",
        traces=[t for t in traces if t["x"]],
        layout={
            "height": 480,
            "xaxis": time_axis(
                f"step time, ms ({origins(m.origin.step_ms for m in done)})", [m.step_ms for m in done if m.step_ms]
            ),
            "yaxis": log_axis(
                f"drop, {run.unit} ({origins(m.origin.drop for m in done)})",
                [floor, *(m.drop for m in done if m.drop), run.limit_value or 0.0],
            ),
        },
    )


def _shown(m: Measurement, floor: float) -> float:
    return max(m.drop or 0.0, floor)


def _points(
    run: Run, found: Sequence[Measurement], place: Callable[[Measurement], int], floor: float, name: str, marker: Data
) -> Data:
    times, drops = [m.step_ms or 0.0 for m in found], [_shown(m, floor) for m in found]
    bars = {"color": "@muted-soft" if name == "trials" else marker["color"]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": harmless(name, NAME),
        "x": times,
        "y": drops,
        "error_x": interval_bars(times, [m.step_ms_ci95 for m in found]) | bars,
        "error_y": interval_bars(drops, [m.drop_ci95 for m in found], floor) | bars,
        "marker": {**marker, "line": {"width": 1.5, "color": "@ink" if marker is _OPEN else "@card"}},
        "text": [hover(m, run.unit) for m in found],
        "customdata": [place(m) for m in found],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _line(front: Sequence[Measurement], floor: float) -> Data:
    ordered = sorted(front, key=lambda m: m.step_ms or 0.0)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [m.step_ms for m in ordered],
        "y": [_shown(m, floor) for m in ordered],
        "line": {"shape": "hv", "width": 2, "color": "@accent"},
        "hoverinfo": "skip",
    }
