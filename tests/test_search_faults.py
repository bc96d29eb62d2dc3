"""Tests of searches that cannot be, fail in the middle, are interrupted or killed, or run out of space."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import samples
import tiny_models
import torch
from searching import (
    FILES,
    RUNNABLE,
    Evaluate,
    assert_as_found,
    instead,
    names_of,
    sample_device,
    saved,
    state_of,
    table,
    trials_of,
    workload,
)
from torch import Tensor, nn

from autoprec import Plan, Workload, apply, search
from autoprec.errors import AutoprecError, DeviceError, Interrupted, MeasurementError, StudyError
from autoprec.formats import Format
from autoprec.measurement import Request
from autoprec.records import (
    FormatSupport,
    Measurement,
    SearchResult,
    Support,
)

pytestmark = pytest.mark.usefixtures("short_measurements")

# what cannot be


def test_a_budget_too_short_says_what_it_takes(tmp_path: Path) -> None:
    work = workload()
    before = state_of(work.model)
    with pytest.raises(StudyError, match=r"too short: the baselines alone take about \d+s .*Try --budget \d+s"):
        search(work, budget=0.001, out=tmp_path / "runs" / "new")
    assert names_of(tmp_path) == set()
    assert_as_found(work.model, before)


def test_a_device_that_is_not_the_workloads(tmp_path: Path) -> None:
    for device in ("cuda", "mps", "cpu:3"):
        with pytest.raises(DeviceError, match=rf"this one is on cpu, not on '{device}'.*name a GPU of the catalogue"):
            search(workload(), budget=300, device=device, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_space_with_a_fault_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AutoprecError, match="there is no search space 'rolls'; closest: roles"):
        search(workload(), budget=300, space="rolls", out=tmp_path / "run")
    assert names_of(tmp_path) == set()


def test_a_reference_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    work = workload()
    with torch.no_grad():
        work.model.get_parameter("transformer.ln_f.weight").fill_(torch.inf)
    with pytest.raises(MeasurementError, match="the FP32 reference's output is not finite"):
        search(work, budget=300, trials=1, out=tmp_path / "run")
    assert names_of(tmp_path) == set()


def test_a_reference_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    work = workload()

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nsecond line")

    work.model.register_forward_pre_hook(refuse)
    with pytest.raises(MeasurementError, match=r"cannot be run: CUDA out of memory.*20\.00 GiB\. .*--batch-size"):
        search(work, budget=300, trials=1, out=tmp_path / "run")
    assert names_of(tmp_path) == set()


class _Bounded(nn.Module):
    """Passes its input on, and refuses to when the head is in low precision."""

    def __init__(self, inner: nn.Module, error: RuntimeError) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids).logits
        if logits.dtype is not torch.float32:
            raise self.error
        return logits


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails"),
            "out of memory: CUDA out of memory. Tried to allocate 2 GiB.",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        ),
        (
            RuntimeError("\nmat1 and mat2 must have the same dtype\nstack"),
            "mat1 and mat2 must have the same dtype",
        ),
    ],
)
def test_a_plan_that_fails_is_noted_and_the_search_goes_on(tmp_path: Path, error: RuntimeError, reason: str) -> None:
    model = _Bounded(tiny_models.gpt2(vocab_size=64, n_embd=32, n_layer=1), error)
    batches = [b["input_ids"] for b in workload().batches if isinstance(b, dict)]
    work, out = Workload(model, batches, mode="infer", outputs="logits"), tmp_path / "run"
    before = state_of(model)
    result = search(work, budget=300, trials=99, space="roles", out=out)
    assert {m.name: m.reason for m in result.baselines if m.name in RUNNABLE} == {
        "uniform fp32": None,
        "uniform bf16": reason,
        "uniform fp16": reason,
        "cast bf16": reason,
    }
    rows = [r for r in table(out) if r["trial"]]
    low = [r for r in rows if r["inner.lm_head" if "inner.lm_head" in r else "lm_head"] == "bf16"]
    assert low and all((r["state"], r["reason"], r["drop"]) == ("FAIL", reason, "") for r in low)
    assert len(low) < len(rows) and all(r["state"] == "COMPLETE" for r in rows if r not in low)
    assert_as_found(model, before)


def test_a_plan_that_cannot_be_applied_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(request: Request, measure: Evaluate) -> Measurement:
        if request.name == "uniform bf16":
            raise DeviceError("the driver says no")
        return measure(request)

    instead(monkeypatch, change)
    result = search(workload(), budget=300, trials=1, out=tmp_path / "run")
    assert {m.name: m.reason for m in result.baselines if m.name in RUNNABLE}["uniform bf16"] == "the driver says no"
    assert result.trials == 1


def test_fp8_that_the_device_has_and_the_runtime_lacks_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = samples.device_profile()
    formats = {**profile.formats, Format.FP8: FormatSupport(Support.NATIVE, "torch._scaled_mm runs")}
    monkeypatch.setattr(
        "autoprec.study.run.probe_device", lambda *_, **__: dataclasses.replace(profile, formats=formats)
    )
    result = search(workload(), budget=300, trials=1, out=tmp_path / "run")
    reasons = {m.name: m.reason for m in result.baselines}
    assert reasons["uniform fp8"] == "sample-cpu cannot run fp8: cpu has no FP8 matmul in PyTorch"
    assert "fp8 with high edges" not in reasons


# interrupted, killed, out of space


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out, count = workload("train"), tmp_path / "a run", [0]

    def change(request: Request, measure: Evaluate) -> Measurement:
        count[0] += 1
        if count[0] > 6:
            hook = request.workload.model.register_forward_pre_hook(_interrupt)
            try:
                return measure(request)
            finally:
                hook.remove()
        return measure(request)

    instead(monkeypatch, change)
    before = state_of(work.model)
    with pytest.raises(Interrupted, match=r"what was measured is in .*autoprec search tiny --resume --out '") as caught:
        search(work, budget=300, out=out)
    assert_as_found(work.model, before)
    result = caught.value.result
    assert isinstance(result, SearchResult) and result == saved(out)
    assert caught.value.folder == str(out) and result.evaluations == 6 and result.trials == 2
    assert len(table(out)) == len(result.baselines) + 2

    study = optuna.load_study(
        study_name=None,
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))),
    )
    assert not study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    count[0] = -100
    again = search(work, budget=300, trials=6, out=out, resume=True)
    assert again.trials == 6 and again.evaluations == 10
    interrupted = max(trials_of(out)[:2]) + 1
    assert interrupted not in trials_of(out)
    # what was interrupted is asked for again, so what its number stood for is among the measured
    wanted = study.trials[interrupted].params
    assert any(all(row[u] == f for u, f in wanted.items()) for row in table(out) if row["trial"])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_anything_was_measured_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(request: Request, measure: Evaluate) -> Measurement:
        raise KeyboardInterrupt

    instead(monkeypatch, change)
    with pytest.raises(Interrupted) as caught:
        search(workload(), budget=300, out=tmp_path / "run")
    assert caught.value.result is None
    assert names_of(tmp_path) == set()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
import searching as t
torch.set_num_threads(1)
import autoprec
from autoprec.study import measuring
import autoprec.study.run
autoprec.study.run.probe_device = t.sample_device
count = 0
def measure(request):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.evaluate(t.short(request))
measuring.evaluate = measure
autoprec.search(t.workload(), budget=300, out={out!r})
"""


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert names_of(out) == FILES - {"result.json"}
    before = table(out)
    assert len(trials_of(out)) == 2

    # as a kill in the middle of a write would leave it
    (out / "study.journal.lock").symlink_to(out / "study.journal")
    with (out / "study.journal").open("ab") as file:
        file.write(b'{"op_code":')
    result = search(workload(), budget=300, trials=4, out=out, resume=True)
    assert result.trials == 4 and result.evaluations == 8
    for row, earlier in zip(table(out), before, strict=False):  # step times are put on one clock in the end
        assert {k: v for k, v in row.items() if k != "step_ms"} == {k: v for k, v in earlier.items() if k != "step_ms"}
    assert names_of(out) - {"plan.json"} == FILES


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_result_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    out = tmp_path / "run"
    search(workload(), budget=300, trials=1, out=out)
    before = {n: (out / n).read_bytes() for n in ("result.json", "device.json", "units.json")}
    real: dict[str, Callable[..., Any]] = {"fsync": os.fsync, "replace": os.replace}

    def full(*arguments: Any) -> Any:
        place = arguments[0] if call == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
        if ".result.json." in str(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real[call](*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(AutoprecError, match=r"cannot write .*result\.json: No space left.*the previous file is unch"):
        search(workload(), budget=300, trials=2, out=out, resume=True)
    assert {n: (out / n).read_bytes() for n in before} == before
    assert not list(out.glob(".*.tmp"))
    monkeypatch.undo()
    monkeypatch.setattr("autoprec.study.run.probe_device", sample_device)
    assert search(workload(), budget=300, trials=2, out=out, resume=True).trials == 2


def test_a_full_disk_at_the_journal_is_said_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, left = tmp_path / "run", os.fsync, [25]

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("study.journal"):
            left[0] -= 1
            if left[0] < 0:
                with open(f"/proc/self/fd/{handle}", "ab") as file:  # as if the line before had filled the disk
                    os.truncate(handle, file.tell() - 7)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match=f"cannot write the study of {out}: No space left on device.*--resume"):
        search(workload(), budget=300, trials=30, out=out)
    left[0] = 10**9
    known = len(table(out))
    assert known >= 4
    result = search(workload(), budget=300, trials=3, out=out, resume=True)
    assert result.trials == 3 and len(table(out)) >= known


def test_a_model_with_a_plan_in_force_is_refused(tmp_path: Path) -> None:
    work = workload()
    handle = apply(work.model, Plan.uniform(work.model, "bf16"))
    with pytest.raises(AutoprecError, match="a plan is in force on this model already"):
        search(work, budget=300, trials=1, out=tmp_path / "run")
    handle.remove()
    assert names_of(tmp_path) == set()


def test_optunas_own_log_is_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(workload(), budget=300, trials=1, out=tmp_path / "run")
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr().err == ""
