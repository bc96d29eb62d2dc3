"""The page of a training confirmation."""

from __future__ import annotations

from rich.console import Console

from autoprec.records import Origin, TrainingConfirmation
from autoprec.report.figures import interval, number
from autoprec.report.layout import Column, print_heading, print_line, print_table

__all__ = ["print_training"]


def print_training(console: Console, found: TrainingConfirmation, origin: Origin) -> None:
    """Print each plan's gap to FP32 after training, beside what seeds do to FP32; `origin` is of all losses."""
    notes = ", ".join((f"{found.steps} steps", f"{found.seeds} seeds", *found.notes))
    print_heading(console, "Trained beside FP32", f"{notes}; {origin}")
    columns: list[Column] = [
        ("", "left"),
        ("held-out loss, over fp32", "right"),
        ("training loss, over fp32", "right"),
        ("verdict", "left"),
        ("", "left"),
    ]
    rows = [
        [
            arm.name,
            interval(arm.gap, arm.gap_ci95),
            interval(arm.train_gap, arm.train_gap_ci95),
            str(arm.verdict),
            arm.reason,
        ]
        for arm in found.arms
    ]
    print_table(console, columns, rows)
    print_line(
        console,
        f"fp32's own held-out loss is {number(found.reference_loss)}, with a standard deviation of "
        f"{number(found.seed_deviation)} over seeds; the margin is {number(found.margin)}",
    )
