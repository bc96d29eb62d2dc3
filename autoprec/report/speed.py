"""The page of what each unit takes in each format: equal blocks on one line, and why a format does not pay."""

from __future__ import annotations

from rich.console import Console

from autoprec.formats import Format
from autoprec.quantities import duration_text
from autoprec.records import SpeedProfile, UnitTime
from autoprec.report.figures import interval, number
from autoprec.report.grouping import runs
from autoprec.report.layout import Column, print_heading, print_line, print_table

__all__ = ["print_speed"]


def print_speed(console: Console, profile: SpeedProfile) -> None:
    """Print units with their milliseconds in FP32 and the time in other formats over it, then what does not pay."""
    reference = profile.reference_ms
    step = interval(reference.value, (reference.low, reference.high))
    print_heading(
        console,
        f"Times of {profile.model_id}",
        f"{profile.mode}, {profile.tokens} tokens a step, {step} ms in fp32, {duration_text(profile.seconds)}; "
        f"each unit timed alone; {reference.origin}",
    )
    times = {(row.unit, row.format): row for row in profile.times}
    units = [row for row in profile.times if row.format is Format.FP32]
    rows = []
    for run in runs(units, lambda row: row.unit, lambda row: row.shape):
        first, count = run.items[0], len(run.items)
        each = number(first.step_ms)
        share = sum(item.step_ms for item in run.items) / reference.value
        amount = each if count == 1 else f"{count} x {each}"
        ratios = (_ratio(times.get((first.unit, choice))) for choice in profile.formats)
        rows.append([run.name, amount, f"{100 * share:.0f} %", *ratios])
    columns: list[Column] = [("unit", "left"), ("fp32, ms", "right"), ("of the step", "right")]
    print_table(console, [*columns, *((f"{choice} / fp32", "right") for choice in profile.formats)], rows)
    reasons = dict[tuple[str, Format], str]()
    for row in profile.times:
        if row.reason:
            reasons.setdefault((row.shape, row.format), f"does not pay: {row.unit}: {row.reason}")
    for line in (*reasons.values(), *(f"note: {note}" for note in profile.notes)):
        print_line(console, line)


def _ratio(row: UnitTime | None) -> str:
    return "-" if row is None else interval(row.ratio.value, (row.ratio.low, row.ratio.high), digits=2)
