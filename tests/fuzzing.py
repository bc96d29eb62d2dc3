"""Kinds of files that people pass on, a sound one of each, what reads it, and what must hold whatever stands in one."""

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
import samples
from optuna.distributions import CategoricalDistribution

from autoprec import Plan
from autoprec.cli.running import read_settings
from autoprec.doctor.diagnosis import diagnose
from autoprec.errors import AutoprecError
from autoprec.files import as_json, from_json, read_json
from autoprec.probe.text import read_examples
from autoprec.records import DeviceProfile, ModelProfile, SearchResult
from autoprec.study.folder import RunFolder
from autoprec.study.space import build_space

__all__ = ["Kind", "assert_safe", "kinds", "replaced"]

_TESTS = Path(__file__).parent
#: what readers trip over
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


#: logs of several programs, one after another
_LOGS = ("AP001-trainer.log", "AP008-te.log", "AP012-oom.log", "AP015-addmm.log")


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


def _log(path: Path) -> object:
    return diagnose(logs=[str(path)], device="h100-sxm")


def _run_files(path: Path) -> object:
    return diagnose(settings=[str(path)], device="h100-sxm")


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
    spaces, doctor = _TESTS.parent / "search_spaces", _TESTS / "doctor"
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
        Kind("train.log", b"".join((doctor / "troubles" / n).read_bytes() for n in _LOGS), _log),
        Kind("deepspeed.json", (doctor / "healthy" / "deepspeed-zero3-bf16.json").read_bytes(), _run_files),
        Kind("accelerate.yaml", (doctor / "healthy" / "accelerate-fsdp.yaml").read_bytes(), _run_files),
        Kind("train.py", (doctor / "troubles" / "AP032-loop.py").read_bytes(), _run_files),
        Kind("launch.sh", (doctor / "healthy" / "launch.sh").read_bytes(), _run_files),
    ]
    return {kind.name: kind for kind in found}


def replaced(content: bytes, pick: Callable[[int], int]) -> bytes:
    """Return the JSON document with one value or name in it become another; `pick` returns a number below its own."""
    document = json.loads(content)
    places = list(_places(document))
    holder, key = places[pick(len(places))]
    if pick(2) or not isinstance(holder, dict):
        holder[key] = _VALUES[pick(len(_VALUES))]
    else:
        holder[("", "x", "schema", "__class__")[pick(4)]] = holder.pop(key)
    return json.dumps(document).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _seconds(kind: Kind, path: Path) -> float:
    """Read a file, which may end in our own errors alone, and return the seconds of the processor that it took."""
    begun = time.process_time()
    try:
        kind.read(path)
    except AutoprecError as error:
        assert str(error)
    return time.process_time() - begun


def assert_safe(kind: Kind, content: bytes) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        inside = folder / "inside"
        inside.mkdir()
        (inside / kind.name).write_bytes(content)
        seconds = _seconds(kind, inside / kind.name)
        if seconds >= 1.0:  # imports and collections of garbage do not come twice; what the content causes does
            seconds = _seconds(kind, inside / kind.name)
        assert seconds < 1.0
        assert [p.name for p in folder.iterdir()] == ["inside"]
        assert {p.name for p in inside.iterdir()} <= {kind.name, "run.lock"}
    finally:
        shutil.rmtree(folder)
