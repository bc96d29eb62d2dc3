"""What opens an exported text: the plan in words, and the imports of a Python program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["literal", "one_line", "opening", "source_list", "summary"]


def one_line(text: str) -> str:
    """Return `text` safe inside a docstring or comment of generated code: no quotes that end it, no line breaks."""
    return re.sub(r"[^\x20-\x7e]", " ", text).replace("\\", "/").replace('"', "'")


def literal(value: object) -> str:
    """Return `value` as Python source, text in double quotes where it holds none."""
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and text[0] == "'" and '"' not in text else text


def summary(plan: Plan) -> str:
    """Return what a plan says, as lines of at most 100 characters for a docstring."""
    parts = [f"ambient {plan.ambient}, residual stream {plan.stream}, TF32 {'on' if plan.tf32 else 'off'}"]
    for choice in Format:
        names = [unit.name for unit in plan.units if unit.format is choice]
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            parts.append(f"{choice}: {shown}")
    if plan.fp8_recipe:
        parts.append(f"FP8 scales: {plan.fp8_recipe}")
    return "\n".join(
        line
        for part in parts
        for line in textwrap.wrap(one_line(part), 100, initial_indent="  ", subsequent_indent="      ")
    )


def opening(plan: Plan, verb: str, notes: str, imports: str, plan_path: str | None) -> str:
    """Return the docstring, imports and PLAN of an exported Python program.

    Args:
        verb: what the program does with the model, as in "Train".
        notes: how it is used, for the docstring.
        imports: third-party imports, `import autoprec` not among them.
        plan_path: where the program reads its plan; None for a program that holds all it needs.
    """
    wrapped = "\n\n".join(
        textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)
        for text in notes.strip().split("\n\n")
    )
    lines = [
        f'"""{verb} {one_line(plan.model.id)} with its autoprec plan.\n\n{summary(plan)}\n\n{wrapped}\n"""\n',
        "from __future__ import annotations\n",
        imports.strip() + "\n",
    ]
    if plan_path is not None:
        lines += ["import autoprec\n", f"PLAN = {literal(plan_path)}\n"]
    return "\n".join(lines)


def source_list(name: str, values: Iterable[str], kind: str = "frozenset") -> str:
    """Return an assignment of texts to a constant, one a line: `NAME = frozenset({...})`, or a list."""
    items = "".join(f"    {literal(value)},\n" for value in values)
    if kind == "list":
        return f"{name} = [\n{items}]\n"
    if not items:
        return f"{name}: frozenset[str] = frozenset()\n"
    return f"{name} = frozenset(\n    {{\n{textwrap.indent(items, '    ')}    }}\n)\n"
