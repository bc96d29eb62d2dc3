"""Files are whole or untouched, and records are read strictly."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoprec.errors import AutoprecError, DataError
from autoprec.files import as_json, from_json, read_json, write_atomic, write_json
from autoprec.records import Measurement, MeasurementOrigins, Origin, Pinned, Verdict, VerdictDecision


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_atomic_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt"]


def test_write_atomic_makes_readable_files_and_keeps_the_mode_of_a_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "one")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    write_atomic(path, "two")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(AutoprecError, match=r"cannot write .*absent/a\.txt: No such file or directory\. Free space"):
        write_atomic(tmp_path / "absent" / "a.txt", "text")


def test_a_folder_in_the_way_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.mkdir()
    with pytest.raises(AutoprecError, match="cannot write"):
        write_atomic(path, "text")
    assert names(tmp_path) == ["a.txt"] and path.is_dir()


def test_a_read_only_folder_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):  # root writes anywhere, so the system's answer is given for it

            def refuse(*_: object, **__: object) -> tuple[int, str]:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

            monkeypatch.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(AutoprecError, match="Permission denied; the previous file is unchanged"):
            write_atomic(path, "after")
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_is_stopped_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else AutoprecError):
        write_atomic(path, "after")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_text_that_no_file_can_hold_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AutoprecError, match="cannot write"):
        write_json(tmp_path / "a.json", {"name": "\ud800"})
    with pytest.raises(AutoprecError, match="cannot write"):
        write_atomic("a\0.json", "text")
    assert not names(tmp_path)


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None]})
    before = path.read_text()
    with pytest.raises(AutoprecError, match="not JSON compliant.*; the previous file is unchanged"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == before
    assert read_json(path, what="file") == {"a": [1, 2.5, None]}


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 1}', '{"a": 1', "\ufeff{}", ""])
def test_damaged_json_is_the_error_that_was_asked_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"^figures .*a\.json is damaged") as caught:
        read_json(path, what="figures", error=DataError)
    assert "take a copy that is whole" in str(caught.value)


def test_a_record_survives_the_way_to_json_and_back() -> None:
    measurement = Measurement(
        name="uniform bf16",
        assignment={},
        drop=1e-3,
        drop_ci95=(9e-4, 2e-3),
        origin=MeasurementOrigins(drop=Origin.MEASURED),
    )
    assert from_json(Measurement, as_json(measurement), what="measurement") == measurement


def test_an_unknown_field_is_named_before_the_one_it_hides() -> None:
    data = as_json(Verdict(decision=VerdictDecision.DO_NOTHING, text="", best_uniform=None, break_even_hours=None))
    data["break_even_hour"] = data.pop("break_even_hours")
    with pytest.raises(AutoprecError, match="verdict is not valid at break_even_hour: "):
        from_json(Verdict, data, what="verdict")


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(AutoprecError, match=r"not valid at modules: .*\.\.\.\)$") as caught:
        from_json(Pinned, {"modules": "x" * 500, "reason": ""}, what="pinned")
    assert len(str(caught.value)) < 200


@dataclass(frozen=True, slots=True)
class Even:
    """A record with a check of its own."""

    value: int

    def __post_init__(self) -> None:
        if self.value % 2:
            raise DataError(f"{self.value} is odd")


def test_a_records_own_check_is_told_with_what_was_read() -> None:
    assert from_json(Even, {"value": 2}, what="number") == Even(2)
    with pytest.raises(DataError, match="^number is not valid: 3 is odd$"):
        from_json(Even, {"value": 3}, what="number", error=DataError)
