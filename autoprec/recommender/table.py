"""The table that the decision tree is fitted on: one row a unit of a solved front, or of a finished search.

The shipped part is `profiles/runs/*.csv`; the user's own is below XDG_DATA_HOME. A row holds shapes and figures only,
no names of models. Rows that cannot be are left out, counted and said.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.catalog import data_files
from autoprec.errors import AutoprecError
from autoprec.files import write_atomic
from autoprec.recommender.measures import FEATURES, SEEN
from autoprec.records import Role

if TYPE_CHECKING:
    import pandas

__all__ = [
    "COLUMNS",
    "DROPS",
    "LABELS",
    "Tables",
    "add_rows",
    "as_csv",
    "read_tables",
    "shipped_texts",
    "table_digest",
    "user_table",
]

#: what a unit was given: FP32, the 16-bit format of the device, FP8
LABELS = ("fp32", "half", "fp8")
#: columns of the drop, in percent, that the unit alone causes in a format; empty where it is not known
DROPS = ("bf16", "fp16", "fp8")
#: `origin` says where a row is from, `group` what is left out together (a model's number; empty in a user's rows),
#: `stake` how much of the step, in percent, the choice is about
COLUMNS = ("origin", "group", "device", "role", *FEATURES, *(f"drop_{f}" for f in DROPS), "stake", "label")
#: rows kept of the user's own, the newest: as many as the shipped table has at most
_MOST = 20_000
_ORIGINS = ("solved", "search")


@dataclass(frozen=True, slots=True)
class Tables:
    """Rows that can be used, and what was left out of each file, as sentences."""

    rows: pandas.DataFrame
    notes: tuple[str, ...]


def user_table() -> Path:
    """Return the user's own table: $XDG_DATA_HOME/autoprec/runs.csv, else below ~/.local/share."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "autoprec" / "runs.csv"


def read_tables(texts: Mapping[str, str]) -> Tables:
    """Return the usable rows of some tables, given as the text of each by a name for messages."""
    import pandas

    parts, notes = [], []
    for name, text in texts.items():
        rows, said = _usable(name, text)
        parts.append(rows)
        notes += said
    return Tables(pandas.concat(parts, ignore_index=True), tuple(notes))


def shipped_texts() -> dict[str, str]:
    """Return the text of each shipped table."""
    files = data_files("profiles", "runs", ending=".csv")
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


def table_digest(texts: Mapping[str, str]) -> str:
    """Return the sha256 of tables, which tells whether a tree was fitted on them."""
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a head, figures to four digits."""
    import pandas

    return _as_text(pandas.DataFrame(list(rows), columns=list(COLUMNS)))


def add_rows(rows: Sequence[Mapping[str, Any]]) -> Path:
    """Add rows to the user's own table, of which the newest are kept, and return its path.

    What is there and cannot be used is left out. Raises AutoprecError where it cannot be written.
    """
    path = user_table()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise AutoprecError(f"cannot make the folder {path.parent}: {fault.strerror}") from None
    lines = as_csv(rows).splitlines()
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        if text.partition("\n")[0] != lines[0]:  # of an older version: what can be used of it is kept
            text = _as_text(_usable(str(path), text)[0])
        lines = [lines[0], *[*text.splitlines()[1:], *lines[1:]][-_MOST:]]
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def _as_text(frame: pandas.DataFrame) -> str:
    return str(frame.to_csv(index=False, float_format="%.4g", lineterminator="\n"))


def _usable(name: str, text: str) -> tuple[pandas.DataFrame, list[str]]:
    """Return the rows of one table that can be, and what to say of the others."""
    import pandas

    empty = pandas.DataFrame(columns=list(COLUMNS))
    try:
        rows = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, on_bad_lines="skip")
    except (ValueError, pandas.errors.ParserError) as fault:
        return empty, [f"table {name} is no CSV and is not used: {str(fault).splitlines()[0]}"]
    lines = sum(1 for line in text.splitlines() if line.strip()) - 1
    if missing := [c for c in COLUMNS if c not in rows.columns and c not in SEEN]:
        return empty, [f"table {name} lacks column '{missing[0]}' and is not used ({lines} rows)"]
    rows = rows.assign(**{c: "" for c in SEEN if c not in rows.columns})[list(COLUMNS)]
    unseen = {c: rows[c] == "" for c in SEEN}
    numbers = [*FEATURES, *(f"drop_{f}" for f in DROPS), "stake"]
    rows = rows.assign(**{c: pandas.to_numeric(rows[c], errors="coerce") for c in numbers})
    good = rows["label"].isin(LABELS) & rows["origin"].isin(_ORIGINS) & rows["role"].isin([str(r) for r in Role])
    for column in (*FEATURES, "stake"):
        good &= rows[column].between(-1e12, 1e12) | unseen.get(column, False)
    for column in (f"drop_{f}" for f in DROPS):
        good &= rows[column].isna() | rows[column].between(0, 1e12)
    kept = rows[good].head(_MOST)
    bad = lines - int(good.sum())
    return kept, [f"table {name}: {bad} of {lines} rows are damaged or foreign and are not used"] if bad else []
