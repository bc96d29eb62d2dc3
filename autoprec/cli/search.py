"""`autoprec search`: measure plans until the budget is spent, and say which to use."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from autoprec.cli.common import (
    device_option,
    errors_console,
    json_option,
    max_drop_option,
    mode_option,
    print_json,
    quiet,
    result_console,
    typed_options,
    workload_options,
)
from autoprec.cli.running import device_here, model_of_run, new_run, newest_run, read_settings
from autoprec.errors import Interrupted, UsageError, closest, without_password
from autoprec.quantities import DropLimit, duration_seconds
from autoprec.records import SearchResult

if TYPE_CHECKING:
    from autoprec.study.protocol import Loading
    from autoprec.study.worker import Worker

__all__ = ["command"]

_WORKLOAD = (
    "data",
    "task",
    "batch_size",
    "seq_len",
    "batches",
    "metric",
    "trust_remote_code",
    "mode",
    "device",
    "seed",
)


@click.command("search")
@click.argument("model", required=False)
@workload_options
@click.option(
    "--budget",
    metavar="T",
    default="20m",
    show_default=True,
    help="Wall-clock time for everything: 90s, 45m, 2h, 1h30m.",
)
@click.option(
    "--trials", metavar="N", type=click.IntRange(min=1), show_default="no limit", help="Stop after so many trials."
)
@device_option
@mode_option
@max_drop_option
@click.option(
    "--space",
    metavar="NAME|FILE",
    default="default",
    show_default=True,
    help="What may be chosen: default, blocks, roles, modules, or a TOML file.",
)
@click.option(
    "--storage",
    metavar="URL",
    show_default="a journal in the run folder",
    help="Optuna storage, as postgresql://user@host/base; machines may share it.",
)
@click.option("--resume", is_flag=True, help="Go on with --out, or the model's newest run here; join in --storage.")
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that measure, each with the model: drops side by side, times in turns.",
)
@click.option(
    "--force", is_flag=True, help="With --resume: measure all again where model, data, torch or device differ."
)
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Seed of data order and sampling.")
@click.option("--no-learn", is_flag=True, help="Keep what is found out of the table `recommend` learns from.")
@click.option("--out", metavar="DIR", show_default="autoprec-runs/<time>-<model>", help="Run folder.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Search for better plans by measuring them.

    MODEL is a Hugging Face id or local folder, 'demo', or file.py:function
    returning a Workload or nn.Module. Without MODEL: that of ./autoprec.toml
    (one table, keys = the long options, all of which then apply), else that
    of the newest run folder here, else 'demo'.

    Ctrl-C keeps what was measured and prints the line that resumes.
    """
    started = time.monotonic()
    options = _settled(ctx, given)
    duration_seconds(options["budget"])  # a slip of the pen is told before a model is loaded
    DropLimit.parse(options["max_drop"])
    if options["force"] and not options["resume"]:
        raise UsageError("--force measures an earlier search again, so it goes with --resume.")
    model, folder = options["model"], _folder(options)
    from autoprec.report.progress import News

    console = errors_console()
    try:
        with quiet(), News(console, front=sys.stdout.isatty()) as news, contextlib.ExitStack() as watch:
            news.say(options["said"] or f"Searching {model}")
            news.doing(f"Loading {model}")
            loading, workers = _begin(options)
            for worker in workers:
                watch.enter_context(worker)
            # the worker has the device; what is loaded here tells only what the model is
            workload = loading.load("cpu")
            for note in workload.notes:
                news.say(note)
            news.say(f"Measuring for {options['budget']}; Ctrl-C keeps what was measured, in {folder}")
            from autoprec.study.run import search

            result = search(
                workload,
                budget=options["budget"],
                trials=options["trials"],
                max_drop=options["max_drop"],
                space=options["space"],
                device=options["device"],
                storage=options["storage"],
                seed=options["seed"],
                out=folder,
                resume=options["resume"],
                learn=not options["no_learn"],
                force=options["force"],
                progress=news,
                spent_seconds=time.monotonic() - started,
                command=_line(ctx, options | {"storage": options["storage"] and without_password(options["storage"])}),
                workers=workers,
            )
    except Interrupted as stop:
        where = stop.folder or str(folder)
        if isinstance(stop.result, SearchResult):
            _show(stop.result, Path(where), as_json=options["as_json"])
        line = _line(ctx, options, "--resume", "--out", where)
        raise Interrupted(
            f"Interrupted; what was measured is in {where}. Go on with:\n  {line}", folder=where
        ) from None
    _show(result, folder, as_json=options["as_json"])


