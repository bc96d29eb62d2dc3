"""A plan in the comment lines that open an exported text."""

from __future__ import annotations

import re
import textwrap

from autoprec.formats import Format
from autoprec.plan import Plan

__all__ = ["literal", "one_line", "summary"]


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
