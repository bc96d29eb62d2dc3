"""Files that are either whole or untouched, and records that go to JSON and back with strict checks."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from autoprec.errors import AutoprecError

__all__ = ["as_json", "from_json", "read_json", "write_atomic", "write_json"]

T = TypeVar("T")


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the previous file stays as it was.

    Raises:
        AutoprecError: the disk is full, the folder is missing or not writable.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        kept = "; the previous file is unchanged" if path.exists() else ""
        raise AutoprecError(
            f"cannot write {path}: {error.strerror or error}{kept}. Free space or choose another folder with --out."
        ) from error


def as_json(record: Any) -> Any:
    """Return the plain JSON value of a frozen record (enums as their text, tuples as lists)."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(record)).dump_python(record, mode="json")


def from_json(kind: type[T], data: Any, *, what: str, error: type[AutoprecError] = AutoprecError) -> T:
    """Build a record of `kind` from plain JSON data; unknown, missing and ill-typed fields are errors.

    Raises:
        `error`, whose message names `what` and the place of the first fault, such as `units.3.format`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as fault:
        # a misspelt field shows as one unknown and one missing: the unknown one tells more
        first = min(fault.errors(), key=lambda e: e["type"] not in ("unexpected_keyword_argument", "extra_forbidden"))
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        value = repr(first["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        raise error(f"{what} is not valid at {place}: {first['msg']} (got {value})") from None


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically; NaN and infinities are refused."""
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, *, what: str, error: type[AutoprecError] = AutoprecError) -> Any:
    """Read a JSON file; a missing, unreadable or damaged one raises `error` with the place of the fault."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{what} {path} cannot be read: {fault}") from None
    except json.JSONDecodeError as fault:
        raise error(
            f"{what} {path} is damaged or cut off: {fault.msg} at line {fault.lineno} column {fault.colno}. "
            "Write it again, or take a copy that is whole."
        ) from None
