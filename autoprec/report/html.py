"""Pages that are one HTML file and need nothing else, in the reader's light or dark; first of them a run's report.

That is made from what the run folder holds, so it works for runs that are old, unfinished or resumed, and for devices
that are not here. Plotly's script stands in a page once; its policy lets it fetch nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autoprec import __version__
from autoprec.files import write_atomic
from autoprec.formats import Format
from autoprec.quantities import duration_text
from autoprec.records import Measurement
from autoprec.report.charts import Chart
from autoprec.report.coursechart import convergence_chart, drop_fit_chart, time_fit_chart
from autoprec.report.figures import plain
from autoprec.report.frontchart import front_chart
from autoprec.report.grid import Grid, grid_of_run
from autoprec.report.headline import headline
from autoprec.report.memorychart import memory_chart
from autoprec.report.run import Run
from autoprec.report.tables import (
    Fact,
    baseline_notes,
    batches,
    facts,
    front_table,
    origin_table,
    reasons,
    unmade,
)
from autoprec.report.templates import asset, fill
from autoprec.report.trainingchart import training_charts
from autoprec.report.unitchart import unit_drop_chart, unit_time_chart

__all__ = ["run_page", "whole_page", "write_report"]


def write_report(path: Path, run: Run) -> None:
    """Write the report of a run, atomically.

    Raises:
        AutoprecError: the file cannot be written.
    """
    write_atomic(path, run_page(run))


def run_page(run: Run) -> str:
    """Return the report of a run as HTML, about 5 MB, nearly all of it plotly's script.

    Not promised: that figures of runs that are still going agree among themselves; each is the newest there was.
    """
    grid, plans = grid_of_run(run), _plans(run)
    places = {m.name: index for index, m in enumerate(plans)}
    charts: dict[str, Any] = {
        "front_chart": front_chart(run, lambda m: places[m.name]),
        "unit_charts": _made(unit_drop_chart(run), unit_time_chart(run)),
        "course_charts": _made(convergence_chart(run)),
        "fit_charts": _made(drop_fit_chart(run), time_fit_chart(run)),
        "memory_chart": memory_chart(run),
        "training_charts": list(training_charts(run.result.trained if run.result else (), run.numerics)),
    }
    return whole_page(
        "report.html.j2",
        [c for one in charts.values() for c in (one if isinstance(one, list) else [one]) if c is not None],
        grid=grid,
        plans=plans,
        title=_model(run),
        subtitle=_subtitle(run),
        head=headline(run),
        shown=places.get(run.best.name if run.best else "uniform fp32"),
        source=f"run folder {run.name}",
        **charts,
        **_tables(run),
    )


def whole_page(
    template: str,
    charts: Iterable[Chart],
    *,
    title: str,
    source: str,
    grid: Grid | None = None,
    plans: Sequence[Measurement] = (),
    **values: Any,
) -> str:
    """Return a page that extends `frame.html.j2`, with its charts' data, its look and the scripts that draw it.

    Args:
        source: what it was made from, for the footer.
        plans: what the grid can show.
    """
    return fill(
        template,
        version=__version__,
        title=plain(title),
        grid=grid,
        plans=plans,
        data=_data(charts, grid, plans),
        style=asset("style.css"),
        frame=asset("page.css"),
        script=asset("page.js"),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 the library's own file
        footer=f"Written by autoprec {__version__} on {datetime.date.today().isoformat()} from {source}.",
        **values,
    )


def _tables(run: Run) -> dict[str, Any]:
    result = run.result
    stopped = baseline_notes(run.baselines)
    done = [m for m in run.baselines if m.drop is not None or m.step_ms is not None]
    return {
        "front_table": front_table(run.front, run.unit, run.chosen) if run.front else None,
        "baseline_table": front_table(done, run.unit, None) if done else None,
        "baseline_notes": stopped,
        "reasons": reasons(result) if result else None,
        "batches": batches(result) if result else None,
        "outcomes": unmade(result) if result else [],
        "setting": facts(run),
        "origins": origin_table(run),
        "faults": [Fact("left out", fault) for fault in run.faults],
    }


def _made(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _plans(run: Run) -> list[Measurement]:
    """Return the plans that the grid can show, in the order they were measured."""
    found = {m.name: m for m in (*run.measured, *run.front) if m.assignment}
    return list(found.values())


def _data(charts: Iterable[Chart], grid: Grid | None, plans: Iterable[Measurement]) -> Markup:
    """Return what the page's script reads, as JSON that cannot end its element."""
    cells = grid.cells if grid else []
    return Markup(
        fill(
            "data.json.j2",
            data={
                "charts": [{"name": c.name, "traces": list(c.traces), "layout": c.layout} for c in charts],
                "formats": [str(f) for f in Format],
                "plans": [{"name": m.name, "formats": [m.assignment.get(c.unit) for c in cells]} for m in plans],
                "units": [{"name": c.unit, "lines": list(c.lines)} for c in cells],
            },
        )
    )


def _model(run: Run) -> str:
    if run.result is not None:
        return run.result.model_id
    return run.model.model_id if run.model else run.name


def _subtitle(run: Run) -> str:
    result, device = run.result, run.device
    parts = [str(result.mode)] if result else []
    if device is not None:
        parts.append(f"on {device.name}" + ("" if str(device.origin) == "measured" else ", which was not here"))
    parts += [f"limit {run.limit}"] if run.limit else []
    trials = sum(row.trial is not None for row in run.rows)
    parts.append(f"{trials} trials" + (f" in {duration_text(result.seconds)}" if result else " so far"))
    return " · ".join(parts)
