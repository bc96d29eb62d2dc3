"""The page of a doctor's visit: findings worst first, what was seen of each, and what to write instead."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.text import Text

from autoprec.records import Diagnosis, Finding, Severity, TraceReport
from autoprec.report.figures import number, plain
from autoprec.report.layout import INDENT, Column, print_heading, print_line, print_table

__all__ = ["print_diagnosis"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold"}
#: units shown of a trace, largest activation first; the JSON has all
_UNITS = 8


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    """Print all findings, the trace, and what could not be looked at."""
    for finding in found.findings:
        _finding(console, finding)
    if found.trace is not None:
        _trace(console, found.trace)
    for note in found.notes:
        print_line(console, f"note: {note}")
    looked = ", ".join(found.looked_at)
    if not found.findings:
        print_heading(console, "Nothing found", f"in {looked}")
        return
    counts = Counter(finding.severity for finding in found.findings)
    said = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in Severity if counts[s])
    print_heading(console, said, f"in {looked}")


def _finding(console: Console, finding: Finding) -> None:
    style = _STYLES[finding.severity]
    console.print(
        Text.assemble((finding.code, style), "  ", (finding.severity, style), "  ", (plain(finding.title), "bold"))
    )
    for piece in finding.evidence:
        print_line(console, f"{piece.place}: {piece.text}" if piece.place else piece.text)
    print_line(console, finding.advice)
    for line in finding.paste.splitlines():
        _copied(console, line)
    for source in finding.sources[:2]:
        _copied(console, source, indent=INDENT)
    console.print()


def _copied(console: Console, line: str, indent: int = 2 * INDENT) -> None:
    """Print a line to be copied: never folded."""
    console.print(Text(" " * indent + plain(line)), soft_wrap=True)


def _trace(console: Console, trace: TraceReport) -> None:
    print_heading(console, "Trace", f"{trace.batches} batches in fp32 and {trace.format}, on {trace.device}")
    rows = sorted(trace.units, key=lambda unit: -unit.largest_activation)[:_UNITS]
    columns: list[Column] = [
        ("unit", "left"), ("largest activation", "right"), ("largest gradient", "right"), ("to 0 in fp16", "right"),
    ]  # fmt: skip
    print_table(
        console,
        columns,
        [
            [
                unit.unit,
                number(unit.largest_activation),
                "-" if unit.largest_gradient is None else number(unit.largest_gradient),
                _share(unit.flushed_share),
            ]
            for unit in rows
        ],
    )
    if len(trace.units) > len(rows):
        print_line(console, f"and {len(trace.units) - len(rows)} units with smaller activations")
    first = trace.non_finite_in_fp32 or trace.first_non_finite
    print_line(console, f"first value that is not finite: {first or f'none, in fp32 or {trace.format}'}")
    if trace.loss_scale is not None:
        print_line(
            console,
            f"gradients that fp16 rounds to 0: {_share(trace.gradient_flushed_share)} without a loss scale, "
            f"{_share(trace.flushed_share_scaled)} at the suggested {trace.loss_scale:g}; under its normal range "
            f"{_share(trace.gradient_subnormal_share)}",
        )
    if trace.step_ms is not None and trace.fp32_step_ms is not None:
        print_line(
            console,
            f"a step: {number(trace.step_ms)} ms in {trace.format}, {number(trace.fp32_step_ms)} ms in fp32 "
            f"(median of a few)",
        )
    if trace.low_precision_share is not None:
        print_line(console, f"matmul calls that ran in {trace.format}: {_share(trace.low_precision_share)}")
    waiting = "" if trace.waiting_share is None else f"{_share(trace.waiting_share)}, "
    print_line(console, f"waiting for data: {waiting}{trace.waiting_reason}")
    console.print()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
