"""Tests of searches whose disk is full or away for a while, whose clock jumps, or that measure all again."""

from __future__ import annotations

import dataclasses
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import samples
import torch
from searching import saved, table, trials_of, workload

from autoprec import search
from autoprec.errors import StudyError
from autoprec.files import from_json
from autoprec.probe.turns import Turns
from autoprec.quantities import DropLimit
from autoprec.records import Progress, SearchSetting
from autoprec.study.folder import RunFolder
from autoprec.study.opening import open_ledger

pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, short_measurements: None) -> None:
    monkeypatch.setattr("autoprec.study.patience.SECONDS", 20.0)


def after_the_first_trial(begin: Callable[[], None], end: Callable[[], None], seconds: float) -> Callable[..., None]:
    """Return a listener that begins a fault as the first trial is done, and ends it some time later."""
    seen: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.trial is not None and not seen:
            seen.append(progress.trial)
            begin()
            threading.Timer(seconds, end).start()

    return listen


def assert_survived(out: Path, reason: str) -> None:
    rows = [row for row in table(out) if row["trial"]]
    assert len(rows) == 3 and all(row["state"] == "COMPLETE" for row in rows)
    waited = [row["reason"] for row in rows if row["reason"]]
    assert len(waited) == 1 and waited[0].startswith("waited ") and reason in waited[0]
    assert trials_of(out) == sorted(set(trials_of(out)))
    with RunFolder(out) as folder:  # whole and readable
        (study,) = folder.open_storage().get_all_studies()
        done = [t for t in folder.open_storage().get_all_trials(study._study_id) if "measurement" in t.user_attrs]
        assert {t.number for t in done} == set(trials_of(out))


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, patient: None) -> None:
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:  # the kernel lets the next line begin, and not end
        size = (out / "study.journal").stat().st_size + 40
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def clear() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        search(workload(), budget=300, trials=3, out=out, progress=after_the_first_trial(fill, clear, 1.0))
    finally:
        clear()
    assert_survived(out, "File too large")


def test_a_folder_that_is_away_for_a_while(tmp_path: Path, patient: None) -> None:
    out, away = tmp_path / "run", tmp_path / "elsewhere"
    search(
        workload(),
        budget=300,
        trials=3,
        out=out,
        progress=after_the_first_trial(lambda: os.rename(out, away), lambda: os.rename(away, out), 1.0),
    )
    assert_survived(out, "No such file or directory")


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = time.time, [0]

    def jump() -> float:
        calls[0] += 1
        return real() + (1e6 if calls[0] % 2 else -1e6)

    monkeypatch.setattr("time.time", jump)
    begun = time.monotonic()
    result = search(workload(), budget=300, trials=2, out=tmp_path / "run")
    assert result.trials == 2 and 0 < result.seconds <= time.monotonic() - begun


def test_a_search_on_another_device_measures_all_again_where_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    first = search(workload(), budget=300, trials=2, out=out)
    wanted = [{k: v for k, v in row.items() if k.startswith(("blocks", "emb", "lm_"))} for row in table(out)]
    other = dataclasses.replace(samples.device_profile(), name="other-cpu")
    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: other)
    second = search(workload(), budget=300, trials=2, out=out, resume=True, force=True)
    assert second.device == "other-cpu" and second.evaluations == first.evaluations
    assert [m.drop for m in second.baselines] == [m.drop for m in first.baselines]
    assert all({k: row[k] for k in w} == w for row, w in zip(table(out), wanted, strict=True))
    assert {p.name for p in out.glob("study.journal*")} == {"study.journal", "study.journal.1"}
    third = search(workload(), budget=300, trials=3, out=out, resume=True)
    assert third.trials == 3 and saved(out).device == "other-cpu"


def test_a_trial_that_was_measured_and_not_told_is_told_on_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    search(workload(), budget=300, trials=2, out=out)
    lines = (out / "study.journal").read_bytes().splitlines(keepends=True)
    # as a kill would leave it between the measurement of the last trial and its end
    last = max(i for i, line in enumerate(lines) if b'"measurement"' in line)
    (out / "study.journal").write_bytes(b"".join(lines[: last + 1]))
    with RunFolder(out) as folder:
        (known,) = folder.open_storage().get_all_studies()
        attributes = optuna.load_study(study_name=known.study_name, storage=folder.open_storage()).user_attrs
        setting = from_json(SearchSetting, attributes["setting"], what="the setting", error=StudyError)
        ledger = open_ledger(
            folder,
            None,
            name="",
            identity=attributes["identity"],
            setting=setting,
            limit=DropLimit.parse("1%"),
            resume=True,
        )
        told = [t for t in ledger.study.trials if "measurement" in t.user_attrs]
    assert len(told) == 2 and all(t.state.name == "COMPLETE" and len(t.values) == 2 for t in told)


# turns on a device


def test_who_times_is_alone_and_who_computes_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cpu, soon = torch.device("cpu"), time.monotonic() + 0.1
    with Turns(cpu).computing() as one:
        assert one.alone_now()
        with Turns(cpu, soon).computing() as other:  # the wait is cut
            with other.timing() as alone:
                assert not alone
        with one.timing() as alone:
            assert alone
        with Turns(cpu).computing() as other:  # both compute
            assert not other.alone_now()
    with Turns(cpu).computing() as one, one.timing() as alone:
        assert alone


def test_a_long_computation_lets_a_timing_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cpu, order, waits = torch.device("cpu"), list[str](), list[str]()

    def time_something() -> None:
        with Turns(cpu, beat=lambda: waits.append("beat")).computing() as turns, turns.timing() as alone:
            order.append(f"alone {alone}")

    with Turns(cpu).computing() as turns:
        other = threading.Thread(target=time_something)
        other.start()
        time.sleep(1.3)
        order.append("batch")
        turns.let_pass()
        order.append("batch")
    other.join()
    assert order == ["batch", "alone True", "batch"] and waits


def test_without_a_place_for_locks_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with Turns(torch.device("cpu")).computing() as turns, turns.timing() as alone:
        assert alone and turns.alone_now()
