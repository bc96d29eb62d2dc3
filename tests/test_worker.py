"""Tests of measuring in a worker process: real faults, kills, and figures that are those of this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import samples
import torch
from searching import table, trials_of

from autoprec import search
from autoprec.errors import PlanError
from autoprec.measurement import DeviceFailed
from autoprec.records import DeviceProfile, Progress, SearchResult
from autoprec.runtime.identity import weights_digest
from autoprec.study import course
from autoprec.study import worker as worker_file
from autoprec.study.protocol import Loading
from autoprec.study.serving import _answer
from autoprec.study.worker import Worker, WorkerLost

FAULTY = str(Path(__file__).parent / "faulty.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device whose profile is known, one thread, and less patience with what hangs."""

    def probe(self: Worker, device: str, *, seconds: float) -> DeviceProfile:
        return samples.device_profile()

    monkeypatch.setattr(Worker, "probe_device", probe)
    monkeypatch.setattr(worker_file, "SILENT_SECONDS", 6.0)
    monkeypatch.setattr(course, "_STOP_SLOWER", None)  # a step of a millisecond is slow where another process runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def searched(out: Path, function: str = "make", trials: int = 99) -> SearchResult:
    loading = Loading(model=f"{FAULTY}:{function}", device="cpu")
    with Worker(loading) as worker:
        return search(loading.load("cpu"), budget="20m", trials=trials, out=out, workers=[worker])


@pytest.mark.slow
def test_each_fault_fails_its_own_measurement_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "speed_of", lambda *_: (None, None))  # it would meet the crash as well, and go on
    result = searched(tmp_path / "run")
    reasons = {m.name: m.reason for m in result.baselines}
    assert reasons["uniform fp32"] is None
    assert reasons["uniform bf16"] == "the worker process was ended by SIGSEGV"
    assert reasons["uniform fp16"] == "out of memory on the host: no room for 7 TiB"
    assert str(reasons["cast bf16"]).startswith("no answer after ")
    rows = table(tmp_path / "run")
    by_formats = {(r["blocks.0.ffn"], r["blocks.1.ffn"], r["lm_head"]): r for r in rows if r["trial"]}
    assert by_formats["bf16", "fp32", "fp32"]["reason"].startswith("the output is not finite on batch 0")
    sound = [r for r in rows if r["state"] == "COMPLETE"]
    assert len(sound) > 4 and all(not r["reason"] or r["reason"].startswith("baseline") for r in sound)
    assert {r["state"] for r in rows if r not in sound} == {"FAIL"}


def test_a_killed_worker_costs_no_trial_and_figures_are_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_FAULTS", "1")
    loading, killed = Loading(model=f"{FAULTY}:make", device="cpu"), list[str]()
    with Worker(loading) as worker:

        def kill(progress: Progress) -> None:
            if progress.trial is not None and not killed:
                assert worker._process is not None
                worker._process.send_signal(signal.SIGKILL)
                killed.append("next")

        result = search(
            loading.load("cpu"), budget="20m", trials=4, out=tmp_path / "apart", progress=kill, workers=[worker]
        )
    again = [r for r in table(tmp_path / "apart") if "SIGKILL, as the kernel does where memory lacks" in r["reason"]]
    assert len(again) == 1 and again[0]["state"] == "COMPLETE" and again[0]["reason"].startswith("measured again: ")
    assert len(trials_of(tmp_path / "apart")) == result.trials == 4

    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: samples.device_profile())
    here = search(loading.load("cpu"), budget="20m", trials=1, out=tmp_path / "here")
    assert [(m.name, m.drop) for m in result.baselines] == [(m.name, m.drop) for m in here.baselines]


def test_a_worker_killed_before_it_measures_anything_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_FAULTS", "1")
    loading = Loading(model=f"{FAULTY}:make", device="cpu")
    work = loading.load("cpu")
    with Worker(loading) as worker:

        def kill() -> None:
            assert worker._process is not None
            worker._process.kill()
            worker._process.wait()

        kill()
        assert worker.open(work, work, None).weights == weights_digest(work.model)
        kill()
        assert worker.first_look().step_seconds > 0
        kill()
        found = worker.probe_speed(work, ["bf16"], seconds=1.0, progress=lambda news: None)
        assert found.times

        start = worker._start

        def doomed() -> None:
            start()
            kill()

        monkeypatch.setattr(worker, "_start", doomed)
        kill()
        with pytest.raises(WorkerLost, match=r"SIGKILL.*, twice in a row\. .*--resume; .*--batch-size"):
            worker.first_look()


def test_a_model_that_is_another_each_time_is_measured_here_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_FAULTS", "1")
    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: samples.device_profile())
    result = searched(tmp_path / "run", "other_each_time", trials=1)
    assert result.trials == 1 and any("measured in this process, because" in note for note in result.notes)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (DeviceFailed("the device failed"), {"lost": "the device failed"}),
        (ValueError("a kernel that nobody foresaw"), {"lost": "unexpected ValueError: a kernel that nobody foresaw"}),
        (torch.OutOfMemoryError("CUDA out of memory."), {"lost": "out of memory: CUDA out of memory."}),
        (MemoryError(), {"lost": "out of memory on the host: MemoryError"}),
        (PlanError("no such unit"), {"error": {"kind": "PlanError", "message": "no such unit"}}),
    ],
)
def test_what_an_error_in_a_worker_comes_to(error: Exception, answer: dict[str, object]) -> None:
    def fail(**_: object) -> None:
        raise error

    said, alive = _answer(SimpleNamespace(look=fail), {"do": "look", "with": {}})  # type: ignore[arg-type]
    assert said == answer and alive == ("error" in answer)


@pytest.mark.nightly
def test_two_workers_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_FAULTS", "1")
    loading = Loading(model=f"{FAULTY}:make", device="cpu")
    with Worker(loading, 1) as one, Worker(loading, 1) as other:
        result = search(loading.load("cpu"), budget="20m", trials=99, out=tmp_path / "two", workers=[one, other])
    rows = [row for row in table(tmp_path / "two") if row["trial"]]
    assert len(rows) == result.trials and len({row["trial"] for row in rows}) == len(rows)
    formats = [tuple(v for k, v in row.items() if k.startswith(("blocks", "emb", "lm_"))) for row in rows]
    assert len(set(formats)) == len(formats)  # nothing twice
    assert all(row["state"] == "COMPLETE" for row in rows)


ORPHAN = """
import sys, time
from autoprec.runtime.identity import weights_digest
from autoprec.study.protocol import Loading
from autoprec.study.worker import Worker
worker = Worker(Loading(model={model!r}, device="cpu"))
work = worker.loading.load("cpu")
worker.open(work, work, None)
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_search_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    program = ORPHAN.format(model=f"{FAULTY}:make")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as main:
        assert main.stdout is not None
        worker = int(main.stdout.readline())
        os.kill(worker, 0)
        main.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "(zombie)" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")
