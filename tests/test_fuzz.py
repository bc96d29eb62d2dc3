"""Damaged and hostile files: whatever stands in one, only our own errors come of it, soon, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from autoprec import Plan
from autoprec.cli.running import read_settings
from autoprec.errors import AutoprecError
from autoprec.files import as_json, from_json, read_json
from autoprec.probe.text import read_examples
from autoprec.records import DeviceProfile, ModelProfile, SearchResult
from autoprec.study.folder import RunFolder
from autoprec.study.space import build_space

#: what parsers trip over
_BITS = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\x00", b"\xff\xfe",
    b'"', b"\n", b"null", b"true", b"-0", b"{}", b"[]", b'""', b",", b"../../x", b"'''", b"\xe2\x80\xae", b"1.5",
]  # fmt: skip
_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "\ud800",
    "../x",
    "fp32",
    "x" * 9_999,
    [],
    {},
    [[]],
    {"a": 1},
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: its name, a sound one, and what reads it."""

    name: str
    sound: bytes
    read: Callable[[Path], object]


def _record(kind: type) -> Callable[[Path], object]:
    return lambda path: from_json(kind, read_json(path, what="a file"), what="a file")


def _settings(path: Path) -> object:
    with _inside(path.parent):
        return read_settings()


def _journal(path: Path) -> object:
    with RunFolder(path.parent) as folder:
        storage = folder.open_storage()
        return [storage.get_all_trials(s._study_id) for s in storage.get_all_studies()]


class _inside:
    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


def _plan(path: Path) -> object:
    plan = Plan.load(path)
    return plan.to_json(), plan.diff(plan), plan.formats


def _sound_journal() -> bytes:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with RunFolder(folder) as run:
            study = optuna.create_study(storage=run.open_storage(), directions=["minimize", "minimize"])
            study.set_user_attr("spent", {"seconds": 1.0, "evaluations": 2})
            trial = study.ask({"unit": CategoricalDistribution(["fp32", "bf16"])})
            study.tell(trial, [0.1, 1.0])
            return run.journal.read_bytes()
    finally:
        shutil.rmtree(folder)


@cache
def kinds() -> dict[str, Kind]:
    spaces = Path(__file__).parent.parent / "search_spaces"
    profile, device = samples.model_profile(), samples.device_profile()
    found = [
        Kind("plan.json", json.dumps(samples.plan().to_json()).encode(), _plan),
        Kind("result.json", json.dumps(as_json(samples.search_result())).encode(), _record(SearchResult)),
        Kind("units.json", json.dumps(as_json(profile)).encode(), _record(ModelProfile)),
        Kind("device.json", json.dumps(as_json(device)).encode(), _record(DeviceProfile)),
        Kind("autoprec.toml", b'[autoprec]\nmodel = "gpt2"\nbudget = "20m"\nbatch-size = 4\n', _settings),
        Kind("space.toml", (spaces / "blocks.toml").read_bytes(), lambda path: build_space(path, profile, device)),
        Kind("study.journal", _sound_journal(), _journal),
        Kind("data.jsonl", b'{"text": "a b", "label": 0}\n{"text": "c", "label": 1}\n' * 3, read_examples),
        Kind("data.txt", "One paragraph.\n\nAnother, with \u00fc.\n".encode(), read_examples),
    ]
    return {kind.name: kind for kind in found}


def spliced(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Return the content with bytes changed, cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, max(len(content) - 1, 0))), draw(st.integers(0, 40))
        piece = draw(st.sampled_from([b"", content[start : start + length] * 2, *_BITS]) | st.binary(max_size=4))
        content = content[:start] + piece + content[start + length * draw(st.booleans()) :]
    return content


def replaced(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Return the JSON document with one value, wherever it stands, become another."""
    document = json.loads(content)
    places = list(_places(document))
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    if draw(st.booleans()) or not isinstance(holder, dict):
        holder[key] = draw(st.sampled_from(_VALUES))
    else:
        holder[draw(st.sampled_from(["", "x", "schema", "__class__"]))] = holder.pop(key)
    return json.dumps(document).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def assert_safe(kind: Kind, content: bytes) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        inside = folder / "inside"
        inside.mkdir()
        (inside / kind.name).write_bytes(content)
        begun = time.process_time()
        try:
            kind.read(inside / kind.name)
        except AutoprecError as error:
            assert str(error)
        assert time.process_time() - begun < 1.0
        assert [p.name for p in folder.iterdir()] == ["inside"]
        assert {p.name for p in inside.iterdir()} <= {kind.name, "run.lock"}
    finally:
        shutil.rmtree(folder)


def mutated(name: str, data: st.DataObject) -> None:
    kind = kinds()[name]
    whole = name.endswith(".json") and data.draw(st.booleans())
    assert_safe(kind, (replaced if whole else spliced)(kind.sound, data.draw))


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


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(AutoprecError, match="is larger than"):
        Plan.load("/dev/zero")


def test_a_document_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[" * 70 + "]" * 70)
    with pytest.raises(AutoprecError, match="nests deeper than 64 levels"):
        Plan.load(tmp_path / "plan.json")
