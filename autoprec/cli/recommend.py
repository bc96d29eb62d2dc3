"""`autoprec recommend`: a plan in seconds, from facts and rules."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from autoprec.cli.common import (
    device_option,
    errors_console,
    folder,
    json_option,
    max_drop_option,
    mode_option,
    print_json,
    quiet,
    result_console,
)
from autoprec.records import Mode, Origin

if TYPE_CHECKING:
    from autoprec.recommender.recommender import Recommendation

__all__ = ["command"]


@click.command("recommend")
@click.argument("model")
@device_option
@mode_option
@click.option(
    "--method",
    type=click.Choice(["full", "lora", "qlora"]),
    default="full",
    show_default=True,
    help="What is trained: all weights, adapters, adapters on 4 bits.",
)
@click.option(
    "--batch-size", metavar="N", type=click.IntRange(min=1), default=8, show_default=True, help="Examples a batch."
)
@click.option(
    "--seq-len", metavar="N", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens an example."
)
@max_drop_option
@click.option(
    "--explain", is_flag=True, help="Every unit, all advice with its sources, all figures, and the decision tree."
)
@click.option(
    "--out", metavar="DIR", show_default="plan.json here", help="Folder for plan, training arguments and a script."
)
@json_option
def command(
    model: str,
    device: str,
    mode: str | None,
    method: str,
    batch_size: int,
    seq_len: int,
    max_drop: str,
    explain: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Suggest a plan in seconds, with its reasons.

    MODEL is a Hugging Face id or local folder, 'demo', or file.py:function
    returning a Workload or nn.Module. Nothing of it is run; its weights are
    not read where its configuration says enough.
    """
    from autoprec.report.progress import News

    with quiet(), News(errors_console()) as news:
        news.doing(f"Reading {model}")
        from autoprec.recommender.recommender import recommend

        advice = recommend(
            model,
            device=device,
            mode=mode or Mode.TRAIN,
            batch_size=batch_size,
            seq_len=seq_len,
            method=method,
            max_drop=max_drop,
        )
    written = _write(advice, out)
    if as_json:
        print_json(advice.to_json())
        click.echo(f"Wrote {', '.join(written.values())}", err=True)
        return
    from autoprec.report.terminal import print_paths, print_recommended

    console = result_console()
    print_recommended(console, advice.to_json(), advice.plan, explain=explain)
    if explain:
        from autoprec.recommender.learned import current_tree
        from autoprec.recommender.tree import tree_lines

        for line in tree_lines(current_tree()):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_paths(console, written)
    if advice.plan.device.origin is Origin.MEASURED:
        where = "" if device == "auto" else f" --device {shlex.quote(device)}"
        print_paths(console, {"measure it": f"autoprec search {shlex.quote(model)}{where} --mode {advice.plan.mode}"})
    else:
        confirm = f"autoprec verify {shlex.quote(written['plan'])} {shlex.quote(model)}"
        print_paths(console, {f"on {advice.plan.device.name}, to confirm": confirm})


def _write(advice: Recommendation, out: str | None) -> dict[str, str]:
    """Write the plan here, or with `--out` plan, training arguments and script there; return what is where."""
    home = folder(out or ".")
    advice.plan.save(home / "plan.json")
    written = {"plan": str(home / "plan.json")}
    if out is None:
        return written
    from autoprec.files import write_atomic, write_json
    from autoprec.recommender.script import ARGUMENTS_FILE, script_name

    if advice.training_arguments:
        write_json(home / ARGUMENTS_FILE, dict(advice.training_arguments))
        written["arguments"] = str(home / ARGUMENTS_FILE)
    script = home / script_name(advice.plan)
    write_atomic(script, advice.script)
    return written | {"script": str(script)}
