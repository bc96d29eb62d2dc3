"""Where a search stands, as a panel that is drawn anew: baselines, the front with the best plan, and the time left."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoprec.quantities import duration_text
from autoprec.records import Measurement, Progress, Standing
from autoprec.report.figures import format_counts, interval, number, plain, where_from

__all__ = ["front_panel", "left_text", "time_text"]

#: columns from which on intervals, and then the units' formats, have room beside a name
_MIDDLE, _WIDE = 72, 100
#: rows of the front that are always shown, however low the window is
_FEWEST = 3
#: lines beside the rows: headings, titles, what is under way, and one for the cursor
_BESIDE = 7
#: letters of a name that are always shown
_NAME = 6


def front_panel(standing: Standing, width: int, height: int) -> RenderableType:
    """Return the panel, a line for each plan: none wider than `width`, and together about `height` at most."""
    front, room = standing.front, max(_FEWEST, height - _BESIDE)
    others = [m for m in standing.baselines if m.name not in {f.name for f in front}]
    done = [m for m in others if m.drop is not None or m.step_ms is not None]
    stopped = [m for m in others if m not in done]
    left = max(0, room - min(len(front), max(_FEWEST, room // 2)))
    done = done[:left]
    stopped = stopped[: max(0, left - len(done))]
    parts: list[RenderableType] = []
    if done or stopped:
        parts.append(_line("Baselines", "not on the front, or not run", width))
        parts += [_table(done, standing, width, None)] if done else []
        parts += [_line("", f"{m.name}: {m.reason}", width) for m in stopped]
    shown, marked = _around(front, standing.chosen, max(_FEWEST, room - len(done) - len(stopped)))
    part = f"{len(shown)} of {len(front)}, " if len(shown) < len(front) else ""
    parts.append(_line("Front", part + _about(standing), width))
    parts += [_table(shown, standing, width, marked)] if shown else []
    return Group(*parts)


def time_text(progress: Progress) -> str:
    """Return how far a search is, and until when it goes on: the clock stays right while a line is not drawn anew."""
    gone = f"{duration_text(progress.elapsed_seconds)} gone"
    if progress.eta_seconds is None:
        return gone
    until = (datetime.datetime.now() + datetime.timedelta(seconds=progress.eta_seconds)).strftime("%H:%M:%S")
    return f"{gone}, {left_text(progress)}, until {until}{' at the latest' if progress.at_most else ''}"


def left_text(progress: Progress) -> str:
    """Return how long it goes on; where the budget's end is all that can be told, that is the most."""
    return f"{'at most' if progress.at_most else 'about'} {duration_text(progress.eta_seconds or 0.0)} left"


def _about(standing: Standing) -> str:
    where = where_from((*standing.baselines, *standing.front))
    trials = f"{standing.trials} trial{'s' * (standing.trials != 1)}"
    if standing.chosen is None:
        return f"{trials}; none within {standing.limit} is faster than FP32 yet; {where}"
    return f"{trials}; best within {standing.limit}: {standing.front[standing.chosen].name}; {where}"


def _around(front: Sequence[Measurement], chosen: int | None, room: int) -> tuple[Sequence[Measurement], int | None]:
    """Return as much of the front as there is room for, with the best plan in it, and that one's place."""
    start = 0 if chosen is None else min(max(0, chosen - room // 2), max(0, len(front) - room))
    return front[start : start + room], None if chosen is None else chosen - start


def _line(title: str, note: str, width: int) -> Text:
    text = Text.assemble((title, "bold"), "  ", plain(note), no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    return text


def _table(rows: Sequence[Measurement], standing: Standing, width: int, marked: int | None) -> Table:
    """Return a line for each plan; where it is tight, intervals and units are left out, then names are cut."""
    wide, middle = width >= _WIDE, width >= _MIDDLE
    titles = ["", "plan", f"drop, {standing.drop_unit}", "step, ms"]
    titles += ["speedup"] * middle + ["units"] * wide
    cells = [_cells(m, ">" if index == marked else " ", wide=wide, middle=middle) for index, m in enumerate(rows)]
    widths = [max(map(cell_len, column)) for column in zip(titles, *cells, strict=True)]
    widths[1] = min(widths[1], max(_NAME, width - 2 * (len(titles) - 1) - sum(widths) + widths[1]))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, title in enumerate(titles):
        right = 1 < index < len(titles) - wide
        table.add_column(Text(title), justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for index, row in enumerate(cells):
        row[1] = row[1] if cell_len(row[1]) <= widths[1] else set_cell_size(row[1], widths[1] - 1) + "…"
        table.add_row(*(Text(cell) for cell in row), style="bold green" if index == marked else "")
    return table


def _cells(m: Measurement, mark: str, *, wide: bool, middle: bool) -> list[str]:
    ends = (m.drop_ci95, m.step_ms_ci95) if middle else (None, None)
    cells = [mark, plain(m.name), interval(m.drop, ends[0]), interval(m.step_ms, ends[1])]
    if middle:
        cells.append("-" if m.speedup is None else f"{number(m.speedup)}x")
    return [*cells, format_counts(m.assignment)] if wide else cells
