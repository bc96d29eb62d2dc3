"""How pages are laid out on a console: headings, indented lines, tables that fit, facts on one line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoprec.report.figures import plain

__all__ = ["INDENT", "Column", "print_facts", "print_heading", "print_line", "print_table"]

#: title and alignment of a column
Column = tuple[str, Literal["left", "right"]]

INDENT = 2


def print_table(
    console: Console, columns: Sequence[Column], rows: Iterable[Sequence[str]], marked: int | None = None
) -> None:
    """Print an indented table with one row set off; where it is tight, the widest columns wrap first."""
    rows = [[plain(cell) for cell in row] for row in rows]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.show_header = any(title for title, _ in columns)
    cells = [[title, *(row[index] for row in rows)] for index, (title, _) in enumerate(columns)]
    widths = _widths(cells, console.width - INDENT - 2 * (len(columns) - 1))
    for (title, align), width in zip(columns, widths, strict=True):
        table.add_column(Text(title), justify=align, width=width, overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="bold green" if index == marked else "")
    print_line(console, table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return a width for each column of cells: words whole as long as they fit, then names are torn.

    rich's own layout lets a table run over the edge, and loses the text there, once least widths are given.
    """
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    for least in (words, [min(w, 12) for w in words], [1] * len(words)):
        while sum(widths) > room:
            index = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > least[i] else 0)
            if widths[index] <= least[index]:
                break
            widths[index] -= 1
    return widths


def print_heading(console: Console, title: str, note: str = "") -> None:
    console.print(Text.assemble((plain(title), "bold"), "  " if note else "", plain(note)))


def print_line(console: Console, content: Table | str) -> None:
    console.print(
        Padding(Text(plain(content)) if isinstance(content, str) else content, (0, 0, 0, INDENT), expand=False)
    )


def print_facts(console: Console, title: str, facts: Mapping[str, Any], joint: str = " ") -> None:
    """Print named facts on one line that wraps between facts: 'Settings  ambient bf16, tf32 off'."""
    shown = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in facts.items()}
    print_heading(console, title, ", ".join(f"{k}{joint}{v}" for k, v in shown.items()))
