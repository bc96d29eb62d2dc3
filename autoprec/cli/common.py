"""What the commands share: the options of a workload, consoles, JSON, and quiet libraries."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from autoprec.errors import AutoprecError
from autoprec.records import Mode, Task

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "device_option",
    "errors_console",
    "folder",
    "json_option",
    "max_drop_option",
    "mode_option",
    "print_json",
    "quiet",
    "result_console",
    "trust_option",
    "typed_options",
    "workload_options",
]

F = TypeVar("F", bound=Callable[..., Any])

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
device_option = click.option(
    "--device",
    metavar="D",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda[:i], mps, xpu, or a catalogued name such as h100-sxm.",
)
mode_option = click.option(
    "--mode",
    type=click.Choice([m.value for m in Mode]),
    show_default="train",
    help="One step: forward, backward and optimizer; or forward only.",
)
max_drop_option = click.option(
    "--max-drop",
    metavar="X",
    default="0.25%",
    show_default=True,
    help="Largest quality drop allowed: % of the loss, or nats (0.005).",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model. Only if you trust it."
)


def workload_options(command: F) -> F:
    """Add the options that say what a model is run on."""
    options = [
        click.option("--data", metavar="F", show_default="a shipped text", help="Text, or JSONL with text and label."),
        click.option(
            "--task",
            type=click.Choice(["auto", *(t.value for t in Task)]),
            metavar="TASK",
            default="auto",
            show_default=True,
            help=f"auto, {', '.join(t.value for t in Task)}.",
        ),
        click.option(
            "--batch-size",
            metavar="N",
            type=click.IntRange(min=1),
            show_default="8; 2 from 50 M parameters on",
            help="Examples a batch.",
        ),
        click.option(
            "--seq-len", metavar="N", type=click.IntRange(min=2), show_default="128", help="Tokens an example."
        ),
        click.option(
            "--batches", metavar="N", type=click.IntRange(min=1), show_default="8", help="Batches to measure on."
        ),
        click.option("--metric", metavar="F:NAME", help="Your metric, file.py:function; reported beside the drop."),
        trust_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def result_console() -> Console:
    """Return the console of results: stdout."""
    return _console(sys.stdout)


def errors_console() -> Console:
    """Return the console of progress: stderr."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    from rich.console import Console

    return Console(file=file, markup=False, highlight=False, emoji=False)


def print_json(data: Any) -> None:
    """Print one JSON document; NaN and infinities are refused."""
    click.echo(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def typed_options(ctx: click.Context, options: Mapping[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Return a command's options as words to type: those that were typed or differ from their default, save `but`."""
    words = list[str]()
    for parameter in ctx.command.params:
        name, flag = parameter.name or "", parameter.opts[-1]
        value = options.get(name)
        if not isinstance(parameter, click.Option) or name in but or value is None or value is False:
            continue
        typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if typed or value != parameter.get_default(ctx):
            words += [flag] if value is True else [flag, str(value)]
    return words


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries and users' own code off stdout, and their bars and warnings off stderr, while work is done.

    AUTOPREC_DEBUG lets warnings through.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not os.environ.get("AUTOPREC_DEBUG"):
            warnings.simplefilter("ignore")
            logging.getLogger("torch").setLevel(logging.ERROR)
        yield


def folder(path: str) -> Path:
    """Return `path` as a folder that exists, making it if need be.

    Raises:
        AutoprecError: it is a file, or may not be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutoprecError(
            f"--out {path} cannot be used as a folder: {error.strerror}. Choose another folder."
        ) from None
    return Path(path)
