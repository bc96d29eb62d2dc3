"""Damaged and hostile files: whatever stands in one, only our own errors come of it, soon, and nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run
from typing import Any

import fuzz_guided
import pytest
from fuzzing import assert_safe, kinds, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoprec import Plan
from autoprec.doctor.diagnosis import diagnose
from autoprec.errors import AutoprecError

#: what parsers trip over
_BITS = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\x00", b"\xff\xfe",
    b'"', b"\n", b"null", b"true", b"-0", b"{}", b"[]", b'""', b",", b"../../x", b"'''", b"\xe2\x80\xae", b"1.5",
]  # fmt: skip


def spliced(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Return the content with bytes changed, cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, max(len(content) - 1, 0))), draw(st.integers(0, 40))
        piece = draw(st.sampled_from([b"", content[start : start + length] * 2, *_BITS]) | st.binary(max_size=4))
        content = content[:start] + piece + content[start + length * draw(st.booleans()) :]
    return content


def mutated(name: str, data: st.DataObject) -> None:
    kind = kinds()[name]
    if name.endswith(".json") and data.draw(st.booleans()):
        assert_safe(kind, replaced(kind.sound, lambda count: data.draw(st.integers(0, count - 1))))
    else:
        assert_safe(kind, spliced(kind.sound, data.draw))


@pytest.mark.parametrize("name", list(kinds()))
def test_a_sound_file_is_read(name: str, tmp_path: Path) -> None:
    kind = kinds()[name]
    (tmp_path / kind.name).write_bytes(kind.sound)
    assert kind.read(tmp_path / kind.name) is not None


@pytest.mark.parametrize("name", list(kinds()))
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_gives_our_own_error(name: str, data: st.DataObject) -> None:
    mutated(name, data)


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(kinds()))
@settings(max_examples=2_500, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_twenty_thousand_damaged_files_give_our_own_errors(name: str, data: st.DataObject) -> None:
    mutated(name, data)


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(kinds()))
def test_damage_guided_by_coverage_gives_our_own_errors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="no wheel of atheris for this Python")
    ran = run([sys.executable, fuzz_guided.__file__, name, "3000", str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Done 3000 runs" in ran.stderr


@pytest.mark.parametrize("name", ["train.log", "accelerate.yaml", "deepspeed.json", "train.py", "launch.sh"])
@pytest.mark.parametrize("run", ["9", "x", " ", "a.", "1.", "9,", "_", "-", "[", "{", "(", '"', "nan ", "fp16 ", "= "])
def test_a_long_run_of_one_sign_is_read_in_time(name: str, run: str) -> None:
    """Patterns that go back over what they have read take the square of it, or worse."""
    kind, long = kinds()[name], (run * 9_999)[:9_999].encode()
    for word in (b"", b"fp8 ", b"bf16 ", b"loss: ", b"grad_norm=", b"error ", b"precision"):
        assert_safe(kind, kind.sound + b"\n" + word + long + b"\n")


def test_brackets_of_yaml_are_counted_where_they_open(tmp_path: Path) -> None:
    """Those in comments and strings close nothing."""
    kind, rows = kinds()["accelerate.yaml"], "# ]]]]]]]]]]\n[[[[[[[[[[\n" * 1_000
    assert_safe(kind, rows.encode())
    (tmp_path / "deep.yaml").write_text(rows)
    with pytest.raises(AutoprecError, match="nests deeper than 64 levels"):
        diagnose(settings=[str(tmp_path / "deep.yaml")], device="h100-sxm")


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(AutoprecError, match="is larger than"):
        Plan.load("/dev/zero")


def test_a_document_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[" * 70 + "]" * 70)
    with pytest.raises(AutoprecError, match="nests deeper than 64 levels"):
        Plan.load(tmp_path / "plan.json")
