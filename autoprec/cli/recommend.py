"""`autoprec recommend`: a plan in seconds, from facts and rules."""

from __future__ import annotations

import shlex
from typing import Any

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

__all__ = ["command"]

#: what is shown of memory unless all is asked for
_MEMORY = (
    "policy", "total_bytes", "device_bytes", "origin", "batch_size", "breakdown", "largest_micro_batch", "accumulation",
    "over_bytes", "remedies",
)  # fmt: skip


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
@click.option("--explain", is_flag=True, help="Every unit, all of memory and expectations, and the decision tree.")
@click.option("--out", metavar="DIR", default=".", show_default=True, help="Folder for plan.json.")
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
    out: str,
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
    path = folder(out) / "plan.json"
    advice.plan.save(path)
    if as_json:
        print_json(advice.to_json())
        click.echo(f"Wrote {path}", err=True)
        return
    from autoprec.report.terminal import print_paths, print_plan, print_recommendation

    console = result_console()
    print_plan(console, advice.plan, every_unit=explain)
    document = advice.to_json()
    print_recommendation(
        console,
        reasons=document["reasons"],
        memory={name: fact for name, fact in document["memory"].items() if explain or name in _MEMORY},
        expected=document["expected"] if explain else _short(document["expected"]),
    )
    if explain:
        from autoprec.recommender.learned import current_tree
        from autoprec.recommender.tree import tree_lines

        for line in tree_lines(current_tree()):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_paths(console, {"plan": str(path)})
    if advice.plan.device.origin is Origin.MEASURED:
        where = "" if device == "auto" else f" --device {shlex.quote(device)}"
        print_paths(console, {"measure it": f"autoprec search {shlex.quote(model)}{where} --mode {advice.plan.mode}"})
    else:
        where = advice.plan.device.name
        print_paths(
            console, {f"on {where}, to confirm": f"autoprec verify {shlex.quote(str(path))} {shlex.quote(model)}"}
        )


def _short(expected: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of expectations unless all is asked for."""
    return {
        name: expected.get(name)
        for name in ("matmul_speedup", "step_ms", "compiled_step_ms", "at_largest_batch", "doubts")
    }
