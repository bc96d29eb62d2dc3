"""The model as a grid of units: a card for each block, a cell for each unit, with what is known of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Explained, Role, Unit
from autoprec.report.figures import interval, number, origin_note
from autoprec.report.grouping import short_modules
from autoprec.report.run import Run

__all__ = ["Block", "Cell", "Grid", "grid_of_assignment", "grid_of_plan", "grid_of_run"]

_BLOCK = re.compile(r".*?\d+")  #: a block's name ends with the first number of its units' names
_SHORT = {Role.ATTENTION: "attn", Role.EMBEDDING: "embed", Role.LM_HEAD: "head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One unit; levels from 0 to 1 colour it, and are None where nothing is known."""

    unit: str
    label: str
    format: str
    drop: str = ""
    drop_level: float | None = None
    time: str = ""
    time_level: float | None = None
    #: all that is known of it, a line each
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Units whose names share their first number, or one unit without a number."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All units in the order of the model, with what colours mean; a legend is empty where nothing is known."""

    blocks: tuple[Block, ...]
    formats: tuple[Format, ...]
    drop_legend: str = ""
    time_legend: str = ""

    @property
    def cells(self) -> list[Cell]:
        """All cells in the order of the page, which is that of a plan's formats there."""
        return [cell for block in self.blocks for cell in block.cells]


def grid_of_plan(plan: Plan) -> Grid:
    """Return the units of a plan with formats and reasons."""
    cells = [
        Cell(
            unit=u.name,
            label=_label(u.name, u.role),
            format=str(u.format),
            lines=(short_modules(u.modules), *([u.reason] if u.reason else [])),
        )
        for u in plan.units
    ]
    return Grid(blocks=_blocks(cells), formats=tuple(f for f in Format if f in plan.formats))


def grid_of_assignment(assignment: Mapping[str, Format]) -> Grid:
    """Return units of which only names and formats are known."""
    cells = [Cell(unit=n, label=_label(n, Role.OTHER), format=str(f)) for n, f in assignment.items()]
    return Grid(blocks=_blocks(cells), formats=tuple(f for f in Format if f in assignment.values()))


def grid_of_run(run: Run) -> Grid | None:
    """Return the units of a run with sensitivities and times; formats are those of the plan to use, else of FP32."""
    if run.model is None:
        return None
    now = run.best.assignment if run.best else {}
    drops, lowest = _drops(run)
    times, time_legend = _times(run)
    why = {e.unit: e for e in run.result.explained} if run.result else {}
    reach = [math.log(v) for v in drops.values() if v > 0]
    cells = []
    for unit in run.model.units:
        drop, share = drops.get(unit.name), times.get(unit.name)
        cells.append(
            Cell(
                unit=unit.name,
                label=_label(unit.name, unit.role),
                format=str(now.get(unit.name, Format.FP32)),
                drop="" if drop is None else number(drop, 2),
                drop_level=None if drop is None else _log_level(drop, reach),
                time="" if share is None else f"{100 * share:.1f} %",
                time_level=None if share is None else share / max(times.values()),
                lines=tuple(_lines(run, unit, why.get(unit.name))),
            )
        )
    used = {f for m in run.measured for f in m.assignment.values()}
    return Grid(
        blocks=_blocks(cells),
        formats=tuple(f for f in Format if f in used),
        drop_legend=f"drop of the unit alone in {lowest}, {run.unit}" if lowest else "",
        time_legend=time_legend,
    )


def _label(name: str, role: Role) -> str:
    """Return a unit's name within its block; where its role says it all, that, cut short."""
    match = _BLOCK.match(name)
    rest = name[match.end() :].strip(".") if match else name
    return _SHORT.get(role, rest or name) if rest == str(role) or match is None else rest or name


def _blocks(cells: Iterable[Cell]) -> tuple[Block, ...]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        match = _BLOCK.match(cell.unit)
        found.setdefault(match.group() if match else cell.unit, []).append(cell)
    return tuple(Block(name, tuple(own)) for name, own in found.items())


def _drops(run: Run) -> tuple[Mapping[str, float], Format | None]:
    """Return units' drops in the narrowest format that at least half of the probed units can take."""
    if run.sensitivity is None or not run.sensitivity.drops:
        return {}, None
    own = {f: {d.unit: d.drop.value for d in run.sensitivity.drops if d.format is f} for f in run.sensitivity.formats}
    most = max(len(found) for found in own.values())
    lowest = max((f for f in own if 2 * len(own[f]) >= most), key=list(Format).index)
    return own[lowest], lowest


def _times(run: Run) -> tuple[dict[str, float], str]:
    """Return units' shares of an FP32 step, and what they are."""
    if run.speed is not None:
        whole = run.speed.reference_ms.value
        own = {row.unit: row.step_ms for row in run.speed.times if row.format is Format.FP32}
        return {u: t / whole for u, t in own.items()}, "share of the FP32 step's time, measured, each unit alone"
    if run.result and run.result.reference.step_ms and Format.FP32 in run.result.unit_ms:
        whole = run.result.reference.step_ms
        own = dict(run.result.unit_ms[Format.FP32])
        return {u: t / whole for u, t in own.items()}, "share of the FP32 step's time, predicted"
    return {}, ""


def _log_level(value: float, reach: Sequence[float]) -> float:
    if value <= 0 or not reach:
        return 0.0
    low, high = min(reach), max(reach)
    return 1.0 if high == low else (math.log(value) - low) / (high - low)


def _lines(run: Run, unit: Unit, why: Explained | None) -> Iterable[str]:
    yield f"{unit.role}: {short_modules(unit.modules)}"
    if why is not None:
        yield f"why {why.format}: {why.reason}"
    for row in run.sensitivity.drops if run.sensitivity else ():
        if row.unit == unit.name:
            drop = interval(row.drop.value, (row.drop.low, row.drop.high))
            yield f"drop alone in {row.format}: {drop} {run.unit}{origin_note(row.drop.origin)}"
    for time in run.speed.times if run.speed else ():
        if time.unit == unit.name:
            reason = f": {time.reason}" if time.reason else ""
            yield f"time alone in {time.format}: {number(time.step_ms)} ms{reason}"
    if run.result:
        for choice, own in run.result.unit_ms.items():
            if unit.name in own:
                yield f"time in {choice}: {number(own[unit.name])} ms (predicted)"
        for removal in run.result.removed:
            if removal.unit == unit.name:
                yield f"{removal.format} not tried: {removal.reason}"
