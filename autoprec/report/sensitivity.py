"""The page of a model's sensitivity: units with the drop of each format, most sensitive first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from autoprec.formats import Format
from autoprec.quantities import duration_text
from autoprec.records import Estimate, Mode, Role, SensitivityProfile, Unit, UnitDrop
from autoprec.report.figures import number, origins
from autoprec.report.grouping import few
from autoprec.report.layout import Column, print_heading, print_line, print_table

__all__ = ["print_sensitivity"]

#: activations from here on are worth a word: FP16 and unscaled FP8 have trouble with them
_LARGE = 448.0
_GRADIENT_ROWS = 8


def print_sensitivity(console: Console, profile: SensitivityProfile, units: Sequence[Unit]) -> None:
    """Print every unit with its drop alone, share and interval in each format and how it was got, then vetoes."""
    print_heading(
        console,
        f"Sensitivity of {profile.model_id}",
        f"{profile.mode}, {profile.replayed_positions} counted positions, {profile.passes} passes, "
        f"{duration_text(profile.seconds)}; each unit alone in a format, all else in fp32; "
        f"{origins(row.drop.origin for row in profile.drops)}",
    )
    order = sorted(units, key=lambda u: tuple(-_drop(profile, u, f) for f in reversed(profile.formats)))
    columns: list[Column] = [("unit", "left")]
    for choice in profile.formats:
        columns += [(f"{choice}, {profile.drop_unit}", "right"), ("x/", "right"), ("share", "right")]
    rows = [_row(profile, unit) for unit in order if unit.name not in profile.never_ran]
    print_table(console, [*columns, ("how", "left")], rows)
    print_line(console, "x/: the 95 % interval reaches from the drop divided by this to the drop times this")
    for choice in profile.formats:
        total = profile.total(choice)
        percent = number(100 * total / profile.scale)
        print_line(console, f"all units in {choice}: {number(total)} {profile.drop_unit} ({percent} %), as a sum")
    if profile.ambient_drop > 0:
        around = number(profile.ambient_drop)
        print_line(console, f"outside of units, in the ambient {profile.ambient}: {around} {profile.drop_unit} on top")
    _print_gradients(console, profile)
    _print_warnings(console, profile)


def _row(profile: SensitivityProfile, unit: Unit) -> list[str]:
    row, found = [unit.name], []
    for choice in profile.formats:
        drop = _find(profile, unit, choice)
        if drop is None:
            row += ["-", "", ""]
            continue
        found.append(drop)
        row += [number(drop.drop.value), _reach(drop.drop), f"{100 * drop.share:.1f} %"]
    return [*row, _how(profile, unit, found)]


def _reach(drop: Estimate) -> str:
    """Return the factor within which the drop lies; '' where it is nought, 'from 0' where nought is not excluded."""
    if drop.value == 0.0:
        return ""
    return "from 0" if drop.low <= 0 else f"{max(drop.high / drop.value, drop.value / drop.low):.2g}"


def _how(profile: SensitivityProfile, unit: Unit, drops: Sequence[UnitDrop]) -> str:
    reasons = dict.fromkeys(d.reason for d in drops)
    if len(reasons) > 1:
        reasons = dict.fromkeys(f"{d.format}: {d.reason}" for d in drops)
    largest = profile.activation_max.get(unit.name, 0.0)
    if largest >= _LARGE and unit.role is not Role.EMBEDDING:
        reasons[f"largest |value| {largest:.0f}"] = None
    return "; ".join(reasons) or "not probed"


def _find(profile: SensitivityProfile, unit: Unit, choice: Format) -> UnitDrop | None:
    return next((d for d in profile.drops if d.unit == unit.name and d.format is choice), None)


def _drop(profile: SensitivityProfile, unit: Unit, choice: Format) -> float:
    found = _find(profile, unit, choice)
    return -1.0 if found is None else found.drop.value


def _print_gradients(console: Console, profile: SensitivityProfile) -> None:
    if profile.mode is not Mode.TRAIN or not profile.numerics:
        return
    worst = sorted(profile.numerics, key=lambda n: -(n.grad_error or 0.0))
    how = f"the unit's own, {_replayed(profile)} from the same input and incoming gradient; worst first"
    print_heading(console, "Weight gradients", how)
    rows = [
        [
            n.unit,
            n.format.value,
            "-" if n.grad_error is None else number(n.grad_error, 2),
            "-" if n.cosine is None else f"{n.cosine:.6f}",
            f"{100 * n.underflow:.2g} %",
            f"{100 * n.overflow:.2g} %",
        ]
        for n in worst[:_GRADIENT_ROWS]
    ]
    columns: list[Column] = [("unit", "left"), ("format", "left"), ("error, share of the whole gradient", "right")]
    print_table(console, [*columns, ("cosine", "right"), ("underflow", "right"), ("overflow", "right")], rows)
    if len(worst) > _GRADIENT_ROWS:
        print_line(console, f"and {len(worst) - _GRADIENT_ROWS} more in the JSON")
    if profile.loss_scale is not None:
        print_line(console, f"loss scale for fp16, to begin with: {profile.loss_scale:.0f}")


def _replayed(profile: SensitivityProfile) -> str:
    """Return where figures of replayed gradients are from: as the drops of the same replay."""
    shown = {row.format for row in profile.numerics}
    return origins(row.drop.origin for row in profile.drops if row.format in shown)


def _print_warnings(console: Console, profile: SensitivityProfile) -> None:
    reasons: dict[tuple[Format, str], list[str]] = {}
    for veto in profile.vetoes:
        reasons.setdefault((veto.format, veto.reason), []).append(veto.unit)
    for (choice, reason), names in reasons.items():
        print_line(console, f"never {choice}: {few(names)}: {reason}")
    if profile.never_ran:
        print_line(console, f"never ran on these batches, so nothing is known: {few(profile.never_ran)}")
    for note in profile.notes:
        print_line(console, f"note: {note}")
