"""The page of a plan, and JSON facts as lines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from autoprec.formats import Format
from autoprec.plan import Plan, PlanUnit
from autoprec.records import Figure, Origin, Role
from autoprec.report.figures import bytes_text, format_counts, interval, megabytes, number, origin_note
from autoprec.report.grouping import Run, few, runs, short_modules, span
from autoprec.report.layout import INDENT, Column, print_facts, print_heading, print_table

__all__ = ["fact_lines", "print_plan", "settings"]


def print_plan(console: Console, plan: Plan, *, every_unit: bool = False, modules: bool = False) -> None:
    """Print a plan: units with reasons, settings, training arguments and evidence.

    `every_unit`: equal blocks are not gathered; `modules`: their modules too, and in words what each format does.
    """
    origin = "" if plan.device.name == "any" else origin_note(plan.device.origin)
    where = "any device" if plan.device.name == "any" else f"{plan.device.name}{origin}"
    print_heading(console, f"Plan for {plan.model.id}", f"{plan.model.class_name}, {plan.mode}, on {where}")
    groups: list[Run[PlanUnit]] = (
        [Run(u.name, (u,)) for u in plan.units]
        if every_unit
        else runs(plan.units, lambda u: u.name, lambda u: (u.role, u.format, u.reason))
    )
    rows = [[run.name, run.items[0].role.value, run.items[0].format.value, run.items[0].reason] for run in groups]
    _print_reasoned(console, rows + [[few(p.modules, 1), "pinned", "-", p.reason] for p in plan.pinned])
    if modules:
        print_heading(console, "Modules")
        print_table(console, [("", "left"), ("", "left")], [(run.name, _modules(run)) for run in groups])
        print_heading(console, "What runs")
        print_table(console, [("", "left"), ("", "left")], _meanings(plan))
    print_facts(console, "Settings", settings(plan))
    if plan.training_arguments:
        print_facts(console, "TrainingArguments", {k: repr(v) for k, v in plan.training_arguments.items()}, "=")
    evidence = _evidence(plan)
    if evidence:
        print_facts(console, "Evidence", evidence)


def _print_reasoned(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows that end in a reason; reasons too long for their column stand below, each once, by number."""
    columns: list[Column] = [
        ("unit", "left"),
        ("role", "left"),
        ("format", "left"),
        ("why", "left"),
    ]
    room = console.width - INDENT - 6 - sum(max(cell_len(row[i]) for row in rows) for i in range(3))
    reasons = list(dict.fromkeys(row[3] for row in rows))
    if all(cell_len(reason) <= room for reason in reasons):
        print_table(console, columns, rows)
        return
    print_table(console, columns, [[*row[:3], str(reasons.index(row[3]) + 1)] for row in rows])
    print_table(console, [("", "right"), ("", "left")], [(str(i + 1), reason) for i, reason in enumerate(reasons)])


def _modules(run: Run[PlanUnit]) -> str:
    """Return the modules of a run of units: 'h.0-11.attn: q k v'; those of the first where the others differ."""
    first, last = (short_modules(unit.modules) for unit in (run.items[0], run.items[-1]))
    return span(first, last)


def _meanings(plan: Plan) -> list[tuple[str, str]]:
    """Say in words what the formats of a plan do when it is in force."""
    stored = "weights are stored so too" if plan.stream is not Format.FP32 else "weights stay stored in fp32"
    says = {
        Format.FP32: "operands and results in fp32, autocast off" + (", matmuls in TF32" if plan.tf32 else ""),
        Format.BF16: f"operands and results rounded to bf16, sums in fp32; {stored}",
        Format.FP16: f"operands and results rounded to fp16, sums in fp32; {stored}",
        Format.FP8: f"operands in E4M3, gradients in E5M2, scaled {plan.fp8_recipe}; results and what is between the "
        f"unit's layers in {plan.ambient}; {stored}",
    }
    units = {f: sum(u.format is f for u in plan.units) for f in Format}
    lookups = [u for u in plan.units if u.role is Role.EMBEDDING]
    rows = [(f"{f} ({n})", says[f]) for f, n in units.items() if n]
    if lookups:
        rows.append(("lookups", f"values rounded to the unit's format, handed on in {plan.stream}"))
    rows.append(("outside", f"what no unit decides runs in {_around(plan.ambient)}; residual stream in {plan.stream}"))
    borders = sum(a.format is not b.format for a, b in itertools.pairwise(plan.units))
    rows.append(("borders", f"{borders} between neighbouring units of different formats; activations are cast there"))
    return rows


def _around(ambient: Format) -> str:
    return "fp32, autocast off" if ambient is Format.FP32 else f"autocast to {ambient}"


def settings(plan: Plan) -> dict[str, str]:
    """Return what a plan sets beside its units' formats, in words."""
    scaler = plan.grad_scaler
    found = {
        "formats": format_counts(plan.assignment),
        "ambient": str(plan.ambient),
        "stream": str(plan.stream),
        "tf32": "on" if plan.tf32 else "off",
        "gradient scaler": f"starts at {scaler.init_scale:g}" if scaler else "none",
    }
    return found | ({"fp8 recipe": str(plan.fp8_recipe)} if plan.fp8_recipe else {})


def _evidence(plan: Plan) -> dict[str, str]:
    known = plan.evidence
    figures = {"drop": known.drop, "step": known.step_ms, "speedup": known.speedup, "peak": known.peak_bytes}
    return {name: _figure(figure) for name, figure in figures.items() if figure is not None}


def _figure(figure: Figure) -> str:
    if figure.unit == "bytes":
        return f"{megabytes(round(figure.value))} MB ({figure.origin})"
    text = interval(figure.value, figure.ci95)
    return f"{text} {figure.unit} ({figure.origin})"


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return JSON facts as lines: names without underscores, bytes in MB or GB, estimates with interval and origin."""
    return [f"{_name(key)}: {_fact(key, value)}" for key, value in facts.items() if value not in (None, [], {})]


#: what keys of JSON say of their figures' units
_UNITS = {"_tflops": " TFLOP/s", "_ms": " ms", "speedup": "x"}


def _name(key: str) -> str:
    return key.removesuffix("_bytes").removesuffix("_tflops").removesuffix("_ms").replace("_", " ")


def _fact(key: str, value: Any, within: str = "") -> str:
    """Return a value with its unit, which its own key tells or that of what it stands in."""
    unit = next((unit for end, unit in _UNITS.items() if key.endswith(end)), within)
    if isinstance(value, Mapping) and {"value", "origin"} <= value.keys():
        ci95 = (value["low"], value["high"]) if {"low", "high"} <= value.keys() else None
        return f"{interval(value['value'], ci95, suffix=unit)}{origin_note(Origin(value['origin']))}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(k)} {_fact(k, v, unit)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_fact(key, item, unit) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return bytes_text(value)
        return f"{number(value)}{unit}" if isinstance(value, float) else str(value)
    return str(value)
