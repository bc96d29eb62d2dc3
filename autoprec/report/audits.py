"""Pages of what ran: an audit, unit by unit, and a plan measured again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from autoprec.records import (
    AuditReport,
    AuditRow,
    CastRow,
    Check,
    CheckOutcome,
    Direction,
    KernelRow,
    Measurement,
    OpKind,
    Origin,
    Verification,
)
from autoprec.report.figures import bytes_text, drop_unit, interval, number, origin_note, where_from
from autoprec.report.grouping import Run, runs
from autoprec.report.layout import Column, print_heading, print_line, print_table
from autoprec.report.trained import print_training

__all__ = ["print_audit", "print_verification"]

_PRODUCTS = (OpKind.MATMUL, OpKind.CONVOLUTION, OpKind.LOOKUP)
_KERNELS = 10  #: kernels shown; the JSON has all


def print_verification(console: Console, found: Verification) -> None:
    """Print what a plan does here: its figures beside those it came with, the audit, warnings, the verdict."""
    where = f"{found.mode}, on {found.device}; {where_from([found.measurement])}"
    print_heading(console, f"Plan for {found.model_id}, measured again", where)
    columns: list[Column] = [("figure", "left"), ("here", "right"), ("the plan says", "right"), ("", "left")]
    print_table(console, columns, _figures(found))
    if found.measurement.reason:
        print_line(console, found.measurement.reason)
    console.print()
    print_audit(console, found.audit)
    if found.training is not None:
        console.print()
        print_training(console, found.training, found.measurement.origin.drop or Origin.MEASURED)
    for warning in found.warnings:
        print_line(console, f"note: {warning}")
    console.print()
    print_heading(console, "Verdict", "the plan holds here" if found.holds else "the plan does not hold here:")
    for problem in found.problems:
        print_line(console, problem)


def _figures(found: Verification) -> list[list[str]]:
    """Return a row for each figure: what is here, what the plan says, and how they stand."""
    m, checks = found.measurement, {check.figure: check for check in found.checks}
    unit = checks["drop"].said.unit if "drop" in checks else drop_unit([m])
    percent = "" if m.drop_percent is None else f"{number(m.drop_percent)} %"
    here = {
        "drop": (f"drop, {unit}", interval(m.drop, m.drop_ci95) + origin_note(m.origin.drop)),
        "drop %": ("drop, %", percent),
        "gradient": ("gradient, relative squared error", _gradient(m)),
        "speedup": ("speedup", interval(m.speedup, m.speedup_ci95, suffix="x") + origin_note(m.origin.step_ms)),
        "step_ms": ("step, ms", interval(m.step_ms, m.step_ms_ci95) + origin_note(m.origin.step_ms)),
        "peak_bytes": ("peak", _bytes(m.peak_bytes) + origin_note(m.origin.peak_bytes)),
        "metric": ("metric", "" if m.metric is None else number(m.metric)),
    }
    return [[title, value, *_said(checks.get(key))] for key, (title, value) in here.items() if value]


def _bytes(size: int | None) -> str:
    return "-" if size is None else bytes_text(size)


def _gradient(m: Measurement) -> str:
    if m.grad_error is None:
        return ""
    limit = "" if m.grad_error_limit is None else f" (limit {number(m.grad_error_limit)})"
    return number(m.grad_error) + limit


def _said(check: Check | None) -> list[str]:
    if check is None:
        return ["-", ""]
    value = bytes_text(check.said.value) if check.said.unit == "bytes" else interval(check.said.value, check.said.ci95)
    reason = f": {check.reason}" if check.reason and check.outcome is CheckOutcome.NOT_COMPARED else ""
    return [f"{value} ({check.said.origin})", f"{check.outcome}{reason}"]


def print_audit(console: Console, report: AuditReport) -> None:
    """Print what the operators of each unit ran in, the casts between formats, and what disagrees with the plan."""
    passes = "forward and backward" if report.backward else "forward"
    wrong = len(report.disagreements)
    state = "every unit ran as planned" if not wrong else f"{wrong} disagreement{'s' * (wrong > 1)}"
    print_heading(console, "Audit of one step", f"{passes}, measured on {report.device}: {state}")
    columns: list[Column] = [("unit", "left"), ("planned", "left"), ("ran", "left"), ("attention", "left")]
    columns += [("casts", "right"), ("as planned", "left")]
    print_table(console, columns, [_cells(run) for run in runs(_lines(report), lambda x: x.name, _alike)])
    pinned = _formats(row for row in report.rows if row.kind in (OpKind.NORM, OpKind.SOFTMAX))
    print_line(console, f"norms and softmax: {pinned}")
    for line in _casts(report.casts, report.step_ms):
        print_line(console, line)
    reasons = dict.fromkeys(row.reason for row in report.rows if row.reason)
    behind = [f"{u.parameter} is used by '{u.caller or 'the model'}' itself, in {u.executed}" for u in report.behind]
    for line in [*reasons, *dict.fromkeys(behind), *report.disagreements]:
        print_line(console, str(line))
    _kernels(console, report.kernels)


@dataclass(frozen=True, slots=True)
class _Line:
    """A unit as the page shows it: executed formats of its products, and of the attention between them."""

    name: str
    planned: str
    ran: str
    attention: str
    casts: int
    verdict: str


def _alike(line: _Line) -> tuple[str, ...]:
    return line.planned, line.ran, line.attention, str(line.casts), line.verdict


def _lines(report: AuditReport) -> list[_Line]:
    names = dict.fromkeys([*(row.unit for row in report.rows), *(use.unit for use in report.behind)])
    ordered = [*(n for n in names if n is not None), *([None] if None in names else [])]
    return [_line(name, report) for name in ordered]


def _line(unit: str | None, report: AuditReport) -> _Line:
    rows = [row for row in report.rows if row.unit == unit]
    products = [row for row in rows if row.kind in _PRODUCTS]
    passes = [_formats(row for row in products if row.direction is direction) for direction in Direction]
    behind = [use for use in report.behind if use.unit == unit]
    wrong = any(row.agrees is False for row in rows) or any(not use.agrees for use in behind)
    return _Line(
        name=unit or "outside units",
        planned=next((str(row.planned) for row in products if row.planned is not None), "-"),
        ran=_ran(passes, sorted({use.executed for use in behind})),
        attention=_formats(row for row in rows if row.kind is OpKind.ATTENTION),
        casts=sum(cast.calls for cast in report.casts if cast.unit == unit),
        verdict="NO" if wrong else "-" if unit is None else "yes",
    )


def _ran(passes: Sequence[str], behind: Sequence[str]) -> str:
    forward, backward = passes
    text = forward if backward in (forward, "-") else f"{forward}, backward {backward}"
    return f"{'' if text == '-' else f'{text}, '}{', '.join(behind)} elsewhere" if behind else text


def _formats(rows: Iterable[AuditRow]) -> str:
    return ", ".join(sorted({row.executed for row in rows})) or "-"


def _cells(run: Run[_Line]) -> list[str]:
    line = run.items[0]
    return [run.name, line.planned, line.ran, line.attention, str(line.casts), line.verdict]


def _casts(casts: Sequence[CastRow], step_ms: float) -> list[str]:
    if not casts:
        return ["no casts between formats"]
    kinds: dict[str, list[float]] = {}
    for cast in casts:
        entry = kinds.setdefault(f"{cast.source} to {cast.target}", [0, 0, 0.0])
        for index, value in enumerate((cast.calls, cast.bytes, cast.ms)):
            entry[index] += value
    calls, size, ms = (sum(entry[index] for entry in kinds.values()) for index in range(3))
    shares = ", ".join(f"{name} {int(entry[0])}" for name, entry in kinds.items())
    return [
        f"casts: {int(calls)} ({shares}), {bytes_text(size)} read and written, "
        f"{number(ms)} ms of the {number(step_ms)} ms of the audited step, which is slower than a plain one"
    ]


def _kernels(console: Console, kernels: Sequence[KernelRow]) -> None:
    if not kernels:
        return
    total = sum(kernel.ms for kernel in kernels)
    names = dict.fromkeys(kernel.name for kernel in kernels)
    print_heading(console, "Kernels", f"{len(names)} by name, {number(total)} ms, measured; the longest:")
    columns: list[Column] = [("unit", "left"), ("kernel", "left"), ("calls", "right"), ("time, ms", "right")]
    shown = [[k.unit or "outside units", k.name, str(k.calls), number(k.ms)] for k in kernels[:_KERNELS]]
    print_table(console, columns, shown)
