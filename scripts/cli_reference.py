"""Write docs/cli.md from what `--help` prints, command by command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

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
    group = main
    assert isinstance(group, click.Group)
    top = click.Context(group, info_name="autoprec", terminal_width=_COLUMNS, max_content_width=_COLUMNS)
    parts = [_HEAD, _block(group.get_help(top))]
    for name in group.list_commands(top):
        command = group.get_command(top, name)
        assert command is not None
        with click.Context(command, info_name=name, parent=top) as context:
            parts.append(f"## autoprec {name}\n\n{_block(command.get_help(context))}")
    return "\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.name} written\n")
