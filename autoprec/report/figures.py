"""Figures as text: a value with its unit, its 95 % interval and, where it was not measured here, its origin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from autoprec.formats import Format, Fp8Family, layout
from autoprec.quantities import SMALL, number
from autoprec.records import Figure, Measurement, Origin
from autoprec.records.measured import LOGITS_UNIT, VALUES_UNIT

__all__ = [
    "bytes_text",
    "count_text",
    "drop_unit",
    "figure_text",
    "format_counts",
    "interval",
    "layout_text",
    "megabytes",
    "number",
    "origin_note",
    "origins",
    "plain",
    "value_text",
    "where_from",
]

Interval = tuple[float, float] | None


def interval(value: float | None, ci95: Interval = None, *, digits: int = 3, suffix: str = "") -> str:
    """Return 'value ±half' where the 95 % interval is symmetric, else 'value [low, high]'; '-' for no value."""
    if value is None:
        return "-"
    if ci95 is None or ci95[0] == ci95[1]:
        return number(value, digits) + suffix
    low, high = ci95
    half = (high - low) / 2
    # a tenth of the half-width is below what two digits of it can show
    if abs((high + low) / 2 - value) <= 0.1 * half:
        if abs(value) < SMALL:
            return f"{number(value, digits)}{suffix} ±{number(half, 2)}"
        # value and half-width end at the same place: two digits of the half-width, but no more than `digits` + 2
        places = min(1 - math.floor(math.log10(half)), digits + 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{max(0, places)}f}{suffix} ±{half:.{max(0, places)}f}"
    return f"{number(value, digits)}{suffix} [{number(low, digits)}, {number(high, digits)}]"


def figure_text(figure: Figure) -> str:
    """Return a figure with its unit and interval, without its origin; an amount of memory without interval."""
    if figure.unit == "bytes":
        return bytes_text(figure.value)
    return interval(figure.value, figure.ci95, suffix=_suffix(figure))


def value_text(figure: Figure) -> str:
    """Return a figure with its unit alone."""
    return bytes_text(figure.value) if figure.unit == "bytes" else number(figure.value) + _suffix(figure)


def _suffix(figure: Figure) -> str:
    return {"": "", "x": "x"}.get(figure.unit, f" {figure.unit}")


def origin_note(origin: Origin | None) -> str:
    """Return ' (emulated)' and the like; '' for what was measured here or has no origin."""
    return "" if origin in (None, Origin.MEASURED) else f" ({origin})"


def origins(found: Iterable[Origin | None]) -> str:
    """Return the origins of several figures: 'measured', or 'emulated, predicted'."""
    return ", ".join(dict.fromkeys(str(o) for o in found if o is not None)) or "origin not recorded"


def where_from(found: Iterable[Measurement]) -> str:
    """Return the origins of measurements' drops and times: 'measured', or 'drops emulated, times predicted'."""
    known = [m for m in found if m.drop is not None or m.step_ms is not None]
    drops, times = origins(m.origin.drop for m in known), origins(m.origin.step_ms for m in known)
    drops, times = drops.replace(", ", " and "), times.replace(", ", " and ")
    return drops if drops == times else f"drops {drops}, times {times}"


def megabytes(count: int | None) -> str:
    """Return bytes as megabytes (10^6), without the unit."""
    return "-" if count is None else number(count / 1e6)


def bytes_text(count: float) -> str:
    """Return bytes with the unit, in GB (10^9) from one on, else in MB."""
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def count_text(count: int) -> str:
    """Return a count of parameters: 412, 12.3 K, 135 M, 7.2 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{number(count / size)} {letter}"
    return str(count)


def format_counts(assignment: Mapping[str, Format]) -> str:
    """Return how many units have which format, most first: 'bf16 8 fp32 2'."""
    counts = Counter(assignment.values())
    order = sorted(counts, key=lambda choice: (-counts[choice], list(Format).index(choice)))
    return " ".join(f"{choice} {counts[choice]}" for choice in order) or "-"


def layout_text(choice: Format, family: Fp8Family | None = None) -> str:
    """Return the bits of a format as sign-exponent-fraction; FP8 has two layouts, values then gradients."""
    family = family or Fp8Family.OCP
    shapes = dict.fromkeys(layout(choice, gradient=gradient, family=family) for gradient in (False, True))
    return " ".join(f"1-{f.exponent_bits}-{f.mantissa_bits}" for f in shapes)


def drop_unit(measurements: Iterable[Measurement]) -> str:
    """Return the unit of the drops of one study: 'nats', or 'relative squared error' for models of values.

    Records carry no unit of their own: for values, and only there, percent is 100 times the drop by definition.
    """
    pairs = [(m.drop, m.drop_percent) for m in measurements if m.drop and m.drop_percent is not None]
    values = bool(pairs) and all(math.isclose(p or 0, 100 * d, rel_tol=1e-6) for d, p in pairs if d)
    return VALUES_UNIT if values else LOGITS_UNIT


def plain(text: str) -> str:
    """Return `text` on one line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)
