"""Charts of a comparison: drop against step time, and what training came to with each seed."""

from __future__ import annotations

from collections.abc import Sequence

from autoprec.records import ComparedPlan, PlanComparison
from autoprec.report.charts import (
    NAME,
    Chart,
    Data,
    axis,
    harmless,
    interval_bars,
    limit_line,
    log_axis,
    positive_floor,
    ring,
    time_axis,
)
from autoprec.report.comparedhead import drop_target, fastest_kept
from autoprec.report.figures import figure_text, format_counts, number, origins

__all__ = ["plans_chart", "seeds_chart"]

_SYMBOLS = ("square", "diamond", "triangle-up", "pentagon", "hexagon", "cross", "triangle-left")
_COLOURS = 7  #: of the theme
#: letters of a name beside an axis, where a telephone has 390 pixels for all
_SHORT = 16


def plans_chart(found: PlanComparison) -> Chart | None:
    """Return drop against step time, a point a plan; None where none has both."""
    rows = [row for row in (found.reference, *found.plans) if row.drop is not None and row.step_ms is not None]
    if not rows:
        return None
    drops = [row.drop.value for row in rows if row.drop is not None]
    times = [row.step_ms.value for row in rows if row.step_ms is not None]
    floor, target = positive_floor(drops), drop_target(found)
    traces = [_point(row, index, floor) for index, row in enumerate(rows)]
    best = fastest_kept(found)
    if best is not None and best.drop is not None and best.step_ms is not None:
        traces.append(ring("fastest within the limit", best.step_ms.value, max(best.drop.value, floor)))
    if target is not None:
        traces.append(limit_line(f"limit {target.limit:g} {target.unit}", times, target.limit))
    return Chart(
        name="plans",
        title="Drop against step time",
        caption="Left is faster, down is closer to FP32; bars are 95 % intervals. Each plan was timed beside FP32, not "
        "beside the others. A drop of exactly 0 stands at the bottom edge.",
        traces=traces,
        layout={
            "height": 440,
            "xaxis": time_axis(f"step time, ms ({origins(r.step_ms.origin for r in rows if r.step_ms)})", times),
            "yaxis": log_axis(
                f"drop, % of FP32's loss ({origins(r.drop.origin for r in rows if r.drop)})",
                [floor, *drops, *([target.limit] if target else [])],
            ),
        },
    )


def _colour(index: int) -> str:
    """Return a plan's colour; that of its loss, where all were trained."""
    return "@ink" if index == 0 else f"@series{index % _COLOURS}"


def _point(row: ComparedPlan, index: int, floor: float) -> Data:
    assert row.drop is not None and row.step_ms is not None
    drop, colour = max(row.drop.value, floor), _colour(index)
    symbol = "circle" if index == 0 else _SYMBOLS[(index - 1) % len(_SYMBOLS)]
    marker = {"symbol": symbol, "size": 11, "color": colour, "line": {"width": 1.5, "color": "@card"}}
    bars = {"color": colour}
    return _marks(row.name, [row.step_ms.value], [drop], marker) | {
        "error_x": interval_bars([row.step_ms.value], [row.step_ms.ci95]) | bars,
        "error_y": interval_bars([drop], [row.drop.ci95], floor) | bars,
        "text": [_hover(row)],
        "hoverinfo": "text",
    }


def _hover(row: ComparedPlan) -> str:
    """Return what is shown when the pointer rests on a plan."""
    lines = [f"<b>{harmless(row.name)}</b>"]
    figures = {"drop": row.drop, "step": row.step_ms, "as fast as FP32": row.speedup, "memory saved": row.memory_saved}
    lines += [f"{name}: {figure_text(figure)} ({figure.origin})" for name, figure in figures.items() if figure]
    lines += [format_counts(row.measurement.assignment)] if row.measurement else []
    return "<br>".join(lines)


def _marks(name: str, x: Sequence[float], y: Sequence[float], marker: Data) -> Data:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": harmless(name, NAME),
        "x": list(x),
        "y": list(y),
        "marker": marker,
        "hoverinfo": "skip",
    }


def seeds_chart(found: PlanComparison) -> Chart | None:
    """Return the held-out loss of every seed's run, a row a plan, with mean and interval; None without training."""
    if found.training is None:
        return None
    rows = [row for row in (found.reference, *found.plans) if row.trained is not None and row.trained.loss is not None]
    if not rows:
        return None
    traces = []
    for index, row in enumerate(rows):
        assert row.trained is not None and row.trained.loss is not None
        mean, colour, place = row.trained.loss, _colour(index), len(rows) - index
        ends = [c for c in found.training.curves if c.name == row.name and c.final_loss is not None]
        dots = _marks(row.name, [c.final_loss or 0.0 for c in ends], [place] * len(ends), {"size": 7, "color": colour})
        dots |= {"opacity": 0.55, "showlegend": False, "hoverinfo": "text"}
        dots["text"] = [f"{harmless(row.name)}, seed {c.seed}: {number(c.final_loss or 0.0, 5)}" for c in ends]
        middle = _marks(row.name, [mean.value], [place], {"symbol": "line-ns", "size": 20, "color": colour})
        middle["marker"]["line"] = {"width": 3, "color": colour}
        middle["error_x"] = interval_bars([mean.value], [mean.ci95]) | {"color": colour, "thickness": 2}
        middle |= {"text": [f"{harmless(row.name)}: mean {figure_text(mean)} ({mean.origin})"], "hoverinfo": "text"}
        traces += [dots, middle]
    setting = f"{found.training.steps} steps, {found.training.seeds} seeds"
    known = origins(row.trained.loss.origin for row in rows if row.trained and row.trained.loss)
    return Chart(
        name="seeds",
        title="Trained: held-out loss of each seed",
        caption=f"{setting}. Each dot is a run, the stroke their mean, the bar its 95 % interval; a run whose loss was "
        "not finite has no dot. FP32's dots show what seeds alone do.",
        traces=[trace for trace in traces if trace["x"]],
        layout={
            "height": 140 + 46 * len(rows),
            "xaxis": axis(f"held-out loss ({known})"),
            "yaxis": axis(
                "",
                tickvals=[len(rows) - index for index in range(len(rows))],
                ticktext=[harmless(row.name, _SHORT) for row in rows],
                range=[0.4, len(rows) + 0.6],
            ),
        },
    )
