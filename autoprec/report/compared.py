"""The page of a comparison: figures in rows, plans in columns, as many side by side as the page is wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from autoprec.records import ComparedPlan, Figure, PlanComparison
from autoprec.report.comparedhead import answer_of
from autoprec.report.figures import bytes_text, figure_text, format_counts, interval, origin_note
from autoprec.report.layout import INDENT, Column, print_heading, print_line, print_table

__all__ = ["Row", "figure_rows", "print_comparison", "target_titles", "trained_rows"]

#: characters of a column of titles, and of one of figures with their intervals
_TITLE, _CELL = 24, 19
#: what stands for the origin of a figure that has none beside it
_MEASURED = "measured where nothing else is said"

#: title of a row, and what it says of a plan
Row = tuple[str, Callable[[ComparedPlan], str]]


def print_comparison(console: Console, found: PlanComparison) -> None:
    """Print plans side by side: figures with intervals and origins, training over seeds, targets, what is not known."""
    size = "" if found.batches is None else f", {found.batches} batches"
    print_heading(console, f"Plans for {found.model_id}", f"{found.mode}, on {found.device}{size}; {_MEASURED}")
    wide = max(1, (console.width - INDENT - _TITLE) // (_CELL + 2))
    rows = [found.reference, *found.plans]
    for start in range(0, len(rows), wide):
        _print_rows(console, rows[start : start + wide], figure_rows(found))
    if found.training is not None:
        one = found.training
        words = ", ".join((f"{one.steps} steps", f"{one.seeds} seeds", *one.notes)) + f"; {_MEASURED}"
        print_heading(console, "Trained beside FP32", words)
        shown = [row for row in rows if row.trained is not None]
        for start in range(0, len(shown), wide):
            _print_rows(console, shown[start : start + wide], trained_rows(found))
    titles = target_titles(found)
    if titles:
        print_heading(console, "Targets", "met: with the whole interval; open: the interval holds the target")
        for start in range(0, len(found.plans), wide):
            part = found.plans[start : start + wide]
            columns: list[Column] = [("", "left"), *((row.name, "right") for row in part)]
            cells = [[title, *(str(row.targets[i].outcome) for row in part)] for i, title in enumerate(titles)]
            print_table(console, columns, cells)
    for row in rows:
        for reason in row.reasons:
            print_line(console, f"{row.name}: {reason}")
    for note in found.notes:
        print_line(console, f"note: {note}")
    print_heading(console, "Verdict", answer_of(found).text)


def _print_rows(console: Console, plans: Sequence[ComparedPlan], rows: Sequence[Row]) -> None:
    columns: list[Column] = [("", "left"), *((plan.name, "right") for plan in plans)]
    cells = [[title, *(say(plan) for plan in plans)] for title, say in rows]
    print_table(console, columns, [row for row in cells if any(cell not in ("", "-") for cell in row[1:])])


def figure_rows(found: PlanComparison) -> list[Row]:
    """Return the figures of a plan: a title, and what is said of it."""
    metric = found.metric or "metric"
    return [
        ("units", lambda plan: format_counts(plan.measurement.assignment) if plan.measurement else "-"),
        ("speedup", lambda plan: _text(plan.speedup)),
        ("step, ms", lambda plan: _text(plan.step_ms, bare=True)),
        ("memory, peak", lambda plan: _bytes(plan.peak_bytes)),
        ("memory saved", lambda plan: _text(plan.memory_saved)),
        ("drop", lambda plan: _text(plan.drop)),
        (metric, lambda plan: _text(plan.task_metric)),
        (f"{metric}, less fp32's", lambda plan: _text(plan.task_metric_change)),
        ("low-precision share", lambda plan: _text(plan.low_share)),
    ]


def trained_rows(found: PlanComparison) -> list[Row]:
    """Return what training under a plan came to: a title, and what is said of it."""
    metric = (found.training.metric if found.training else None) or "metric"
    return [
        (f"{metric}, held out", lambda plan: _text(plan.trained.metric) if plan.trained else "-"),
        (f"{metric}, less fp32's", lambda plan: _text(plan.trained.metric_change) if plan.trained else "-"),
        ("loss, held out", lambda plan: _text(plan.trained.loss) if plan.trained else "-"),
        ("loss, less fp32's", lambda plan: _text(plan.trained.loss_change) if plan.trained else "-"),
        ("runs that failed", _failed),
        ("verdict", lambda plan: str(plan.trained.verdict or "-") if plan.trained else "-"),
    ]


def _failed(plan: ComparedPlan) -> str:
    if plan.trained is None:
        return "-"
    _, high = plan.trained.failed_share.ci95 or (0.0, 100.0)
    return f"{plan.trained.failed} of {plan.trained.runs} (at most {high:.0f} %)"


def _bytes(figure: Figure | None) -> str:
    return "-" if figure is None else bytes_text(figure.value) + origin_note(figure.origin)


def _text(figure: Figure | None, *, bare: bool = False) -> str:
    """Return a figure with its interval and origin; `bare` where the title has its unit."""
    if figure is None:
        return "-"
    said = interval(figure.value, figure.ci95) if bare else figure_text(figure)
    return said + origin_note(figure.origin)


def target_titles(found: PlanComparison) -> list[str]:
    """Return what plans are held to: 'speedup over 2 x'."""
    targets = found.plans[0].targets if found.plans else ()
    return [f"{t.name} {'under' if t.name == 'drop' else 'over'} {t.limit:g} {t.unit}" for t in targets]
