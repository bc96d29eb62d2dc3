"""`autoprec export`: a plan as code."""

from __future__ import annotations

import click

from autoprec.cli.running import plan_path
from autoprec.errors import UsageError
from autoprec.exporters import TARGETS, export
from autoprec.files import write_atomic
from autoprec.plan import Plan

__all__ = ["command"]


@click.command("export")
@click.argument("plan", metavar="PLAN|RUN")
@click.option("--to", "target", metavar="TARGET", help=f"What to write: {', '.join(TARGETS)}.  [required]")
@click.option("--out", metavar="F", show_default="stdout", help="File to write.")
def command(plan: str, target: str | None, out: str | None) -> None:
    """Write a plan as code for your training script.

    PLAN is a plan.json, written by recommend or search; RUN a run folder.
    """
    if target is None:
        raise UsageError(f"--to is missing: say what to write, one of {', '.join(TARGETS)}.")
    path = plan_path(plan)
    text = export(Plan.load(path), target, str(path))
    if out is None:
        click.echo(text, nl=False)
        return
    write_atomic(out, text)
    click.echo(f"Wrote {out}", err=True)
