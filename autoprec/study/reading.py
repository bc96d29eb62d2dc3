"""A run folder read back, whatever state it is in: old, unfinished, resumed, or with a file that is damaged.

Nothing is locked or written, so a folder may be read while its search runs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autoprec.errors import AutoprecError, first_line
from autoprec.files import from_json, read_json
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.quantities import DropLimit
from autoprec.records import (
    DeviceProfile,
    Measurement,
    MeasurementOrigins,
    ModelProfile,
    Origin,
    SearchResult,
    SearchSetting,
    SensitivityProfile,
    SpeedProfile,
)
from autoprec.report.run import Run, RunRow
from autoprec.study.baselines import RECOMMENDED
from autoprec.study.front import measured_front
from autoprec.study.ledger import known_of
from autoprec.study.outcome import on_one_clock
from autoprec.study.quiet import quiet_optuna
from autoprec.study.verdict import choose

__all__ = ["read_run"]

T = TypeVar("T")
_BASELINE = "baseline "


def read_run(path: Path) -> Run:
    """Return what a run folder holds; a file that cannot be read is left out, and named in `faults`."""
    faults: list[str] = []

    def record(name: str, kind: type[T], read: Callable[[Any], T] | None = None) -> T | None:
        if not (path / name).exists():
            return None
        try:
            data = read_json(path / name, what="run file")
            return read(data) if read else from_json(kind, data, what=name)
        except AutoprecError as fault:
            faults.append(f"{name} is left out: {fault}")
            return None

    result = record("result.json", SearchResult)
    rows, reference, setting = _study(path, result, faults)
    if result is not None and sum(row.trial is not None for row in rows) > result.trials:
        result = None  # of before the search was resumed
    setting = result.setting if result and result.setting else setting
    known = [row.measurement for row in rows]
    front = result.front if result else tuple(measured_front(known, _baselines(rows)))
    return Run(
        name=path.resolve().name,
        rows=tuple(rows),
        front=front,
        chosen=result.chosen if result else _fastest(front, rows, setting),
        reference=result.reference if result else reference,
        result=result,
        setting=setting,
        plan=record("plan.json", Plan, Plan.from_json) if result else None,
        device=record("device.json", DeviceProfile),
        model=record("units.json", ModelProfile),
        sensitivity=record("sensitivity.json", SensitivityProfile),
        speed=record("speed.json", SpeedProfile),
        faults=tuple(faults),
    )


def _fastest(front: Sequence[Measurement], rows: Sequence[RunRow], setting: SearchSetting | None) -> int | None:
    if setting is None:
        return None
    return choose(front, _baselines(rows), DropLimit.parse(setting.max_drop))


def _baselines(rows: Sequence[RunRow]) -> set[str]:
    """Return the names of the baselines that need no plan file to follow."""
    return {row.measurement.name for row in rows if row.trial is None} - {RECOMMENDED}


def _study(
    path: Path, result: SearchResult | None, faults: list[str]
) -> tuple[list[RunRow], Measurement | None, SearchSetting | None]:
    """Return rows on one clock, the reference and the setting: from the journal, else from the table and the result."""
    journal = path / "study.journal"
    if journal.exists() and journal.stat().st_size:
        try:
            with quiet_optuna():
                storage = JournalStorage(JournalFileBackend(str(journal)))
                names = optuna.get_all_study_names(storage)
                study = optuna.load_study(study_name=names[0], storage=storage)
                reference, setting, found = known_of(study)
        except (AutoprecError, OSError, ValueError, KeyError, IndexError) as fault:
            faults.append(f"study.journal is left out: {first_line(fault)}")
        else:
            clocked = on_one_clock([*([reference] if reference else []), *(row.measurement for row in found)])
            first = clocked[0] if reference else None
            rows = [RunRow(r.trial, m) for r, m in zip(found, clocked[bool(reference) :], strict=True)]
            return rows, first, setting
    known = {m.name: m for m in (*result.baselines, *result.front)} if result else {}
    try:
        rows = [RunRow(n, known.get(m.name, m)) for n, m in _table(path / "trials.csv")]
    except (OSError, ValueError, KeyError) as fault:
        faults.append(f"trials.csv is left out: {first_line(fault)}")
        rows = []
    if not rows and result:
        numbers = enumerate(result.front)
        rows = [RunRow(None, m) for m in result.baselines]
        rows += [RunRow(n, m) for n, m in numbers if m.name not in {b.name for b in result.baselines}]
    return rows, result.reference if result else None, None


def _table(path: Path) -> Iterator[tuple[int | None, Measurement]]:
    """Yield what `trials.csv` has of each measurement: figures without intervals."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        units = list(reader.fieldnames or ())[8:]
        for row in reader:
            name, _, reason = row["reason"].partition("; ")
            number = int(row["trial"]) if row["trial"] else None
            yield (
                number,
                Measurement(
                    name=name.removeprefix(_BASELINE) if number is None else f"trial {number}",
                    assignment={u: Format(row[u]) for u in units if row[u]},
                    drop=float(row["drop"]) if row["drop"] else None,
                    step_ms=float(row["step_ms"]) if row["step_ms"] else None,
                    peak_bytes=int(row["peak_bytes"]) if row["peak_bytes"] else None,
                    grad_error=float(row["grad_error"]) if row["grad_error"] else None,
                    origin=MeasurementOrigins(drop=Origin(row["origin"]) if row["origin"] else None),
                    reason=(reason if number is None else row["reason"]) or None,
                ),
            )
