"""Text files of users, read with a bound, and refused with a reason where they are no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoprec.errors import DataError

__all__ = ["UserText", "read_text"]

#: a log of a week is longer; its beginning says the settings and its end the failure
_HEAD_BYTES = 8 << 20
_TAIL_BYTES = 24 << 20
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive (or a checkpoint)", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle",
    b"\x1f\x8b": "a gzip file (unpack it first)", b"\x7fELF": "a program", b"%PDF": "a PDF", b"\x89PNG": "a picture",
}  # fmt: skip
#: share of control characters from which bytes are no text; terminals' own (colours, bells) stay far below
_CONTROL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class UserText:
    """A file's text; `cut` says what was left out of a huge one."""

    path: str
    text: str
    cut: str | None = None


def read_text(path: str | Path, *, what: str) -> UserText:
    """Read a text file; of one beyond 32 MB the beginning and the end.

    Raises:
        DataError: it is missing, no file, not readable, empty, or binary.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{what} {path} is a folder; give the file in it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES if size > _HEAD_BYTES + _TAIL_BYTES else _HEAD_BYTES + _TAIL_BYTES)
            end = b""
            if size > _HEAD_BYTES + _TAIL_BYTES:
                file.seek(size - _TAIL_BYTES)
                end = file.read(_TAIL_BYTES)
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist. Check the path.") from None
    except (OSError, ValueError) as fault:
        why = (fault.strerror if isinstance(fault, OSError) else None) or fault
        raise DataError(f"{what} {path} cannot be read: {why}") from None
    _refuse_binary(data, what, path)
    text = _decoded(data) + ("\n" + _decoded(end).partition("\n")[2] if end else "")
    if not text.strip():
        raise DataError(f"{what} {path} is empty. Give the file that the run wrote.")
    megabytes = round((size - len(data) - len(end)) / 1e6)
    cut = f"{path}: {megabytes} MB in the middle were not read (the file has {round(size / 1e6)} MB)" if end else None
    return UserText(path=str(path), text=text, cut=cut)


def _decoded(data: bytes) -> str:
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):  # what PowerShell's > writes
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    return data.decode("utf-8-sig", errors="replace")


def _refuse_binary(data: bytes, what: str, path: Path) -> None:
    kind = next((name for mark, name in _SIGNATURES.items() if data.startswith(mark)), None)
    sample = data[:65536]
    if kind is None and not sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        control = sum(byte < 9 or 13 < byte < 27 or 27 < byte < 32 for byte in sample)
        if b"\0" in sample or control > _CONTROL * len(sample):
            kind = "binary"
    if kind is not None:
        raise DataError(f"{what} {path} is {kind}, not text. Give the text that the run printed or was given.")
