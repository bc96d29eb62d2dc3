"""Several searches on one study in a database, as on several machines: nothing is lost, doubled or mixed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import postgres
import pytest
import samples
import torch
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from searching import saved, table, workload

from autoprec import search
from autoprec.errors import StudyError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.quantities import DropLimit
from autoprec.records import Measurement, Progress, SearchSetting
from autoprec.study import machines
from autoprec.study.folder import RunFolder
from autoprec.study.ledger import Ledger
from autoprec.study.opening import open_ledger
from autoprec.study.patience import Patience

HERE = Path(__file__).parent

#: one machine: a small search whose measurements take a moment longer, that says what it is at
PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
import searching as t
torch.set_num_threads(1)
import autoprec
from autoprec.study import machines, measuring, patience
import autoprec.study.run
machines.BEAT_SECONDS, machines.GRACE_SECONDS, patience.SECONDS = 1, {grace}, 60.0
autoprec.study.run.probe_device = t.sample_device
def measure(request):
    print("measuring", request.name, flush=True)
    time.sleep({pause})
    return t.evaluate(t.short(request))
measuring.evaluate = measure
def tell(progress):
    if progress.measurement is not None and progress.trial is not None:
        print("measured", progress.trial, flush=True)
    elif progress.stage == "storage":
        print(progress.message, flush=True)
autoprec.search(t.workload(), budget=600, trials={trials}, out={out!r}, storage={url!r}, resume=True, progress=tell,
    learn=False, seed={seed})
"""


