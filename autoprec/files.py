"""Files that are either whole or untouched, and records that go to JSON and back with strict checks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autoprec.errors import AutoprecError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["DEEPEST", "as_json", "from_json", "read_json", "read_limited", "write_atomic", "write_json"]

T = TypeVar("T")

#: no file of ours comes near: the plan of a model of 10,000 units has 2 MB, its result with 1,000 plans a front 200 MB
LARGEST_BYTES = 256 << 20
#: nor does any record nest deeper than 10
DEEPEST = 64


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the previous file stays as it was.

    Raises:
        AutoprecError: the disk is full, the folder is missing or not writable.
    """
    path = Path(path)
    temporary = None
    try:
        data = content.encode() if isinstance(content, str) else content
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        temporary = None
    except (OSError, ValueError) as error:  # ValueError: a text or a path that no file can hold
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise AutoprecError(
            f"cannot write {path}: {why}{_kept(path)}. Free space or choose another folder with --out."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_limited(path: Any, largest_bytes: int = LARGEST_BYTES) -> str:
    """Return the text of a file, or of a resource that opens like one, if it is not too large to be what it should be.

    Raises:
        OSError, ValueError: it cannot be read, is no UTF-8, or is too large.
    """
    with path.open("rb") as file:
        data: bytes = file.read(largest_bytes + 1)
    if len(data) > largest_bytes:
        raise ValueError(f"it is larger than {largest_bytes >> 20} MiB")
    return data.decode("utf-8")


def _kept(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return "; the previous file is unchanged" if path.exists() else ""
    return ""


def as_json(record: Any) -> Any:
    """Return the plain JSON value of a frozen record (enums as their text, tuples as lists).

    Raises:
        AutoprecError: a free field, such as `training_arguments`, holds what JSON cannot.
    """
    try:
        return _adapter(type(record)).dump_python(record, mode="json")
    except ValueError as fault:
        raise AutoprecError(f"{type(record).__name__} cannot be written as JSON: {fault}") from None


def from_json(kind: type[T], data: Any, *, what: str, error: type[AutoprecError] = AutoprecError) -> T:
    """Build a record of `kind` from plain JSON data; unknown, missing and ill-typed fields are errors.

    Raises:
        `error`, whose message names `what` and the place of the first fault, such as `units.3.format`.
    """
    from pydantic import ValidationError

    try:
        record: T = _adapter(kind).validate_json(json.dumps(data, allow_nan=False), strict=True)
        return record
    except ValidationError as fault:
        # a misspelt field shows as one unknown and one missing: the unknown one tells more
        first = min(fault.errors(), key=lambda e: e["type"] not in ("unexpected_keyword_argument", "extra_forbidden"))
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        value = repr(first["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        raise error(f"{what} is not valid at {place}: {first['msg']} (got {value})") from None
    except AutoprecError as fault:  # from a check of the record itself
        raise error(f"{what} is not valid: {fault}") from None
    except (TypeError, ValueError, RecursionError) as fault:  # json.dumps met what is no JSON
        if "Out of range" in str(fault):  # json's words for NaN and infinities; other data may hold itself
            place, figure = next(_not_finite(data))
            raise error(f"{what} is not valid at {place}: {figure} is no finite number") from None
        raise error(f"{what} is not valid: {fault}") from None


def _not_finite(data: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield the places of NaN and infinities, which JSON does not have."""
    if isinstance(data, float) and not math.isfinite(data):
        yield place.removeprefix("."), data
    elif isinstance(data, Mapping | list | tuple):
        for key, inner in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _not_finite(inner, f"{place}.{key}")


_adapters: dict[Any, TypeAdapter[Any]] = {}  #: building one reads all the types of a record, so once each


def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically.

    Raises:
        AutoprecError: as `write_atomic`, or NaN or an infinity is in the data, which JSON does not have.
    """
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as fault:
        raise AutoprecError(f"cannot write {path}: {fault}{_kept(Path(path))}") from None
    write_atomic(path, text + "\n")


def read_json(path: str | Path, *, what: str, error: type[AutoprecError] = AutoprecError) -> Any:
    """Read a JSON file; a missing, unreadable or damaged one raises `error` with the place of the fault."""
    path = Path(path)
    again = "Write it again, or take a copy that is whole."
    try:
        text = read_limited(path)
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as fault:
        raise error(f"{what} {path} cannot be read: {fault}") from None
    try:
        data = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_constant)
        _check_depth(data)
        return data
    except json.JSONDecodeError as fault:
        raise error(
            f"{what} {path} is damaged or cut off: {fault.msg} at line {fault.lineno} column {fault.colno}. {again}"
        ) from None
    except (ValueError, RecursionError) as fault:
        raise error(f"{what} {path} is damaged: {fault}. {again}") from None


def _check_depth(data: Any) -> None:
    """Refuse what nests so deep that whoever walks through it later runs out of stack."""
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it nests deeper than {DEEPEST} levels")
        inner = (d.values() if isinstance(d, dict) else d for d in level if isinstance(d, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice in an object; json would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(n for n in names if names.count(n) > 1)}' stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
