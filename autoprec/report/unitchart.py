"""What each unit would drop and take in each format, in the order of the model."""

from __future__ import annotations

import statistics

from autoprec.formats import Format
from autoprec.report.charts import Chart, Data, axis, harmless, interval_bars, log_axis, positive_floor
from autoprec.report.figures import origins
from autoprec.report.run import Run

__all__ = ["unit_drop_chart", "unit_time_chart"]

#: largest time over the median one from which on bars give way to points on a logarithmic axis
_SPREAD = 6.0
_MARKS = {Format.BF16: "circle", Format.FP16: "square", Format.FP8: "diamond"}


def unit_drop_chart(run: Run) -> Chart | None:
    """Return each unit's own drop in each probed format; None without a probe, or where no drop is above zero."""
    profile = run.sensitivity
    if profile is None or not any(d.drop.value > 0 for d in profile.drops):
        return None
    floor = positive_floor(d.drop.value for d in profile.drops)
    traces: list[Data] = []
    for choice in profile.formats:
        rows = [d for d in profile.drops if d.format is choice]
        values = [max(d.drop.value, floor) for d in rows]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": str(choice),
                "x": [harmless(d.unit) for d in rows],
                "y": values,
                "error_y": interval_bars(values, [(d.drop.low, d.drop.high) for d in rows], floor)
                | {"color": f"@{choice}"},
                "marker": {"size": 8, "symbol": _MARKS.get(choice, "circle"), "color": f"@{choice}"},
                "text": [harmless(d.reason) for d in rows],
                "hovertemplate": f"<b>%{{x}}</b> in {choice}<br>drop %{{y:.3g}} {profile.drop_unit}"
                "<br>%{text}<extra></extra>",
            }
        )
    return Chart(
        name="unitdrop",
        title="What each unit drops alone",
        caption="One unit in the format, all others in FP32; bars are 95 % intervals. The higher, the more it pays to "
        "keep the unit wide.",
        traces=traces,
        layout={
            "height": 400,
            "showlegend": True,
            "xaxis": _names(run),
            "yaxis": log_axis(
                f"drop, {profile.drop_unit} ({origins(d.drop.origin for d in profile.drops)})",
                [floor, *(d.drop.high for d in profile.drops)],
            ),
        },
    )


def unit_time_chart(run: Run) -> Chart | None:
    """Return what each unit takes in each format: timed alone, or predicted for a device that is not here."""
    times = _times(run)
    if not times:
        return None
    origin = "measured alone" if run.speed else "predicted"
    every = [ms for own in times.values() for ms in own.values() if ms > 0]
    spread = bool(every) and max(every) > _SPREAD * statistics.median(every)
    traces: list[Data] = [
        _marks(choice, spread)
        | {
            "name": str(choice),
            "x": [harmless(unit) for unit in own],
            "y": list(own.values()),
            "hovertemplate": f"<b>%{{x}}</b> in {choice}<br>%{{y:.3g}} ms<extra></extra>",
        }
        for choice, own in times.items()
    ]
    title = f"time, ms ({origin})"
    return Chart(
        name="unittime",
        title="What each unit takes",
        caption="Milliseconds of one step in each format. Where a low format is not below FP32, it does not pay.",
        traces=traces,
        layout={
            "height": 400,
            "barmode": "group",
            "showlegend": True,
            "xaxis": _names(run),
            "yaxis": log_axis(title, every) if spread else axis(title, rangemode="tozero"),
        },
    )


def _marks(choice: Format, spread: bool) -> Data:
    """Return bars, or points where one unit's bar would make all others too low to read."""
    if not spread:
        return {"type": "bar", "marker": {"color": f"@{choice}"}}
    marker = {"size": 8, "symbol": _MARKS.get(choice, "circle-open"), "color": f"@{choice}"}
    return {"type": "scatter", "mode": "markers", "marker": marker}


def _times(run: Run) -> dict[Format, dict[str, float]]:
    if run.speed is not None:
        known = [f for f in Format if any(row.format is f for row in run.speed.times)]
        return {f: {row.unit: row.step_ms for row in run.speed.times if row.format is f} for f in known}
    return {f: dict(own) for f, own in run.result.unit_ms.items()} if run.result else {}


def _names(run: Run) -> Data:
    """Return the axis of units: all, in the order of the model, with as many names as there is room for."""
    order = [harmless(u.name) for u in run.model.units] if run.model else None
    more: Data = {} if order is None else {"categoryorder": "array", "categoryarray": order}
    return axis("unit, in the order of the model", type="category", tickangle=-45, nticks=24, **more)
