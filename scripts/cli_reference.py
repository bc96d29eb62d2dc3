"""Write docs/cli.md from what `--help` prints, command by command."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.testing import CliRunner

from autoprec.cli.main import main

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
#: of the help's text; a terminal's usual width
_COLUMNS = 80

_HEAD = """# The command line

What each command prints with `--help`; written by `scripts/cli_reference.py`. The result goes to stdout (with `--json`,
exactly one JSON document), progress to stderr. Exit codes: 0 done, 1 could not (the message says why and what to try),
2 usage, 130 interrupted (what was measured is kept, and the line that resumes is printed).
"""


def page() -> str:
    """Return the page as it should be."""
    assert isinstance(main, click.Group)
    names = main.list_commands(click.Context(main))
    return "\n".join([_HEAD, _help(), *(f"## autoprec {name}\n\n{_help(name)}" for name in names)])


def _help(*command: str) -> str:
    done = CliRunner(env={"COLUMNS": str(_COLUMNS)}).invoke(main, [*command, "--help"], prog_name="autoprec")
    assert done.exit_code == 0, done.output
    return _block(done.output)


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.name} written\n")
