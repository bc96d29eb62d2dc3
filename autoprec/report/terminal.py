"""Tables for a terminal: device, units, plan and search result, printed to a `rich` Console that the caller gives.

Colours and the width are the console's business; on a pipe the same tables come out as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoprec.formats import Format
from autoprec.plan import Figure, Plan, PlanUnit
from autoprec.records import DeviceProfile, GemmRate, Measurement, ModelProfile, Origin, SearchResult, Unit
from autoprec.report.figures import (
    bytes_text,
    count_text,
    drop_unit,
    format_counts,
    interval,
    layout_text,
    megabytes,
    number,
    origin_note,
    plain,
)
from autoprec.report.grouping import Run, runs, short_modules, span

__all__ = [
    "fact_lines",
    "measurement_line",
    "print_device",
    "print_facts",
    "print_paths",
    "print_plan",
    "print_recommendation",
    "print_result",
    "print_units",
]

Align = Literal["left", "right"]

_INDENT = 2


def _print_table(
    console: Console, columns: Sequence[tuple[str, Align]], rows: Iterable[Sequence[str]], marked: int | None = None
) -> None:
    """Print an indented table with one row set off; where it is tight, the widest columns wrap first."""
    rows = [[plain(cell) for cell in row] for row in rows]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.show_header = any(title for title, _ in columns)
    cells = [[title, *(row[index] for row in rows)] for index, (title, _) in enumerate(columns)]
    widths = _widths(cells, console.width - _INDENT - 2 * (len(columns) - 1))
    for (title, align), width in zip(columns, widths, strict=True):
        table.add_column(Text(title), justify=align, width=width, overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="bold green" if index == marked else "")
    _indented(console, table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return a width for each column of cells: words whole as long as they fit, then names are torn.

    rich's own layout lets a table run over the edge, and loses the text there, once least widths are given.
    """
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    for least in (words, [min(w, 12) for w in words], [1] * len(words)):
        while sum(widths) > room:
            index = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > least[i] else 0)
            if widths[index] <= least[index]:
                break
            widths[index] -= 1
    return widths


def _heading(console: Console, title: str, note: str = "") -> None:
    console.print(Text.assemble((plain(title), "bold"), "  " if note else "", plain(note)))


def _indented(console: Console, content: Table | str) -> None:
    console.print(
        Padding(Text(plain(content)) if isinstance(content, str) else content, (0, 0, 0, _INDENT), expand=False)
    )


# device and model


def print_device(console: Console, profile: DeviceProfile) -> None:
    """Print what a device computes in: layout, support with its reason, measured rates, bandwidth, instructions."""
    _heading(console, f"Device {profile.name}", _device_facts(profile))
    sizes = sorted({r.size for r in profile.gemm_rates})
    rates = {(r.format, r.size): r for r in profile.gemm_rates}
    columns: list[tuple[str, Align]] = [("format", "left"), ("bits", "left"), ("support", "left")]
    columns += [(f"TFLOP/s at {size}", "right") for size in sizes]
    columns += [(f"x fp32 at {sizes[-1]}", "right")] if sizes else []
    columns += [("peak TFLOP/s", "right")] if profile.peak_tflops else []
    rows = []
    for choice in Format:
        row = [choice.value, layout_text(choice, profile.fp8_family), profile.supports(choice).value]
        row += [_rate(rates.get((choice, size))) for size in sizes]
        row += [_against_fp32(rates, choice, sizes)] if sizes else []
        if profile.peak_tflops:
            row.append(number(profile.peak_tflops[choice]) if choice in profile.peak_tflops else "-")
        rows.append(row)
    _print_table(console, columns, rows)
    why = [(str(choice), known.support.value, known.reason) for choice, known in profile.formats.items()]
    why.append(("tf32", profile.tf32.support.value, profile.tf32.reason))
    _print_table(console, [("", "left")] * 3, why)
    for line in _device_lines(profile):
        _indented(console, line)


def _device_facts(profile: DeviceProfile) -> str:
    source = {Origin.MEASURED: "measured here"}.get(profile.origin, f"not here: {profile.origin}")
    facts = [profile.kind, source, profile.architecture or ""]
    if profile.compute_capability:
        facts.append("capability {}.{}".format(*profile.compute_capability))
    facts.append(f"{profile.threads} threads" if profile.threads else "")
    facts.append(f"{bytes_text(profile.memory_bytes)} memory" if profile.memory_bytes else "")
    return ", ".join(f for f in facts if f)


def _rate(rate: GemmRate | None) -> str:
    return interval(rate.tflops, (rate.tflops_low, rate.tflops_high)) if rate else "-"


def _against_fp32(rates: Mapping[tuple[Format, int], GemmRate], choice: Format, sizes: Sequence[int]) -> str:
    """Return the rate as a multiple of FP32's at the largest size both were measured at."""
    for size in reversed(sizes):
        mine, base = rates.get((choice, size)), rates.get((Format.FP32, size))
        if mine and base and base.tflops > 0:
            return f"{number(mine.tflops / base.tflops)}x{'' if size == sizes[-1] else f' at {size}'}"
    return "-"


