"""The command `autoprec`: commands in the order of work, each loaded when it is called for."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from autoprec import __version__
from autoprec.errors import AutoprecError, Interrupted, UsageError

__all__ = ["main"]

_COMMANDS = ("probe", "recommend", "search", "show", "verify", "compare", "export", "doctor")


class _Commands(click.Group):
    """A group that imports a command's file on first use, and turns every error into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f"autoprec.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit: 0 done, 1 could not, 2 usage, 130 interrupted."""
        _forgive_encodings()
        # importing torch and transformers makes a million objects and no garbage; looking for it took a seventh of
        # the time that `recommend` needs
        gc.set_threshold(100_000, 20, 20)
        try:
            code = super().main(args, prog_name or "autoprec", complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except Exception as error:
            code = _report(error)
        except KeyboardInterrupt:
            code = _report(click.Abort())
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Say on stderr what went wrong, and return the exit code."""
    if os.environ.get("AUTOPREC_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # the reader (such as `head`) has left; what is buffered must not be flushed into the void at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.Abort):
        click.echo("Interrupted.", err=True)
        return 130
    if isinstance(error, Interrupted):
        click.echo(str(error), err=True)
        return 130
    if isinstance(error, AutoprecError):
        click.echo(f"Error: {error}", err=True)
        return 2 if isinstance(error, UsageError) else 1
    text = " ".join(str(error).split())
    advice = "run with AUTOPREC_DEBUG=1 for the traceback"
    click.echo(f"Error: unexpected {type(error).__name__}: {text[:300]}; {advice}", err=True)
    return 1


def _forgive_encodings() -> None:
    """Print '?' for what a terminal without UTF-8 cannot show, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@click.group(
    "autoprec", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80}
)
@click.version_option(__version__, prog_name="autoprec")
def main() -> None:
    """Find the number format each layer of a transformer should compute in.

    Every figure was measured on this machine, or says where it came from.
    Results go to stdout, progress to stderr.

    \b
        autoprec recommend MODEL               # seconds: facts and rules
        autoprec search MODEL --budget 2h      # measured, better
        autoprec export plan.json --to python  # the plan as code
    """


if __name__ == "__main__":
    main()
