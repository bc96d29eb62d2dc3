"""`autoprec verify`: a plan measured again, here, and what every operator of a step really ran in."""

from __future__ import annotations

import shlex
from typing import Any

import click

from autoprec.cli.common import (
    device_option,
    errors_console,
    json_option,
    print_json,
    quiet,
    result_console,
    workload_options,
)
from autoprec.cli.running import build_workload, plan_path
from autoprec.errors import ModelError, PlanError
from autoprec.plan import Plan

__all__ = ["command"]


@click.command("verify")
@click.argument("plan", metavar="PLAN|RUN")
@click.argument("model", required=False)
@workload_options
@device_option
@click.option("--emulate", is_flag=True, help="Formats that are not here by their rounding, without their speed.")
@click.option(
    "--train-steps", metavar="N", type=click.IntRange(min=1), show_default="not trained", help="Train it beside FP32."
)
@click.option(
    "--seeds", metavar="K", type=click.IntRange(min=2), default=8, show_default=True, help="Runs of each then."
)
@click.option("--learning-rate", metavar="X", type=float, default=1e-4, show_default=True, help="Of AdamW, then.")
@click.option(
    "--curves", metavar="F", type=click.Path(dir_okay=False), show_default="not kept", help="The loss curves, as JSON."
)
@json_option
def command(
    plan: str,
    model: str | None,
    emulate: bool,
    train_steps: int | None,
    seeds: int,
    learning_rate: float,
    curves: str | None,
    as_json: bool,
    **workload: Any,
) -> None:
    """Measure a plan again, here, and audit what it runs in.

    PLAN is a plan.json, RUN a run folder that holds one. MODEL is as for
    search; without it the plan's own.

    One step is audited, operator by operator; then the plan is measured
    beside FP32 and held against the figures it came with. Exit code 1 where
    it does not hold. Give the same data options as to the search.

    With --train-steps the plan and blanket BF16 are trained beside FP32
    from the same weights on the same batches, over K seeds, and judged on
    held-out batches against what seeds alone do.

    With --emulate and the name of a GPU that is not here, its formats are
    emulated and its times predicted; on that GPU, what was predicted is
    compared with what is measured.
    """
    from autoprec.files import as_json as plain_data
    from autoprec.files import write_json
    from autoprec.report.audits import print_verification
    from autoprec.report.progress import News

    wanted = Plan.load(plan_path(plan))
    with quiet(), News(errors_console()) as news:
        name = model or wanted.model.id
        news.doing(f"Loading {name}")
        try:
            built = build_workload(name, mode=wanted.mode, absent=emulate, **workload)
        except ModelError as error:
            if model is not None:
                raise
            raise ModelError(
                f"{error} (the model's name is the plan's; name the model yourself: "
                f"autoprec verify {shlex.quote(plan)} MODEL)"
            ) from error
        for note in built.notes:
            news.say(note)
        from autoprec.study.away import away
        from autoprec.verification import verify

        wanted, forecast = away(built, wanted, workload["device"])
        found = verify(
            built,
            wanted,
            emulate,
            forecast=forecast,
            train_steps=train_steps or 0,
            seeds=seeds,
            learning_rate=learning_rate,
            tell=news.doing,
        )
    if curves and found.training is not None:
        write_json(curves, plain_data(found.training))
    if as_json:
        print_json(plain_data(found))
    else:
        print_verification(result_console(), found)
    if not found.holds:
        raise PlanError(f"the plan does not hold here: {found.problems[0]}")