def _device_lines(profile: DeviceProfile) -> list[str]:
    lines = []
    if profile.copy_gb_per_s:
        copy = profile.copy_gb_per_s
        figure = interval(copy.value, (copy.low, copy.high))
        lines.append(f"copy bandwidth: {figure} GB/s{origin_note(copy.origin)}")
    if profile.bandwidth_gb_per_s:
        lines.append(f"memory bandwidth: {number(profile.bandwidth_gb_per_s)} GB/s ({Origin.DATASHEET})")
    if profile.instructions:
        lines.append(f"instruction sets: {' '.join(profile.instructions)}")
    if profile.fp8_recipes:
        lines.append(f"fp8 recipes: {' '.join(profile.fp8_recipes)}")
    lines += [f"note: {note}" for note in profile.notes]
    lines += [f"source of {name}: {source}" for name, source in profile.sources.items()]
    if profile.versions:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in profile.versions.items()))
    return lines


def print_units(console: Console, profile: ModelProfile) -> None:
    """Print the units of a model, equal neighbouring blocks on one line, then what is pinned and tied."""
    total = f"{profile.class_name}, {count_text(profile.parameters)} parameters, {len(profile.units)} units"
    _heading(console, f"Model {profile.model_id}", total)
    size = {leaf.module: leaf.parameters for leaf in profile.leaves}

    def parameters(unit: Unit) -> int:
        return sum(size.get(module, 0) for module in unit.modules)

    rows = []
    for run in runs(profile.units, lambda u: u.name, lambda u: (u.role, u.formats, parameters(u), len(u.modules))):
        unit, count = run.items[0], len(run.items)
        each = count_text(parameters(unit))
        amount = each if count == 1 else f"{count} x {each}"
        rows.append([run.name, unit.role.value, amount, " ".join(unit.formats), _modules(run)])
    columns: list[tuple[str, Align]] = [("unit", "left"), ("role", "left"), ("parameters", "right")]
    _print_table(console, [*columns, ("can take", "left"), ("modules", "left")], rows)
    for pinned in profile.pinned:
        _indented(console, f"no choice: {_few(pinned.modules)}: {pinned.reason}")
    for group in profile.tied:
        _indented(console, f"one storage: {' = '.join(group)}")
    if profile.unassigned:
        _indented(console, f"not placed: {_few(profile.unassigned)}")


def _modules(run: Run[Unit]) -> str:
    return span(short_modules(run.items[0].modules), short_modules(run.items[-1].modules))


