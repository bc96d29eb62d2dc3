"""What holds the memory of a step under FP32, the best uniform plan and the chosen one."""

from __future__ import annotations

from dataclasses import fields

from autoprec.records import Measurement, MemoryParts, Origin
from autoprec.report.charts import NAME, Chart, Data, axis, harmless
from autoprec.report.figures import bytes_text, origins
from autoprec.report.run import Run

__all__ = ["memory_chart"]

_BIG = 1e9  #: bytes from which on GB are easier to read than MB


def memory_chart(run: Run) -> Chart | None:
    """Return predicted parts as bars with the peaks beside them; of runs without a prediction the peaks alone."""
    parts = dict(run.result.memory) if run.result else {}
    peaks = {m.name: m for m in _shown(run) if m.peak_bytes}
    names = list(parts) or list(peaks)
    if not names:
        return None
    most = max([b.total_bytes for b in parts.values()] + [m.peak_bytes or 0 for m in peaks.values()])
    size, unit = (1e9, "GB") if most >= _BIG else (1e6, "MB")
    labels = {name: harmless(name, NAME) for name in names}
    origin = origins([*([Origin.PREDICTED] if parts else []), *(m.origin.peak_bytes for m in peaks.values())])
    traces: list[Data] = []
    for index, field in enumerate(fields(MemoryParts)):
        held = {n: getattr(b.parts, field.name) for n, b in parts.items()}
        if any(held.values()):
            name = field.name.removesuffix("_bytes")
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "y": [labels[n] for n in held],
                    "x": [value / size for value in held.values()],
                    "text": [bytes_text(value) for value in held.values()],
                    "textposition": "none",
                    "marker": {"color": f"@series{index % 7}"},
                    "hovertemplate": f"<b>%{{y}}</b><br>{name}: %{{text}} (predicted)<extra></extra>",
                }
            )
    traces += _peaks(peaks, labels, size, bool(parts))
    return Chart(
        name="memory",
        title="Memory",
        caption=_caption(run, bool(parts), peaks),
        traces=traces,
        layout={
            "height": 150 + 52 * len(names),
            "barmode": "stack",
            "xaxis": axis(f"peak, {unit} ({origin})", rangemode="tozero"),
            "yaxis": axis("", type="category", autorange="reversed"),
        },
    )


def _shown(run: Run) -> list[Measurement]:
    named = {"uniform fp32", run.best.name if run.best else None}
    named.add(run.result.verdict.best_uniform if run.result else None)
    return [m for m in run.measured if m.name in named]


def _peaks(peaks: dict[str, Measurement], labels: dict[str, str], size: float, beside: bool) -> list[Data]:
    shown = {n: m for n, m in peaks.items() if n in labels and (not beside or m.origin.peak_bytes is Origin.MEASURED)}
    if not shown:
        return []
    origin = next(iter(shown.values())).origin.peak_bytes or "origin not recorded"
    data: Data = {
        "name": f"peak ({origin})",
        "y": [labels[n] for n in shown],
        "x": [(m.peak_bytes or 0) / size for m in shown.values()],
        "text": [bytes_text(m.peak_bytes or 0) for m in shown.values()],
        "hovertemplate": f"<b>%{{y}}</b><br>peak %{{text}} ({origin})<extra></extra>",
    }
    if not beside:
        return [data | {"type": "bar", "orientation": "h", "textposition": "none", "marker": {"color": "@accent"}}]
    marker = {"symbol": "line-ns", "size": 22, "color": "@ink", "line": {"width": 3, "color": "@ink"}}
    return [data | {"type": "scatter", "mode": "markers", "marker": marker}]


def _caption(run: Run, predicted: bool, peaks: dict[str, Measurement]) -> str:
    text = "What holds the memory at the peak of a step, predicted. " if predicted else "The peak of a step. "
    here = any(m.origin.peak_bytes is Origin.MEASURED for m in peaks.values())
    if here and run.device is not None and run.device.kind == "cpu":
        text += (
            "On a CPU the measured peak is the whole process's, so it holds Python, its libraries and the batches too."
        )
    return text.strip()
