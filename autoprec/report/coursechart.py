"""How the search went: the fastest plan so far beside the bound, and what was predicted beside what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from autoprec.records import Measurement
from autoprec.report.charts import Chart, Data, axis, harmless, log_axis, time_axis
from autoprec.report.figures import number, origin_note, origins
from autoprec.report.run import Run

__all__ = ["convergence_chart", "drop_fit_chart", "time_fit_chart"]


def convergence_chart(run: Run) -> Chart | None:
    """Return the fastest step within the limit after each measurement; None where limit or times are unknown."""
    timed = [(n, m) for n, m in enumerate(run.measured, start=1) if m.step_ms is not None and m.drop is not None]
    within = [(n, m) for n, m in timed if run.is_within(m)]
    if run.limit is None or not within:
        return None
    best = list(itertools.accumulate((m.step_ms or 0.0 for _, m in within), min))
    last = len(run.measured)
    traces: list[Data] = [
        _dots([x for x in timed if x not in within], "over the limit", "@bad", "circle-open"),
        _dots(within, f"within {run.limit}", "@muted", "circle"),
        {
            "type": "scatter",
            "mode": "lines",
            "name": "fastest within the limit so far",
            "x": [*(n for n, _ in within), last],
            "y": [*best, best[-1]],
            "line": {"shape": "hv", "width": 2.5, "color": "@accent"},
            "hovertemplate": "after %{x} measurements: %{y:.4g} ms<extra></extra>",
        },
    ]
    bound = run.result.predicted_bound if run.result else None
    if bound:
        traces.append(
            _level(bound["step_ms"], last, f"bound {number(bound['step_ms'])} ms (predicted)", "@good", "dash")
        )
    if run.reference and run.reference.step_ms:
        step = run.reference.step_ms
        note = origin_note(run.reference.origin.step_ms)
        traces.append(_level(step, last, f"FP32 reference {number(step)} ms{note}", "@ink", "dot"))
    return Chart(
        name="convergence",
        title="Convergence",
        caption=_bound_text(run, bound),
        traces=[t for t in traces if t["x"]],
        layout={
            "height": 380,
            "xaxis": axis("measurements, in order (baselines first)", rangemode="tozero"),
            "yaxis": time_axis(
                f"step time, ms ({origins(m.origin.step_ms for _, m in timed)})",
                [m.step_ms for _, m in timed if m.step_ms],
            ),
        },
    )


def _bound_text(run: Run, bound: object) -> str:
    if not bound or run.result is None or run.result.predicted_bound is None:
        return "The fastest plan within the limit after each measurement; no bound is predicted until trials were made."
    gain = number(run.result.predicted_bound["faster_percent"], 2)
    return (
        "The fastest plan within the limit after each measurement. The bound is what no plan of the space within the "
        f"limit beats, as predicted from all trials: {gain} % faster than the fastest measured."
    )


def _dots(found: Sequence[tuple[int, Measurement]], name: str, color: str, symbol: str) -> Data:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [n for n, _ in found],
        "y": [m.step_ms for _, m in found],
        "text": [harmless(m.name) for _, m in found],
        "marker": {"size": 7, "color": color, "symbol": symbol},
        "hovertemplate": "%{text}: %{y:.4g} ms<extra></extra>",
    }


def _level(value: float, last: int, name: str, color: str, dash: str) -> Data:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [1, last],
        "y": [value, value],
        "line": {"width": 1.5, "dash": dash, "color": color},
        "hoverinfo": "skip",
    }


def drop_fit_chart(run: Run) -> Chart | None:
    """Return probed drops, summed over units, beside whole plans'; None where no plan has both above zero."""
    pairs = [(run.predicted_drop(m.assignment), m) for m in run.measured if m.drop]
    known = [(p, m.drop, m.name) for p, m in pairs if p and m.drop]
    if not known:
        return None
    origin = origins(m.origin.drop for p, m in pairs if p)
    return _fit(
        "dropfit",
        "Drop: predicted against measured",
        "Before any trial: the sum of each unit's own drop. On the dashed line a plan drops as its units do; "
        "one that also stores weights or stream narrower drops more.",
        known,
        log_axis(f"sum of units' drops, {run.unit} (predicted)", [p for p, _, _ in known]),
        log_axis(f"drop of the plan, {run.unit} ({origin})", [m for _, m, _ in known]),
    )


def time_fit_chart(run: Run) -> Chart | None:
    """Return step times predicted from the units' beside measured ones; None where units were not timed."""
    reference = run.reference.step_ms if run.reference else None
    if run.speed is None or not reference:
        return None
    clock = reference / run.speed.reference_ms.value  # the machine's pace may have changed since the probe
    known = [
        (run.speed.step_ms(m.assignment).value * clock, m.step_ms, m.name)
        for m in run.measured
        if m.step_ms is not None and m.assignment
    ]
    if not known:
        return None
    return _fit(
        "timefit",
        "Step time: predicted against measured",
        "Before any trial: from units timed alone, on the reference's clock. On the dashed line both are the same.",
        known,
        axis("predicted from units, ms"),
        axis(f"step time of the plan, ms ({origins(m.origin.step_ms for m in run.measured)})"),
    )


def _fit(
    name: str, title: str, caption: str, known: Sequence[tuple[float, float, str]], xaxis: Data, yaxis: Data
) -> Chart:
    ends = [f(v for p, m, _ in known for v in (p, m)) for f in (min, max)]
    wide = 1.3 if xaxis.get("type") == "log" else 1.02
    ends = [ends[0] / wide, ends[1] * wide]
    traces: list[Data] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "the same",
            "x": ends,
            "y": ends,
            "line": {"dash": "dash", "width": 1.5, "color": "@ink"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "plans",
            "x": [p for p, _, _ in known],
            "y": [m for _, m, _ in known],
            "text": [harmless(n) for _, _, n in known],
            "marker": {"size": 8, "color": "@accent", "opacity": 0.8},
            "hovertemplate": "<b>%{text}</b><br>predicted %{x:.3g}<br>measured %{y:.3g}<extra></extra>",
        },
    ]
    return Chart(
        name=name,
        title=title,
        caption=caption,
        traces=traces,
        layout={"height": 380, "xaxis": xaxis, "yaxis": yaxis},
    )
