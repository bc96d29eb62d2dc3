"""The page of a recommendation: the answer on one screen, then the plan, the reasons and code to paste.

It is printed from the recommendation's JSON, so that what is shown and what is written cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from autoprec.plan import Plan
from autoprec.records import Origin
from autoprec.report.figures import bytes_text, format_counts, interval, origin_note
from autoprec.report.layout import print_heading, print_table
from autoprec.report.plans import fact_lines, print_plan

__all__ = ["print_recommended"]

#: of what would change the answer, shown unless all is asked for
_FEW = 3


def print_recommended(console: Console, document: Mapping[str, Any], plan: Plan, *, explain: bool = False) -> None:
    """Print a recommendation.

    Args:
        document: schema `autoprec/recommendation@1`.
        plan: the plan in it.
        explain: every unit on its own, all advice with its sources, and all figures.
    """
    where = f"{plan.mode} on {plan.device.name}{origin_note(plan.device.origin)}"
    print_heading(console, plan.model.id, f"{where}: {format_counts(plan.assignment)}")
    print_table(console, [("", "left"), ("", "left")], list(_answer(document, explain)))
    said = [a for a in document["advice"] if explain or a["level"] != "note"]
    if said:
        more = len(document["advice"]) - len(said)
        print_heading(console, "Do", f"{more} more with --explain" if more else "")
        print_table(console, [("", "left"), ("", "left")], [("-", _advice(a, explain)) for a in said])
    print_plan(console, plan, every_unit=explain)
    if explain:
        for title, facts in (("Memory", document["memory"]), ("Expected", document["expected"])):
            print_heading(console, title)
            print_table(console, [("", "left"), ("", "left")], [("-", line) for line in fact_lines(facts)])
    print_heading(console, "To paste")
    for line in document["snippet"].splitlines():
        console.print(Text(f"  {line}" if line else ""), soft_wrap=True)


def _advice(one: Mapping[str, Any], explain: bool) -> str:
    return f"{one['text']} [{one['code']}: {one['source']}]" if explain else str(one["text"])


def _answer(document: Mapping[str, Any], explain: bool) -> Iterator[tuple[str, str]]:
    """Yield what one wants to know first: why, time, memory, the plans beside it, and what would change it."""
    yield "why", document["reasons"][0]
    yield "", document["reasons"][1]
    yield "step", _step(document["expected"], compiled=bool(document["training_arguments"].get("torch_compile")))
    if spent := document["expected"].get("spent_ms"):
        yield "spent on", _spent(spent)
    yield "memory", _memory(document["memory"])
    for name in ("safer", "faster"):
        yield name, _beside(document[name])
    changes = document["changes"]
    for index, change in enumerate(changes if explain else changes[:_FEW]):
        yield "" if index else "changes if", change["text"]
    if len(changes) > _FEW and not explain:
        yield "", f"{len(changes) - _FEW} more: --explain"


def _step(expected: Mapping[str, Any], *, compiled: bool) -> str:
    steps = expected["compiled_step_ms" if compiled and expected["step_ms"] else "step_ms"]
    if not steps:
        gain = expected["matmul_speedup"]
        if gain is None:
            return f"no time predicted: {expected['reason']}"
        return f"matmuls {_estimate(gain, 'x')} as fast as in fp32; {_short(expected['step_reason'])}"
    mine = steps["plan"]
    ratios = {name: other["value"] / mine["value"] for name, other in steps.items() if name != "plan"}
    beside = [f"{ratio:.3g}x {name}" for name, ratio in ratios.items() if f"{ratio:.2f}" != "1.00"]
    how = " compiled" if compiled else ""
    return f"{_estimate(mine, ' ms')}{how}" + (f"; the speed of {' and '.join(beside)}" if beside else "")


def _spent(spent: Mapping[str, float]) -> str:
    """Return what the device's time goes to, most first: a format changes matmuls, casts and scales only."""
    whole = sum(spent.values())
    parts = sorted(spent.items(), key=lambda part: -part[1])[:5]
    return ", ".join(f"{name} {100 * ms / whole:.0f} %" for name, ms in parts)


def _estimate(value: Mapping[str, Any], suffix: str) -> str:
    text = interval(value["value"], (value["low"], value["high"]), suffix=suffix)
    return text + origin_note(Origin(value["origin"]))


def _memory(memory: Mapping[str, Any]) -> str:
    has = f" of {bytes_text(memory['device_bytes'])}" if memory["device_bytes"] else ""
    parts = sorted(memory["breakdown"].items(), key=lambda part: -part[1])[:4]
    shown = ", ".join(f"{name.removesuffix('_bytes')} {bytes_text(size)}" for name, size in parts)
    text = f"{bytes_text(memory['total_bytes'])}{has} ({memory['origin']}): {shown}"
    if memory["largest_micro_batch"]:
        text += f"; {memory['largest_micro_batch']} sequences fit at most"
    if memory["over_bytes"]:
        text += f"; {bytes_text(memory['over_bytes'])} too much"
    return text


def _short(reason: str) -> str:
    """Return the first sentence of an error."""
    return reason.partition(". ")[0]


def _beside(step: Mapping[str, Any]) -> str:
    if step["what"] is None:
        return _short(str(step["reason"]))
    if step["speedup"] is None:
        return f"{step['what']}; its cost is not known from facts"
    step_ms, ratio = step["step_ms"], step["speedup"]
    return f"{step['what']}: {_estimate(step_ms, ' ms')}, {ratio['value']:.2f}x this plan's speed"
