"""The page of a search, and measurements as one-line news; printed to a `rich` Console that the caller gives.

Colours and the width are the console's business; on a pipe the same tables come out as plain text.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from autoprec.formats import Format
from autoprec.quantities import duration_text
from autoprec.records import Measurement, Origin, SearchResult
from autoprec.report.figures import (
    bytes_text,
    drop_unit,
    format_counts,
    interval,
    megabytes,
    number,
    origin_note,
    plain,
    where_from,
)
from autoprec.report.layout import Column, print_heading, print_line, print_table
from autoprec.report.plans import fact_lines, print_plan
from autoprec.report.profiles import print_device, print_units
from autoprec.report.recommended import print_recommended
from autoprec.report.sensitivity import print_sensitivity
from autoprec.report.speed import print_speed

__all__ = [
    "fact_lines",
    "measurement_line",
    "print_device",
    "print_explained",
    "print_paths",
    "print_plan",
    "print_recommended",
    "print_result",
    "print_sensitivity",
    "print_speed",
    "print_units",
]


def print_result(console: Console, result: SearchResult) -> None:
    """Print a search: reference, baselines with the reasons of those stopped, front, removals, verdict."""
    everything = (*result.baselines, *result.front)
    unit = drop_unit(everything)
    print_heading(
        console, f"Search of {result.model_id}", f"{result.mode}, on {result.device}, limit {result.max_drop}"
    )
    print_line(console, f"reference: {_reference(result.reference)}")
    done = [m for m in result.baselines if m.step_ms is not None or m.drop is not None]
    print_heading(console, "Baselines", where_from(done) if done else "")
    if done:
        print_table(console, _columns(unit)[1:], [_row("", m)[1:] for m in done])
    for stopped in result.baselines:
        if stopped.reason:
            print_line(console, f"{stopped.name}: {stopped.reason}")
    length = f"{result.trials} trials, {duration_text(result.seconds)}"
    where = f"; {where_from(result.front)}" if result.front else ""
    print_heading(console, "Front", f"no plan measured beats one of these in both drop and step ({length}){where}")
    rows = [_row(f"{'>' if i == result.chosen else ' '}{i + 1}", m) for i, m in enumerate(result.front)]
    print_table(console, _columns(unit), rows, marked=result.chosen)
    if result.chosen is not None:
        print_line(console, f"> {result.chosen + 1} is the chosen plan")
    _batches(console, result)
    _removals(console, result)
    _confirmations(console, result, unit)
    _bound(console, result, unit)
    print_heading(console, "Verdict", f"{result.verdict.decision}: {result.verdict.text}")
    if result.verdict.break_even_hours is not None:
        hours = number(result.verdict.break_even_hours)
        print_line(console, f"The search has paid for itself after {hours} hours of use.")


def _columns(unit: str) -> list[Column]:
    return [
        ("#", "left"),
        ("plan", "left"),
        (f"drop, {unit}", "right"),
        ("%", "right"),
        ("step, ms", "right"),
        ("speedup", "right"),
        ("peak, MB", "right"),
        ("units", "left"),
    ]


def _row(mark: str, m: Measurement) -> list[str]:
    return [
        mark,
        m.name,
        interval(m.drop, m.drop_ci95) + origin_note(m.origin.drop),
        "-" if m.drop_percent is None else number(m.drop_percent),
        interval(m.step_ms, m.step_ms_ci95) + origin_note(m.origin.step_ms),
        interval(m.speedup, m.speedup_ci95, suffix="x"),
        megabytes(m.peak_bytes) + origin_note(m.origin.peak_bytes),
        format_counts(m.assignment),
    ]


def _reference(m: Measurement) -> str:
    figures = [m.name]
    here = f" ({m.origin.step_ms})" if m.origin.step_ms is Origin.MEASURED else origin_note(m.origin.step_ms)
    if m.step_ms is not None:
        figures.append(f"{interval(m.step_ms, m.step_ms_ci95)} ms a step{here}")
    if m.peak_bytes is not None:
        figures.append(f"peak {megabytes(m.peak_bytes)} MB{origin_note(m.origin.peak_bytes)}")
    if m.metric is not None:
        figures.append(f"metric {number(m.metric)}{origin_note(m.origin.metric)}")
    return ", ".join(figures)


def _batches(console: Console, result: SearchResult) -> None:
    """Print which batch fits with which plan: of FP32, the best uniform plan and the chosen one."""
    chosen = None if result.chosen is None else result.front[result.chosen].name
    shown = {chosen, result.verdict.best_uniform, "uniform fp32"}
    rows = [
        [one.name, str(one.batch_size), bytes_text(one.total_bytes), number(one.tokens_per_s.value)]
        for one in result.largest_batches
        if one.name in shown
    ]
    if rows:
        print_heading(console, "Largest batch", "that fits the device's memory, predicted; time in proportion to it")
        columns: list[Column] = [("plan", "left"), ("examples", "right"), ("peak", "right"), ("tokens/s", "right")]
        print_table(console, columns, rows)


def _removals(console: Console, result: SearchResult) -> None:
    """Print what the device or the space took away, units counted by format and reason."""
    counts: dict[tuple[Format, str], list[str]] = {}
    for removal in result.removed:
        counts.setdefault((removal.format, removal.reason), []).append(removal.unit)
    for (choice, reason), units in counts.items():
        amount = units[0] if len(units) == 1 else f"{len(units)} units"
        print_line(console, f"not tried: {choice} in {amount}: {reason}")


def _bound(console: Console, result: SearchResult, unit: str) -> None:
    """Print what no plan of the space beats, as predicted."""
    if result.predicted_bound is None:
        return
    drop, step, gain = (number(result.predicted_bound[key]) for key in ("drop", "step_ms", "faster_percent"))
    print_line(
        console,
        f"bound: as predicted from all trials, no plan of the space with a drop of at most {drop} {unit} takes less "
        f"than {step} ms, which is {gain} % faster than the fastest measured",
    )


def _confirmations(console: Console, result: SearchResult, unit: str) -> None:
    """Print what came of plans on batches that the search had not used."""
    known = {m.name: m.origin.drop for m in (*result.baselines, *result.front)}
    for one in result.confirmed:
        figures, where = "", f"{known[one.name]} on " if known.get(one.name) else ""
        if one.drop is not None and one.low is not None and one.high is not None:
            figures = f", drop {number(one.drop)} {unit}, between {number(one.low)} and {number(one.high)}"
        print_line(console, f"confirmation of {one.name}: {one.answer}{figures} ({where}{one.batches} unseen batches)")
    for note in result.notes:
        print_line(console, f"note: {note}")


def print_explained(console: Console, result: SearchResult) -> None:
    """Print why each unit of the chosen plan has its format."""
    if not result.explained:
        return
    unit = drop_unit((*result.baselines, *result.front))
    print_heading(
        console,
        "Why",
        "each unit's drop and the time it adds to FP32, predicted: as learnt from the space's trials",
    )
    columns: list[Column] = [
        ("unit", "left"),
        ("format", "left"),
        (f"probed, {unit}", "right"),
        (f"drop, {unit}", "right"),
        ("share", "right"),
        ("time, ms", "right"),
        ("share", "right"),
        ("why", "left"),
    ]
    rows = [
        [
            e.unit,
            str(e.format),
            "-" if e.probed is None else number(e.probed.value),
            number(e.drop.value),
            f"{100 * e.drop_share:.1f} %",
            number(e.time_ms.value),
            f"{100 * e.time_share:.1f} %",
            e.reason,
        ]
        for e in result.explained
    ]
    print_table(console, columns, rows)


def print_paths(console: Console, paths: Mapping[str, str]) -> None:
    """Print where things were written, a path a line and never folded, so that it can be copied."""
    width = max((len(name) for name in paths), default=0)
    for name, path in paths.items():
        console.print(Text(f"{name:<{width}}  {plain(path)}"), soft_wrap=True)


def measurement_line(m: Measurement) -> str:
    """Return one measurement as one line, for news while a search runs."""
    figures = []
    if m.drop is not None:
        percent = "" if m.drop_percent is None else f" ({number(m.drop_percent)} %)"
        figures.append(f"drop {interval(m.drop, m.drop_ci95)}{percent}{origin_note(m.origin.drop)}")
    if m.step_ms is not None:
        figures.append(f"{interval(m.step_ms, m.step_ms_ci95)} ms a step{origin_note(m.origin.step_ms)}")
    if m.speedup is not None:
        figures.append(interval(m.speedup, m.speedup_ci95, suffix="x"))
    if m.peak_bytes is not None:
        figures.append(f"peak {megabytes(m.peak_bytes)} MB{origin_note(m.origin.peak_bytes)}")
    if m.reason:
        figures.append(m.reason)
    return plain(f"{m.name}: {', '.join(figures) or 'no figure'}")
