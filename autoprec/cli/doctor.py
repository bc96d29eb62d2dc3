"""`autoprec doctor`: troubles with number formats, found in a model, its settings, its log, or a few steps of it."""

from __future__ import annotations

import click

from autoprec.cli.common import device_option, errors_console, json_option, print_json, quiet, result_console

__all__ = ["command"]


@click.command("doctor")
@click.argument("model", required=False)
@click.option(
    "--args",
    "settings",
    metavar="FILE",
    multiple=True,
    show_default="none",
    help="Training arguments, a DeepSpeed or accelerate file, a launch or Python script.",
)
@click.option("--log", "logs", metavar="FILE", multiple=True, show_default="none", help="A log or a traceback.")
@click.option("--trace", is_flag=True, help="Run a few steps of MODEL and look at its values.")
@device_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    settings: tuple[str, ...],
    logs: tuple[str, ...],
    trace: bool,
    device: str,
    as_json: bool,
) -> None:
    """Find what is wrong with a model, a run or a log.

    MODEL is a model or checkpoint folder, a Hugging Face id, 'demo', or
    file.py:function returning a Workload or nn.Module. Give any of MODEL,
    --args and --log, together where they are of one run; --args and --log
    may be repeated. Scripts given to --args are read, never run.

    Each finding has a code, what was seen, and a line to paste; all of them
    are in docs/doctor.md. With --trace: the first unit whose values are not
    finite, the largest activation of each, the gradients that FP16 would
    lose, a loss scale, and the time spent waiting for data.

    Exit code 1 where something is broken (an error, not a warning).
    """
    from autoprec.files import as_json as plain_data
    from autoprec.report.progress import News

    with quiet(), News(errors_console()) as news:
        from autoprec.doctor.diagnosis import diagnose

        found = diagnose(model, settings=settings, logs=logs, trace=trace, device=device, tell=news.doing)
    if as_json:
        print_json(plain_data(found))
    else:
        from autoprec.report.diagnosis import print_diagnosis

        print_diagnosis(result_console(), found)
    if found.broken:
        ctx.exit(1)
