"""Training beside FP32: the loss of each step, mean and range over seeds, and its gap to FP32's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from autoprec.records import TrainingConfirmation, TrainingCurve
from autoprec.report.charts import NAME, Chart, Data, axis, harmless

__all__ = ["training_charts"]

_REFERENCE = "fp32"


def training_charts(trained: Sequence[TrainingConfirmation], origin: str) -> Iterator[Chart]:
    """Yield two charts for each confirmation: losses by step, and each plan's loss less FP32's of the same seed.

    Args:
        origin: of all losses, as it stands on an axis.
    """
    for number, one in enumerate(trained):
        curves: dict[str, list[TrainingCurve]] = {}
        for curve in one.curves:
            if curve.losses:
                curves.setdefault(curve.name, []).append(curve)
        if not curves:
            continue
        steps = f"{one.steps} steps, {one.seeds} seeds, learning rate {one.learning_rate:g}"
        traces = [
            trace
            for index, (name, own) in enumerate(curves.items())
            for trace in _band(name, [c.losses for c in own], index)
        ]
        yield Chart(
            name=f"training{number}",
            title="Training: loss of each step",
            caption=f"{steps}. Lines are means over seeds, bands reach from the lowest seed to the highest.",
            traces=traces,
            layout={"height": 380, "xaxis": axis("optimizer step"), "yaxis": axis(f"training loss ({origin})")},
        )
        gaps = [trace for i, (n, own) in enumerate(curves.items()) for trace in _gap(n, own, curves, i)]
        if gaps:
            yield Chart(
                name=f"gap{number}",
                title="Training: gap to FP32",
                caption="The plan's loss less FP32's at the same step and seed: what the formats alone change.",
                traces=gaps,
                layout={"height": 380, "xaxis": axis("optimizer step"), "yaxis": axis(f"loss less FP32's ({origin})")},
            )


def _gap(name: str, own: Sequence[TrainingCurve], curves: dict[str, list[TrainingCurve]], index: int) -> list[Data]:
    if name == _REFERENCE:
        return []
    reference = {c.seed: c.losses for c in curves.get(_REFERENCE, [])}
    pairs = [(c.losses, reference[c.seed]) for c in own if c.seed in reference]
    rows = [tuple(a - b for a, b in zip(plan, fp32, strict=False)) for plan, fp32 in pairs]
    return _band(name, rows, index) if rows else []


def _band(name: str, rows: Sequence[Sequence[float]], index: int) -> list[Data]:
    length = min(len(row) for row in rows)  # a run that failed ends early
    steps = list(range(1, length + 1))
    columns = list(zip(*(row[:length] for row in rows), strict=True))
    color = "ink" if name == _REFERENCE else f"series{index % 7}"
    edge = {"type": "scatter", "mode": "lines", "x": steps, "hoverinfo": "skip", "showlegend": False}
    low = {**edge, "y": [min(c) for c in columns], "line": {"width": 0, "color": f"@{color}"}}
    high = {**low, "y": [max(c) for c in columns], "fill": "tonexty", "fillcolor": f"@{color}-soft"}
    mean = {
        "type": "scatter",
        "mode": "lines",
        "name": harmless(name, NAME),
        "x": steps,
        "y": [statistics.fmean(c) for c in columns],
        "line": {"width": 2, "color": f"@{color}"},
        "hovertemplate": f"{harmless(name)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
    }
    return [low, high, mean]