def _few(modules: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(modules[:most])
    return shown if len(modules) <= most else f"{shown} and {len(modules) - most} more"


# plans


def print_plan(console: Console, plan: Plan, *, every_unit: bool = False) -> None:
    """Print a plan: units with reasons (`every_unit`: ungrouped), settings, training arguments and evidence."""
    origin = "" if plan.device.name == "any" else origin_note(plan.device.origin)
    where = "any device" if plan.device.name == "any" else f"{plan.device.name}{origin}"
    _heading(console, f"Plan for {plan.model.id}", f"{plan.model.class_name}, {plan.mode}, on {where}")
    groups: list[Run[PlanUnit]] = (
        [Run(u.name, (u,)) for u in plan.units]
        if every_unit
        else runs(plan.units, lambda u: u.name, lambda u: (u.role, u.format, u.reason))
    )
    rows = [[run.name, run.items[0].role.value, run.items[0].format.value, run.items[0].reason] for run in groups]
    _print_reasoned(console, rows + [[_few(p.modules, 1), "pinned", "-", p.reason] for p in plan.pinned])
    print_facts(console, "Settings", _settings(plan))
    if plan.training_arguments:
        print_facts(console, "TrainingArguments", {k: repr(v) for k, v in plan.training_arguments.items()}, "=")
    evidence = _evidence(plan)
    if evidence:
        print_facts(console, "Evidence", evidence)


def _print_reasoned(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows that end in a reason; reasons too long for their column stand below, each once, by number."""
    columns: list[tuple[str, Align]] = [("unit", "left"), ("role", "left"), ("format", "left"), ("why", "left")]
    room = console.width - _INDENT - 6 - sum(max(cell_len(row[i]) for row in rows) for i in range(3))
    reasons = list(dict.fromkeys(row[3] for row in rows))
    if all(cell_len(reason) <= room for reason in reasons):
        _print_table(console, columns, rows)
        return
    _print_table(console, columns, [[*row[:3], str(reasons.index(row[3]) + 1)] for row in rows])
    _print_table(console, [("", "right"), ("", "left")], [(str(i + 1), reason) for i, reason in enumerate(reasons)])


def _settings(plan: Plan) -> dict[str, str]:
    scaler = plan.grad_scaler
    settings = {
        "formats": format_counts(plan.assignment),
        "ambient": str(plan.ambient),
        "stream": str(plan.stream),
        "tf32": "on" if plan.tf32 else "off",
        "gradient scaler": f"starts at {scaler.init_scale:g}" if scaler else "none",
    }
    return settings | ({"fp8 recipe": str(plan.fp8_recipe)} if plan.fp8_recipe else {})


def _evidence(plan: Plan) -> dict[str, str]:
    known = plan.evidence
    figures = {"drop": known.drop, "step": known.step_ms, "speedup": known.speedup, "peak": known.peak_bytes}
    return {name: _figure(figure) for name, figure in figures.items() if figure is not None}


def _figure(figure: Figure) -> str:
    if figure.unit == "bytes":
        return f"{megabytes(round(figure.value))} MB{origin_note(figure.origin)}"
    text = interval(figure.value, figure.ci95)
    return f"{text} {figure.unit}{origin_note(figure.origin)}"


def print_facts(console: Console, title: str, facts: Mapping[str, Any], joint: str = " ") -> None:
    """Print named facts on one line that wraps between facts: 'Settings  ambient bf16, tf32 off'."""
    shown = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in facts.items()}
    _heading(console, title, ", ".join(f"{k}{joint}{v}" for k, v in shown.items()))


def print_recommendation(
    console: Console, *, reasons: Iterable[str], memory: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Print what is said beside a recommended plan: reasons, and what memory and speed to expect where given."""
    for title, lines in (
        ("Reasons", list(reasons)),
        ("Memory", fact_lines(memory)),
        ("Expected", fact_lines(expected)),
    ):
        if lines:
            _heading(console, title)
            _print_table(console, [("", "left"), ("", "left")], [("-", line) for line in lines])


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return JSON facts as lines: names without underscores, bytes in MB or GB, estimates with interval and origin."""
    return [f"{_name(key)}: {_fact(key, value)}" for key, value in facts.items() if value not in (None, [], {})]


def _name(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _fact(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and {"value", "origin"} <= value.keys():
        ci95 = (value["low"], value["high"]) if {"low", "high"} <= value.keys() else None
        return f"{interval(value['value'], ci95)}{origin_note(Origin(value['origin']))}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(k)} {_fact(k, v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_fact(key, item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return bytes_text(value)
        return number(value) if isinstance(value, float) else str(value)
    return str(value)


# searches


def print_result(console: Console, result: SearchResult) -> None:
    """Print a search: reference, baselines with the reasons of those stopped, front, removals, verdict."""
    everything = (*result.baselines, *result.front)
    unit = drop_unit(everything)
    _heading(console, f"Search of {result.model_id}", f"{result.mode}, on {result.device}, limit {result.max_drop}")
    _indented(console, f"reference: {_reference(result.reference)}")
    _heading(console, "Baselines")
    done = [m for m in result.baselines if m.step_ms is not None or m.drop is not None]
    if done:
        _print_table(console, _columns(unit)[1:], [_row("", m)[1:] for m in done])
    for stopped in result.baselines:
        if stopped.reason:
            _indented(console, f"{stopped.name}: {stopped.reason}")
    _heading(console, "Front", f"{len(result.front)} of {result.evaluations} measured, none beaten in drop and step")
    rows = [_row(f"{'>' if i == result.chosen else ' '}{i + 1}", m) for i, m in enumerate(result.front)]
    _print_table(console, _columns(unit), rows, marked=result.chosen)
    if result.chosen is not None:
        _indented(console, f"> {result.chosen + 1} is the chosen plan")
    _removals(console, result)
    _heading(console, "Verdict", f"{result.verdict.decision}: {result.verdict.text}")
    if result.verdict.break_even_hours is not None:
        hours = number(result.verdict.break_even_hours)
        _indented(console, f"The search has paid for itself after {hours} hours of use.")


def _columns(unit: str) -> list[tuple[str, Align]]:
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
    if m.step_ms is not None:
        figures.append(f"{interval(m.step_ms, m.step_ms_ci95)} ms a step{origin_note(m.origin.step_ms)}")
    if m.peak_bytes is not None:
        figures.append(f"peak {megabytes(m.peak_bytes)} MB{origin_note(m.origin.peak_bytes)}")
    if m.metric is not None:
        figures.append(f"metric {number(m.metric)}{origin_note(m.origin.metric)}")
    return ", ".join(figures)


def _removals(console: Console, result: SearchResult) -> None:
    """Print what the device or the space took away, units counted by format and reason."""
    counts: dict[tuple[Format, str], list[str]] = {}
    for removal in result.removed:
        counts.setdefault((removal.format, removal.reason), []).append(removal.unit)
    for (choice, reason), units in counts.items():
        amount = units[0] if len(units) == 1 else f"{len(units)} units"
        _indented(console, f"not tried: {choice} in {amount}: {reason}")


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
