"""Tests of the run folder: its lock, a journal after a crash, and the table of trials."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from autoprec.errors import StudyError
from autoprec.formats import Format
from autoprec.records import Measurement, MeasurementOrigins, Origin
from autoprec.study.folder import Row, RunFolder, fail_dead_trials, trials_csv

CHOICES: dict[str, BaseDistribution] = {"unit": CategoricalDistribution(["fp32", "bf16"])}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def study_in(folder: RunFolder) -> optuna.Study:
    return optuna.create_study(
        study_name="s",
        storage=folder.open_storage(),
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )


# the lock


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from autoprec.study.folder import RunFolder\n"
        f"with RunFolder(Path({str(path)!r})):\n    print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"locked\n"
            with pytest.raises(StudyError, match=rf"in use by another search \(process {other.pid}\).*--out"):
                RunFolder(path).__enter__()
            assert (path / "run.lock").read_text() == f"{other.pid}\n"
        finally:
            other.kill()
    with RunFolder(path):  # the lock of a killed process is none
        assert (path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_ends_with_its_context(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path / "run"):
            pass
    with RunFolder(tmp_path / "run"), pytest.raises(StudyError, match=f"process {os.getpid()}"):
        RunFolder(tmp_path / "run").__enter__()


def test_a_place_that_can_be_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StudyError, match=f"cannot use run folder {path}: .*--out"):
            RunFolder(path).__enter__()


# the journal after a crash


def test_a_journal_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        study_in(folder)
    for target in (folder.journal, Path("study.journal")):  # the second dangles, as with a relative path
        lock = tmp_path / "study.journal.lock"
        lock.symlink_to(target)
        with RunFolder(tmp_path) as folder:
            # Optuna would wait 30 seconds for the first, and for ever for the second
            study_in(folder).ask(CHOICES)
        assert not lock.is_symlink()


def test_a_run_folder_may_be_given_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunFolder(Path("runs") / "one") as folder:
        study = study_in(folder)
        monkeypatch.chdir("/")
        study.set_user_attr("written", "from elsewhere")
    assert "from elsewhere" in (tmp_path / "runs" / "one" / "study.journal").read_text()


@pytest.mark.parametrize("torn", [b'{"op_code":4,"worker_id"', b"{", b'{"op_code":4}'])
def test_a_torn_last_line_is_cut_and_the_study_goes_on(tmp_path: Path, torn: bytes) -> None:
    with RunFolder(tmp_path) as folder:
        study = study_in(folder)
        study.tell(study.ask(CHOICES), [0.1, 1.0])
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole + torn)
    with RunFolder(tmp_path) as folder:
        study = study_in(folder)
        assert [t.values for t in study.trials] == [[0.1, 1.0]]
        study.tell(study.ask(CHOICES), [0.2, 2.0])
    with RunFolder(tmp_path) as folder:
        assert [t.values for t in study_in(folder).trials] == [[0.1, 1.0], [0.2, 2.0]]
    for line in folder.journal.read_text().splitlines():
        json.loads(line)


def test_without_mending_optuna_loses_the_study(tmp_path: Path) -> None:
    """The reason for mending; when this fails, Optuna mends its journals itself."""
    with RunFolder(tmp_path) as folder:
        study_in(folder)
    with folder.journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id"')
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.journal)))
    with pytest.raises((AttributeError, ValueError)):  # what is written next is glued to the torn line
        optuna.load_study(study_name="s", storage=storage).ask(CHOICES)


def test_a_journal_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        study_in(folder).ask(CHOICES)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    for damage in (b"no json\n", b"{}\n", b"\xff\xfe\n"):
        folder.journal.write_bytes(lines[0] + damage + b"".join(lines[1:]))
        with RunFolder(tmp_path) as folder, pytest.raises(StudyError, match=r"study\.journal is damaged.*--out"):
            folder.open_storage()


def test_half_written_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".result.json.abc123.tmp").write_text("{")
    (tmp_path / ".mine.tmp").write_text("of the user")
    with RunFolder(tmp_path) as folder:
        folder.open_storage()
    assert not (tmp_path / ".result.json.abc123.tmp").exists()
    assert (tmp_path / ".mine.tmp").exists()


def test_trials_of_a_dead_process_fail_and_are_asked_for_once_more(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        study = study_in(folder)
        study.enqueue_trial({"unit": "bf16"}, user_attrs={"name": "recommended"})
        study.ask(CHOICES)
    for expected in ([TrialState.FAIL, TrialState.WAITING], [TrialState.FAIL, TrialState.FAIL]):
        with RunFolder(tmp_path) as folder:
            study = study_in(folder)
            fail_dead_trials(study)
            assert [t.state for t in study.trials] == expected
            again = study.ask(CHOICES)
        if TrialState.WAITING in expected:
            assert (again.number, again.params, again.user_attrs["name"]) == (1, {"unit": "bf16"}, "recommended")


def test_a_dead_trial_that_had_its_measurement_is_not_measured_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        study = study_in(folder)
        study.ask(CHOICES).set_user_attr("measurement", {})
        fail_dead_trials(study)
        assert [t.state for t in study.trials] == [TrialState.FAIL]


# what is left behind


def test_what_a_search_made_and_did_not_use_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new"
    with RunFolder(path) as folder:
        folder.write("device.json", {})
        folder.open_storage()
        folder.discard_if_new()
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_stays_and_is_as_empty_as_before(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write("units.json", {})
        folder.discard_if_new()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["trials.csv", "result.json", "notes.txt"])
def test_a_folder_with_anything_to_lose_is_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    with RunFolder(path) as folder:
        folder.write("device.json", {})
        (path / name).write_text("")
        folder.discard_if_new()
    assert {p.name for p in path.iterdir()} == {"run.lock", "device.json", name}


def test_an_earlier_search_is_never_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        study_in(folder)
    with RunFolder(tmp_path / "run") as folder:
        folder.discard_if_new()
        assert folder.has_study()


def test_a_study_is_told_by_its_journal_or_its_results(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        assert not folder.has_study()
        folder.write("device.json", {})
        assert not folder.has_study()
        folder.write("result.json", {})  # as where the study is kept in a database
        assert folder.has_study()


# trials.csv


def test_the_table_of_trials(tmp_path: Path) -> None:
    origin = MeasurementOrigins(drop=Origin.MEASURED)
    rows = [
        Row(
            None,
            "COMPLETE",
            Measurement(
                name="uniform bf16",
                assignment={"embeddings": Format.FP32, "blocks.0.ffn": Format.BF16},
                drop=0.001,
                step_ms=12.5,
                peak_bytes=1024,
                grad_error=0.0625,
                origin=origin,
            ),
        ),
        Row(None, "FAIL", Measurement(name="uniform fp8", assignment={}, reason="no, it cannot")),
        Row(
            3,
            "FAIL",
            Measurement(name="trial 3", assignment={"embeddings": Format.BF16}, reason='stopped, "too slow"'),
        ),
    ]
    path = tmp_path / "trials.csv"
    trials_csv(path, rows)
    head, *lines = path.read_text().splitlines()
    assert head == "trial,state,drop,step_ms,peak_bytes,grad_error,origin,reason,embeddings,blocks.0.ffn"
    assert list(csv.reader(lines)) == [
        ["", "COMPLETE", "0.001", "12.5", "1024", "0.0625", "measured", "baseline uniform bf16", "fp32", "bf16"],
        ["", "FAIL", "", "", "", "", "", "baseline uniform fp8; no, it cannot", "", ""],
        ["3", "FAIL", "", "", "", "", "", 'stopped, "too slow"', "bf16", ""],
    ]
    assert "\r" not in path.read_bytes().decode()


def test_an_empty_table_has_its_head(tmp_path: Path) -> None:
    trials_csv(tmp_path / "trials.csv", [])
    head = "trial,state,drop,step_ms,peak_bytes,grad_error,origin,reason"
    assert (tmp_path / "trials.csv").read_text().strip() == head