def machine(
    url: str, out: Path, *, trials: int, seed: int, pause: float = 0.3, grace: int = 8
) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(HERE), out=str(out), url=url, trials=trials, seed=seed, pause=pause, grace=grace)
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=subprocess.STDOUT, text=True)


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def wait_for(what: str, out: Path, process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while what not in said(out):
        assert process.poll() is None, said(out)[-3000:]
        assert time.monotonic() < end, f"no '{what}' in: {said(out)[-3000:]}"
        time.sleep(0.05)


def measured(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.trials if "measurement" in t.user_attrs]


@pytest.mark.nightly
def test_four_machines_on_a_postgresql_one_killed_and_the_server_restarted(tmp_path: Path) -> None:
    outs = [tmp_path / f"machine{index}" for index in range(4)]
    with postgres.server() as server:
        running = [machine(server.url, out, trials=40, seed=seed) for seed, out in enumerate(outs)]
        try:
            for out, process in zip(outs, running, strict=True):
                wait_for("measuring trial", out, process)
            victim = running[1]
            begun = said(outs[1]).count("measuring trial")
            while said(outs[1]).count("measuring trial") == begun:  # it has just begun another one
                assert victim.poll() is None
                time.sleep(0.01)
            victim.kill()
            wait_for("measured", outs[0], running[0])
            server.stop("immediate")  # as where its machine fails
            time.sleep(3.0)
            server.start()
            ends = [process.wait(240) for process in running]
            assert ends == [0, -signal.SIGKILL, 0, 0], [said(out)[-2000:] for out in outs]
            last = tmp_path / "last"
            assert machine(server.url, last, trials=44, seed=9).wait(240) == 0, said(last)[-2000:]
        finally:
            for process in running:
                process.kill()
        storage = machines.open_database(server.url)
        (study,) = [s for s in optuna.get_all_study_summaries(storage) if not s.study_name.endswith("-turns")]
        check_study(optuna.load_study(study_name=study.study_name, storage=storage), [*outs, last], victim.pid)
        storage.engine.dispose()
    assert "waiting: " in "".join(said(out) for out in outs)
    assert any("waited " in row["reason"] for row in table(last))


def check_study(study: optuna.Study, outs: list[Path], killed: int) -> None:
    logs = [said(out).splitlines() for out in outs]
    # every number once, and nothing left open
    assert [t.number for t in study.trials] == list(range(len(study.trials)))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    # nothing lost: what a machine saw measured is there, complete
    known = {t.number: t for t in measured(study)}
    told = [int(line.split()[1]) for log in logs for line in log if line.startswith("measured ")]
    assert sorted(told) == sorted(known) and all(t.state is TrialState.COMPLETE for t in known.values())
    # nothing doubled: no assignment twice, no baseline twice
    assert max(Counter(tuple(sorted(t.params.items())) for t in known.values()).values()) == 1
    fixed = Counter(line for log in logs for line in log if line.startswith(("measuring uniform", "measuring cast")))
    assert set(fixed.values()) == {1} and len(fixed) == 4
    # the killed one's trial failed, says whose it was, and was measured by another
    (dead,) = [t for t in study.trials if machines.MEASURING in t.user_attrs and t.number not in known]
    assert dead.state is TrialState.FAIL and f"process {killed}" in dead.user_attrs[machines.MEASURING]["by"]
    (again,) = [t for t in study.trials if t.system_attrs.get("failed_trial") == dead.number]
    assert again.params == dead.params and any(t.params == dead.params for t in known.values())
    rows = {int(row["trial"]): row for row in table(outs[-1]) if row["trial"]}
    assert rows.keys() == known.keys() | {dead.number}
    reason = rows[dead.number]["reason"]
    assert rows[dead.number]["state"] == "FAIL" and reason.startswith("given up: the search that was at it (")
    assert f"process {killed})" in reason
    assert saved(outs[-1]).trials == len(rows) == 44
    assert all(saved(out).trials >= 40 for index, out in enumerate(outs) if index != 1)
    # several machines did it
    workers = {t.user_attrs[machines.MEASURING]["by"] for t in known.values()}
    assert len(workers) >= 4


@pytest.mark.nightly
def test_the_command_on_a_postgresql_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """A card that is not here: its formats are emulated, so that every machine has something to search."""
    outs = [tmp_path / "first", tmp_path / "second"]
    small = "--mode infer --batches 2 --batch-size 2 --seq-len 32 --device h100-sxm --budget 10m --no-learn".split()
    with postgres.server() as server:
        words = ["autoprec", "search", "demo", *small, "--storage", server.url, "--trials", "8", "--resume", "--out"]
        first, second = (subprocess.Popen(
            [sys.executable, "-m", *words, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) for out in outs)  # fmt: skip
        try:
            assert first.stderr is not None
            for line in first.stderr:
                if "search: trial" in line:
                    break
            first.send_signal(signal.SIGINT)
            _, said = first.communicate(timeout=240)
            assert first.returncode == 130 and "Go on with:" in said, said
            line = next(line.strip() for line in said.splitlines() if line.strip().startswith("autoprec search"))
            again = subprocess.run(
                [sys.executable, "-m", *shlex.split(line)], capture_output=True, text=True, timeout=300
            )
            assert again.returncode == 0, again.stderr
            _, other = second.communicate(timeout=240)
            assert second.returncode == 0, other
        finally:
            first.kill()
            second.kill()
    results = [saved(out) for out in outs]
    assert max(result.trials for result in results) >= 8
    rows = [{row["trial"] for row in table(out) if row["trial"]} for out in outs]
    assert rows[0] <= rows[1] or rows[1] <= rows[0]  # one study, of which one saw the end
    assert all(row["state"] in ("COMPLETE", "FAIL") for out in outs for row in table(out))


# without a server


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.mark.usefixtures("short_measurements")
def test_who_joins_measures_no_baseline_and_leaves_running_trials_alone(tmp_path: Path, url: str) -> None:
    first = search(workload(), budget=300, trials=2, out=tmp_path / "a", storage=url)
    storage = machines.open_database(url)
    (summary,) = [s for s in optuna.get_all_study_summaries(storage) if not s.study_name.endswith("-turns")]
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    assert summary.study_name.endswith("-infer-sample-cpu-torch-" + torch.__version__)
    with other_machine(study, storage) as other:  # as another machine is at it
        trial = other.ask()
        for name, distribution in study.trials[0].distributions.items():
            assert isinstance(distribution, CategoricalDistribution)
            trial.suggest_categorical(name, distribution.choices)
        waits: list[str] = []

        def listen(progress: Progress) -> None:
            if progress.message.startswith("waiting for trials"):  # those are all that are left
                waits.append(study.trials[trial.number].state.name)
                trial.set_user_attr("measurement", as_json(found(trial)))

        second = search(workload(), budget=300, trials=5, out=tmp_path / "b", storage=url, resume=True, progress=listen)
    assert waits == ["RUNNING"] and second.trials == 5
    assert [(m.name, m.drop, m.speedup) for m in second.baselines] == [
        (m.name, m.drop, m.speedup) for m in first.baselines
    ]
    assert second.evaluations == first.evaluations + 2
    assert second.seconds > first.seconds
    assert [t.params for t in measured(study)].count(trial.params) == 1


@pytest.mark.usefixtures("short_measurements")
def test_devices_are_kept_apart_in_one_storage(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(workload(), budget=300, trials=1, out=tmp_path / "a", storage=url)
    other = dataclasses.replace(samples.device_profile(), name="other-cpu")
    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: other)
    with pytest.raises(StudyError, match=r"holds a search on sample-cpu with torch 2\.13\.0, and this is other-cpu"):
        search(workload(), budget=300, trials=2, out=tmp_path / "a", storage=url, resume=True)
    second = search(workload(), budget=300, trials=1, out=tmp_path / "b", storage=url, resume=True)
    assert second.evaluations == first.evaluations  # all of it was measured there
    third = search(workload(), budget=300, trials=2, out=tmp_path / "b", storage=url, resume=True)
    assert third.device == "other-cpu" and third.evaluations == second.evaluations + 1
    assert saved(tmp_path / "a") == first


@contextlib.contextmanager
def other_machine(study: optuna.Study, storage: optuna.storages.RDBStorage) -> Iterator[machines.Machines]:
    found = machines.Machines(study, storage, Patience())
    try:
        yield found
    finally:
        found.close()


def ledger_in(tmp_path: Path, url: str, name: str) -> Ledger:
    with RunFolder(tmp_path / name) as folder:
        return open_ledger(
            folder,
            url,
            name="s",
            identity={"weights": "w"},
            setting=SETTING,
            limit=DropLimit.parse("1%"),
            resume=True,
        )


CHOICES = {"unit": CategoricalDistribution(["fp32", "bf16", "fp16"])}
SETTING = SearchSetting(
    command=None,
    started="2026-01-01T00:00:00+00:00",
    max_drop="1%",
    budget_seconds=60.0,
    seed=0,
    batches=2,
    unseen_batches=0,
    batch_size=2,
    seq_len=12,
    data=(),
    versions={},
)


def found(trial: optuna.Trial) -> Measurement:
    return Measurement(
        name=f"trial {trial.number}",
        assignment={unit: Format(choice) for unit, choice in trial.params.items()},
        drop=0.01,
        drop_percent=1.0,
        step_ms=2.0,
    )


def test_a_machine_that_went_is_found_out_by_its_heartbeat(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "GRACE_SECONDS", 1)
    monkeypatch.setattr(machines, "BEAT_SECONDS", 3600)
    gone, here = ledger_in(tmp_path, url, "gone"), ledger_in(tmp_path, url, "here")
    trial = gone.ask(CHOICES)
    gone.begin(trial, {"unit": Format(trial.params["unit"])})
    here.refresh()
    assert here.elsewhere() == {0: trial.params} and not here.rows
    gone.close()
    time.sleep(2.5)  # whole seconds on SQLite's clock
    here.refresh()
    (row,) = here.rows
    assert (row.trial, row.state, row.gone) == (0, "FAIL", True) and str(os.getpid()) in str(row.measurement.reason)
    again = here.ask(CHOICES)
    assert (again.number, again.params) == (1, trial.params)
    # it was asleep only: what it measured is kept, under another number
    gone.add_trial(trial, found(trial))
    assert [(row.trial, row.state) for row in gone.rows] == [(0, "FAIL"), (2, "COMPLETE")]
    # and whoever was to measure it again sees that
    here.refresh()
    assert [row.trial for row in here.rows] == [0, 2]
    here.close()


def test_what_died_before_its_first_heartbeat_is_cleared(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path, url, "here")
    ledger.study._storage.create_new_trial(ledger.study._study_id)
    states = []
    for grace in (machines.GRACE_SECONDS, -1):
        monkeypatch.setattr(machines, "GRACE_SECONDS", grace)
        ledger.refresh()
        states.append(ledger.study.trials[0].state)
    assert states == [TrialState.RUNNING, TrialState.FAIL]
    ledger.close()


def test_one_machine_at_a_time_does_what_one_does_for_all(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_LOOK_SECONDS", 0.05)
    order: list[str] = []
    one, other = ledger_in(tmp_path, url, "one"), ledger_in(tmp_path, url, "other")

    def second() -> None:
        with other.turn(order.append):
            order.append("second")

    waiting = threading.Thread(target=second)
    with one.turn(order.append):
        waiting.start()
        time.sleep(0.5)
        order.append("first")
    waiting.join()
    by = f"{socket.gethostname()}, process {os.getpid()}"
    assert order[-1] == "second" and order[-2] == "first" or order[-2] == by
    assert by in order[: order.index("first")]
    one.close()
    other.close()


def test_ctrl_c_ends_ones_own_trials_only(tmp_path: Path, url: str) -> None:
    one, other = ledger_in(tmp_path, url, "one"), ledger_in(tmp_path, url, "other")
    mine, theirs = one.ask(CHOICES), other.ask(CHOICES)
    one.stop()
    states = [t.state for t in one.study.trials]
    assert (states[mine.number], states[theirs.number]) == (TrialState.FAIL, TrialState.RUNNING)
    assert one.study.trials[2].state is TrialState.WAITING
    one.close()
    other.close()


def test_without_the_driver_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        StudyError, match=r"storage postgresql://me:\*\*\*@db/studies cannot be opened.*'autoprec\[postgres\]'"
    ):
        ledger_in(tmp_path, "postgresql://me:s3cret@db/studies", "run")
