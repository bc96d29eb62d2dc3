"""What charts are made of: plotly's traces and layouts as plain data, with colours by role and names made harmless.

A colour is a token such as `@bf16`, which the page turns into that of its theme, light or dark. Nothing here imports
plotly: its JSON form is its documented interface (https://plotly.com/javascript/reference/).
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoprec.records import Measurement
from autoprec.report.figures import bytes_text, interval, number, origin_note, plain
from autoprec.report.grouping import runs

__all__ = [
    "NAME",
    "Chart",
    "Data",
    "axis",
    "harmless",
    "hover",
    "interval_bars",
    "limit_line",
    "log_axis",
    "positive_floor",
    "ring",
    "time_axis",
]

Data = dict[str, Any]

_SPREAD = 2.5  #: largest time over smallest from which on an axis is logarithmic
_FEW_POWERS = 100.0  #: largest value over smallest up to which powers of ten alone are too few ticks
NAME = 26  #: letters of a name in a legend or beside a bar
_LINES = 9  #: of a plan's units, in what is shown when the pointer rests on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart: its name in the page, what it shows in a sentence, and plotly's data and layout."""

    name: str
    title: str
    caption: str
    traces: Sequence[Data]
    layout: Data


def harmless(text: str, most: int | None = None) -> str:
    """Return a name as text for plotly, which reads tags and entities in all its texts; cut to `most` letters."""
    text = plain(text)
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    return html.escape(text, quote=False)


def axis(title: str, **more: Any) -> Data:
    """Return an axis with a title, which names the unit."""
    return {"title": {"text": title}, "automargin": True, **more}


def log_axis(title: str, values: Iterable[float]) -> Data:
    """Return a logarithmic axis with a tick at each power of ten, and between them where there are few."""
    above = [v for v in values if v > 0]
    few = not above or max(above) < _FEW_POWERS * min(above)
    return axis(title, type="log", exponentformat="power", dtick="D2" if few else 1)


def time_axis(title: str, times: Sequence[float]) -> Data:
    """Return an axis of times, logarithmic where a few slow plans would squeeze all others together."""
    if times and max(times) > _SPREAD * min(times) > 0:
        # plotly's own ticks between powers of ten are single digits, without their power
        powers = range(math.floor(math.log10(min(times))) - 1, math.ceil(math.log10(max(times))) + 1)
        digits = (1, 2, 5) if max(times) > 2 * _SPREAD * min(times) else (1, 1.5, 2, 3, 5, 7)
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        return axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return axis(title)


def positive_floor(values: Iterable[float]) -> float:
    """Return where zeros stand on a logarithmic axis: a third of the smallest value above zero."""
    above = [v for v in values if v > 0]
    return min(above) / 3 if above else 1e-9


def interval_bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None], floor: float = 0.0) -> Data:
    """Return the error bars of 95 % intervals, cut off below at `floor`."""
    pairs = list(zip(values, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, ci[1] - v) if ci else 0.0 for v, ci in pairs],
        "arrayminus": [max(0.0, v - max(ci[0], floor)) if ci else 0.0 for v, ci in pairs],
        "thickness": 1,
        "width": 0,
    }


def limit_line(name: str, times: Sequence[float], limit: float) -> Data:
    """Return the largest drop allowed as a dashed line over the times shown; named in the legend."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [min(times), max(times)],
        "y": [limit] * 2,
        "line": {"dash": "dash", "width": 1.5, "color": "@bad"},
        "hoverinfo": "skip",
    }


def ring(name: str, x: float | None, y: float) -> Data:
    """Return a ring around the plan that a chart singles out."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x],
        "y": [y],
        "marker": {"symbol": "circle-open", "size": 22, "color": "@good", "line": {"width": 3, "color": "@good"}},
        "hoverinfo": "skip",
    }


def hover(m: Measurement, unit: str) -> str:
    """Return what is shown when the pointer rests on a plan: its figures, and the formats of its units."""
    lines = [f"<b>{harmless(m.name)}</b>"]
    if m.drop is not None:
        percent = "" if m.drop_percent is None else f" ({number(m.drop_percent)} %)"
        lines.append(f"drop {interval(m.drop, m.drop_ci95)} {unit}{percent}{origin_note(m.origin.drop)}")
    if m.step_ms is not None:
        lines.append(f"step {interval(m.step_ms, m.step_ms_ci95)} ms{origin_note(m.origin.step_ms)}")
    if m.speedup is not None:
        lines.append(f"{interval(m.speedup, m.speedup_ci95)} times as fast as FP32")
    if m.peak_bytes is not None:
        lines.append(f"peak {bytes_text(m.peak_bytes)}{origin_note(m.origin.peak_bytes)}")
    groups = runs(m.assignment.items(), lambda pair: pair[0], lambda pair: pair[1])
    shown = [f"{harmless(run.name)}: {run.items[0][1]}" for run in groups]
    if len(shown) > _LINES:
        shown = [*shown[: _LINES - 1], f"and {len(shown) - _LINES + 1} groups more"]
    lines += shown
    return "<br>".join(lines)