def _begin(options: dict[str, Any]) -> tuple[Loading, list[Worker]]:
    """Return how the workload is loaded, and the processes to measure in, which import while this one loads."""
    import torch

    from autoprec.study.protocol import Loading
    from autoprec.study.worker import Worker

    named = {name: options[name] for name in _WORKLOAD if name != "device"}
    here = device_here(options["model"], options["device"], absent=True)
    loading = Loading(model=options["model"], device=here, **named)
    count = options["workers"]
    threads = max(1, torch.get_num_threads() // count)
    return loading, [Worker(loading, threads) for _ in range(count)]


def _settled(ctx: click.Context, given: dict[str, Any]) -> dict[str, Any]:
    """Return all options with the model decided, and under `said` where it came from."""
    if given["model"] is not None:
        return given | {"said": ""}
    resumed = model_of_run(Path(given["out"])) if given["resume"] and given["out"] else None
    if resumed is not None:
        return given | {"model": resumed, "said": f"Searching {resumed}, the model of {given['out']}"}
    settings = read_settings()
    if settings is not None:
        given = given | _from_settings(ctx, settings)
        if given["model"] is not None:
            return given | {"said": f"Searching {given['model']}, the model of ./autoprec.toml"}
    run = newest_run()
    model = model_of_run(run) if run else None
    if model is not None:
        return given | {"model": model, "said": f"Searching {model}, the model of the newest run here ({run})"}
    return given | {
        "model": "demo",
        "said": "Searching demo, the model that ships with autoprec; name yours to search it",
    }


def _from_settings(ctx: click.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options that ./autoprec.toml sets and the command line does not.

    Raises:
        UsageError: a key that is no long option, or a value that its option cannot take.
    """
    by_key = {"model": "model"}
    for parameter in ctx.command.params:
        by_key |= {name[2:]: parameter.name or "" for name in parameter.opts if name.startswith("--")}
    parameters = {parameter.name: parameter for parameter in ctx.command.params}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in by_key:
            raise UsageError(f"./autoprec.toml sets '{key}', which is no option of search{closest(key, by_key)}")
        name = by_key[key]
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            try:
                found[name] = parameters[name].type_cast_value(ctx, value)
            except click.BadParameter as fault:
                raise UsageError(f"./autoprec.toml sets {key} = {value!r}: {fault.message}") from None
    return found


def _folder(options: dict[str, Any]) -> Path:
    """Return the run folder: the one named, the newest of this model when resuming, else a new one."""
    if options["out"]:
        return Path(options["out"])
    earlier = newest_run(options["model"]) if options["resume"] else None
    return earlier or new_run(options["model"])


def _show(result: SearchResult, folder: Path, *, as_json: bool) -> None:
    """Print a result: tables, verdict and paths; or its JSON alone."""
    if as_json:
        from autoprec.files import as_json as plain_data

        print_json(plain_data(result))
        return
    from autoprec.report.terminal import print_paths, print_result

    console = result_console()
    print_result(console, result)
    files = {"plan": folder / "plan.json", "result": folder / "result.json", "report": folder / "report.html"}
    files["run folder"] = folder
    paths = {name: str(path) for name, path in files.items() if path.exists()}
    print_paths(console, paths | ({f"on {result.device}, to confirm": result.confirm} if result.confirm else {}))


def _line(ctx: click.Context, options: dict[str, Any], *more: str) -> str:
    """Return the command of this search with its model decided: what was typed, but --resume and --out, and `more`."""
    words = ["search", options["model"], *typed_options(ctx, options, but=("resume", "force", "out")), *more]
    return shlex.join(["autoprec", *words])
