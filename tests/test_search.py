"""Tests of searches as a whole: real measurements of a small GPT-2, seconds each.

Times are measured and never asserted. Where a verdict must come out one way, speedups are put into real
measurements by hand.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import samples
import tiny_models
import torch
from torch import Tensor, nn

from autoprec import Plan, Workload, applied, apply, search
from autoprec.errors import AutoprecError, DeviceError, Interrupted, MeasurementError, StudyError
from autoprec.files import from_json, read_json
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.records import (
    DeviceProfile,
    FormatSupport,
    Measurement,
    Mode,
    Progress,
    SearchResult,
    Support,
    TrainingConfirmation,
    TrainingVerdict,
    VerdictDecision,
)
from autoprec.runtime.scope import Scope
from autoprec.study import course
from autoprec.study.confirming import OutOfTime
from autoprec.training import confirm_training

FILES = {
    "device.json",
    "units.json",
    "sensitivity.json",
    "speed.json",
    "study.journal",
    "trials.csv",
    "result.json",
    "run.lock",
}
RESULT_KEYS = {
    "schema", "reference", "baselines", "front", "chosen", "verdict", "trials", "evaluations", "seconds",
    "predicted_bound",
}  # fmt: skip
MEASUREMENT_KEYS = {
    "name", "assignment", "drop", "drop_ci95", "drop_percent", "loss_rise", "grad_error", "step_ms", "step_ms_ci95",
    "speedup", "speedup_over_uniform", "peak_bytes", "metric", "origin", "plan",
}  # fmt: skip
RUNNABLE = ["uniform fp32", "uniform bf16", "uniform fp16", "cast bf16"]

Evaluate = Callable[[Request], Measurement]


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure shortly, on a device whose profile is the same everywhere."""
    monkeypatch.setattr("autoprec.study.run.probe_device", _profile)
    monkeypatch.setattr(course, "evaluate", lambda request: evaluate(_short(request)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other where another process has a core
    yield
    torch.set_num_threads(threads)


def _profile(device: str = "auto", *, seconds: float = 8.0) -> DeviceProfile:
    return samples.device_profile()


def _short(request: Request) -> Request:
    return dataclasses.replace(request, timing_seconds=0.0, min_pairs=4, stop_slower=None)


def instead(monkeypatch: pytest.MonkeyPatch, change: Callable[[Request, Evaluate], Measurement]) -> None:
    """Have `change` measure, with the real function at hand."""
    monkeypatch.setattr(course, "evaluate", lambda request: change(request, lambda r: evaluate(_short(r))))


def workload(mode: str = "infer", *, model_seed: int = 0, data_seed: int = 0) -> Workload:
    torch.manual_seed(model_seed)
    model = tiny_models.gpt2(vocab_size=64, n_embd=32, n_layer=2)
    generator = torch.Generator().manual_seed(data_seed)
    batches = [torch.randint(2, 64, (2, 12), generator=generator) for _ in range(2)]
    return Workload(model, [{"input_ids": ids, "labels": ids} for ids in batches], mode=mode, model_id="tiny")


def names_of(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((path / "trials.csv").read_text().splitlines()))


def trials_of(path: Path) -> list[int]:
    return [int(row["trial"]) for row in table(path) if row["trial"]]


def saved(path: Path) -> SearchResult:
    return from_json(SearchResult, read_json(path / "result.json", what="result"), what="result")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a search must give back: bits, classes, train flags, gradients, hooks."""
    return {
        "bits": {k: v.clone() for k, v in model.state_dict(keep_vars=True).items()},
        "pointers": [p.data_ptr() for p in model.parameters()],
        "classes": [type(m) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
    }


def assert_as_found(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, value in before.pop("bits").items():
        assert torch.equal(value, after["bits"][name]) and value.dtype == after["bits"][name].dtype, name
    del after["bits"]
    assert after == before
    assert not any(isinstance(m, Scope) for m in model.modules())
    assert not torch.is_autocast_enabled("cpu")


# a search from end to end


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_search_measures_and_writes(tmp_path: Path, mode: str) -> None:
    work, out, news = workload(mode), tmp_path / "run", list[Progress]()
    before, random = state_of(work.model), torch.get_rng_state()
    result = search(work, budget=300, trials=5, out=out, progress=news.append)

    assert names_of(out) == FILES | ({"plan.json"} if result.chosen is not None else set())
    assert saved(out) == result
    data = json.loads((out / "result.json").read_text())
    assert set(data) >= RESULT_KEYS
    for entry in (data["reference"], *data["baselines"], *data["front"]):
        assert set(entry) >= MEASUREMENT_KEYS
        assert set(entry["origin"]) == {"drop", "step_ms", "peak_bytes", "metric"}
    assert data["schema"] == "autoprec/search@1" and set(data["verdict"]) == {
        "decision", "text", "best_uniform", "break_even_hours"
    }  # fmt: skip

    assert (result.model_id, result.device, result.mode) == ("tiny", "sample-cpu", Mode(mode))
    assert result.trials == 5
    assert result.evaluations == len(RUNNABLE) + 5
    assert [m.name for m in result.baselines if m.drop is not None] == RUNNABLE
    assert {m.name: bool(m.reason) for m in result.baselines if m.drop is None} == {
        "uniform tf32": True,
        "uniform fp8": True,
    }
    assert result.reference.drop == 0.0 and result.reference.speedup == 1.0
    assert {(r.format, r.reason) for r in result.removed} == {
        (Format.FP16, "sample-cpu has no native fp16: 0.47x fp32's matmul rate at 1024"),
        (Format.FP8, "sample-cpu has no native fp8: no FP8 matmul unit on this CPU"),
    }
    if mode == "train":
        measured = [m for m in result.baselines if m.drop is not None]
        assert all(m.grad_error is not None and m.grad_error_limit is not None for m in measured)

    rows = table(out)
    assert (
        (out / "trials.csv")
        .read_text()
        .startswith(
            "trial,state,drop,step_ms,peak_bytes,grad_error,origin,reason,embeddings,blocks.0.attention,blocks.0.ffn,"
            "blocks.1.attention,blocks.1.ffn,lm_head\n"
        )
    )
    assert len(rows) == len(result.baselines) + result.trials
    points = [(float(r["drop"]), float(r["step_ms"])) for r in rows if r["state"] == "COMPLETE"]
    for member in result.front:
        assert member.drop is not None and member.step_ms is not None
        assert not any(
            d <= member.drop and t <= member.step_ms and (d, t) != (member.drop, member.step_ms) for d, t in points
        )
    bound = result.predicted_bound  # no measured plan beats it, on the clock of the result
    assert bound is not None
    usable = [m.step_ms for m in result.front if m.step_ms and (m.drop or 0.0) <= bound["drop"]]
    assert bound["step_ms"] <= min(usable) * (1 + 1e-9)
    assert [p.stage for p in news][0] == "probe" and news[-1].stage == "done"
    assert news[-1].message == result.verdict.text
    assert [p.measurement.name for p in news if p.measurement and p.stage == "baselines"] == [
        m.name for m in result.baselines
    ]
    assert len([p for p in news if p.trial is not None]) == 5
    assert_as_found(work.model, before)
    assert torch.equal(torch.get_rng_state(), random)


def _as_if_fast(request: Request, measure: Evaluate) -> Measurement:
    """Measure for real, then let plans with the first attention in FP32 be twice as fast as all others."""
    found, factor = measure(request), 1.0
    if request.reference_ms is not None:
        factor = 3.0 if found.assignment["blocks.0.attention"] is Format.FP32 else 1.5
    assert found.step_ms is not None
    clock = request.reference_ms or found.step_ms
    return dataclasses.replace(
        found,
        step_ms=clock / factor,
        step_ms_ci95=(clock / factor * 0.99, clock / factor * 1.01),
        speedup=factor,
        speedup_ci95=(factor * 0.99, factor * 1.01),
        pace=None,
    )


def test_the_plan_of_the_verdict_loads_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, _as_if_fast)
    work, out = workload("train"), tmp_path / "run"
    # of 16 assignments 8 have attention in BF16, and uniform bf16 is one of them: nine trials must meet another
    result = search(work, budget=300, trials=9, space="roles", max_drop="5%", out=out)

    assert result.verdict.decision is VerdictDecision.USE_PLAN
    assert result.verdict.best_uniform in RUNNABLE
    assert result.verdict.break_even_hours == pytest.approx(result.seconds / 3600 / (1 - 1.5 / 3.0))
    assert result.chosen is not None
    chosen = result.front[result.chosen]
    assert chosen.plan == str(out / "plan.json")
    assert [m.plan for m in result.front if m is not chosen] == [None] * (len(result.front) - 1)
    assert chosen.speedup_over_uniform == pytest.approx(2.0)

    plan = Plan.load(out / "plan.json")
    assert plan.assignment == chosen.assignment
    assert plan.assignment["blocks.0.attention"] is Format.FP32
    assert (plan.mode, plan.device.name, plan.ambient) == (Mode.TRAIN, "sample-cpu", Format.BF16)
    assert all(u.reason for u in plan.units)
    figures = plan.evidence
    assert figures.drop is not None and (figures.drop.value, figures.drop.unit) == (chosen.drop, "nats")
    assert figures.drop.ci95 == chosen.drop_ci95
    assert figures.step_ms is not None and figures.step_ms.value == chosen.step_ms
    assert figures.speedup is not None and figures.speedup.value == 3.0
    assert figures.weights_digest and figures.seed == 0 and figures.versions == {"torch": "2.13.0"}

    # the evidence is the drop of this very plan: measured again it is the same to the last bit
    again = evaluate(Request(workload=work, plan=plan, min_pairs=1, timing_seconds=0.0))
    assert again.drop == chosen.drop
    batch = work.batches[0]
    assert isinstance(batch, dict)
    plain: Tensor = work.model(batch["input_ids"]).logits
    with applied(work.model, plan):
        lowered: Tensor = work.model(batch["input_ids"]).logits
    assert not torch.equal(plain, lowered)


def test_a_uniform_plan_is_written_where_it_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(request: Request, measure: Evaluate) -> Measurement:
        found = measure(request)
        factor = {"uniform bf16": 2.0}.get(request.name, 1.0)
        clock = request.reference_ms or found.step_ms or 1.0
        return dataclasses.replace(
            found, step_ms=clock / factor, speedup=factor, speedup_ci95=(factor, factor), pace=None
        )

    instead(monkeypatch, change)
    result = search(workload(), budget=300, trials=2, max_drop="5%", out=tmp_path / "run")
    assert result.verdict.decision is VerdictDecision.USE_UNIFORM
    assert result.verdict.best_uniform == "uniform bf16"
    batches = {one.name: one for one in result.largest_batches}
    uniform = next(m for m in result.baselines if m.name == "uniform bf16")
    assert {"uniform fp32", "uniform bf16"} <= set(batches)
    assert uniform.step_ms is not None
    for one in batches.values():
        assert one.batch_size > 2 and one.total_bytes < 25_300_000_000 and one.accumulation == 1
    rate = 1e3 * 2 * 12 / uniform.step_ms
    assert batches["uniform bf16"].tokens_per_s.value == pytest.approx(rate)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.assignment == Plan.uniform(workload().model, "bf16").assignment
    assert plan.units[0].reason.startswith("uniform bf16")


def test_a_plan_of_an_earlier_verdict_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, _as_if_fast)
    out = tmp_path / "run"
    assert search(workload(), budget=300, trials=2, max_drop="5%", out=out).chosen is not None
    result = search(workload(), budget=300, trials=2, max_drop="0 nats", out=out, resume=True)
    assert result.verdict.decision is VerdictDecision.DO_NOTHING
    assert not (out / "plan.json").exists()


def test_the_small_space_is_seen_whole_and_nothing_twice(tmp_path: Path) -> None:
    work, out = workload(), tmp_path / "run"
    result = search(work, budget=300, trials=99, space="roles", out=out)  # without, it ends where nothing is to gain
    # 2^4 assignments, of which baselines stand for two: uniform bf16, and fp32 for all units in it
    units = ["embeddings", "blocks.0.attention", "blocks.0.ffn", "blocks.1.attention", "blocks.1.ffn", "lm_head"]
    known = {"baseline uniform fp32", "baseline uniform bf16"}
    seen = [tuple(r[u] for u in units) for r in table(out) if r["trial"] or r["reason"] in known]
    assert len(seen) == len(set(seen)) == 16
    assert result.trials == 14 and result.evaluations == 14 + len(RUNNABLE)


def test_the_recommended_plan_comes_first_or_beside_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recommend(changes: dict[str, Any]) -> None:
        def plan(profile: Any, device: DeviceProfile, **_: Any) -> Plan:
            return Plan.uniform(profile, "bf16", device=device, **changes).replace({"lm_head": "fp32"})

        monkeypatch.setattr("autoprec.study.run.recommend_plan", plan)

    recommend({})
    news: list[Progress] = []
    search(workload(), budget=300, trials=1, out=tmp_path / "in", progress=news.append)
    assert [p.measurement.name for p in news if p.trial is not None and p.measurement] == ["recommended"]
    recommend({"tf32": True})  # which no plan of the space has
    news.clear()
    search(workload(), budget=300, trials=1, out=tmp_path / "beside", progress=news.append)
    beside = [p.measurement.name for p in news if p.stage == "baselines" and p.measurement]
    assert beside[-1] == "recommended"


def test_modules_are_searched_apart(tmp_path: Path) -> None:
    result = search(workload(), budget=300, trials=2, space="modules", out=tmp_path / "run")
    assert "blocks.0.attention.in" in result.baselines[0].assignment
    probed = json.loads((tmp_path / "run" / "sensitivity.json").read_text())
    assert {"blocks.0.attention.in", "blocks.0.attention.out"} <= {row["unit"] for row in probed["drops"]}
    assert {"blocks.1.ffn.in", "blocks.1.ffn.out"} <= set(table(tmp_path / "run")[0])


def test_a_budget_ends_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is counted, not waited for: each measurement 'takes' ten seconds of a clock that we turn."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for probe in ("sensitivity_of", "speed_of"):
        monkeypatch.setattr(course, probe, lambda *_: (None, None))  # it would wait for the clock

    def change(request: Request, measure: Evaluate) -> Measurement:
        now[0] += 10.0
        return measure(request)

    instead(monkeypatch, change)
    result = search(workload(), budget="75s", out=tmp_path / "run")
    # four baselines and three trials end at 70 s; an eighth measurement would end at 80
    assert result.evaluations == 7 and result.trials == 3 and result.seconds == 70.0


def test_baselines_that_do_not_fit_are_left_out_and_measured_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for probe in ("sensitivity_of", "speed_of"):
        monkeypatch.setattr(course, probe, lambda *_: (None, None))  # it would wait for the clock

    def change(request: Request, measure: Evaluate) -> Measurement:
        now[0] += 10.0
        return measure(request)

    instead(monkeypatch, change)
    first = search(workload(), budget="25s", out=tmp_path / "run")
    assert [m.name for m in first.baselines if m.drop is not None] == ["uniform fp32", "uniform bf16"]
    second = search(workload(), budget="55s", out=tmp_path / "run", resume=True)
    assert {m.name for m in second.baselines if m.drop is not None} == set(RUNNABLE)
    assert second.trials == 3
    assert second.seconds == 20.0 + 50.0 and second.evaluations == 2 + 5


def test_with_a_device_probed_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = search(workload(), budget=20, trials=1, out=tmp_path / "run")
    profile = from_json(DeviceProfile, read_json(tmp_path / "run" / "device.json", what="device"), what="device")
    assert profile.kind == "cpu" and profile.gemm_rates
    assert result.device == profile.name
    assert [m.name for m in result.baselines][:1] == ["uniform fp32"]


# going on


def test_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    first = search(workload(), budget=300, trials=3, out=out)
    measured: list[str] = []
    clocks: set[float | None] = set()

    def change(request: Request, measure: Evaluate) -> Measurement:
        measured.append(request.name)
        clocks.add(request.reference_ms)
        return measure(request)

    instead(monkeypatch, change)
    second = search(workload(), budget=300, trials=6, out=out, resume=True)
    assert len(measured) == 3 and not set(measured) & {m.name for m in first.baselines}
    assert second.trials == 6 and second.evaluations == first.evaluations + 3
    numbers = trials_of(out)
    assert numbers == sorted(set(numbers)) and len(numbers) == 6
    assert [m.name for m in second.baselines] == [m.name for m in first.baselines]
    assert [m.drop for m in second.baselines] == [m.drop for m in first.baselines]
    assert second.reference.reference_step_ms == first.reference.reference_step_ms
    assert clocks == {second.reference.reference_step_ms}
    assert second.seconds > first.seconds


def test_resume_into_an_empty_folder_starts(tmp_path: Path) -> None:
    assert search(workload(), budget=300, trials=1, out=tmp_path / "run", resume=True).trials == 1


def test_a_second_search_in_a_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    search(workload(), budget=300, trials=1, out=out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(StudyError, match=f"{out} holds a search already.*--resume.*--out"):
        search(workload(), budget=300, trials=1, out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def _other_model() -> Workload:
    torch.manual_seed(0)
    batches = [dict(b) for b in workload().batches if isinstance(b, dict)]
    return Workload(tiny_models.gpt2(vocab_size=64, n_embd=32, n_layer=1), batches, mode="infer")


@pytest.mark.parametrize(
    ("other", "options", "differs"),
    [
        (lambda: workload(model_seed=1), {}, "weights"),
        (lambda: workload(data_seed=1), {}, "data"),
        (lambda: workload(), {"space": "roles"}, "space"),
        (lambda: workload("train"), {}, "mode"),
        (_other_model, {}, "model"),
    ],
)
def test_resume_with_something_else_is_refused(
    tmp_path: Path, other: Callable[[], Workload], options: dict[str, Any], differs: str
) -> None:
    out = tmp_path / "run"
    first = search(workload(), budget=300, trials=1, out=out)
    files = {n: (out / n).read_bytes() for n in FILES - {"study.journal"}}
    with pytest.raises(StudyError, match=f"made with another .*{differs}.*do not compare"):
        search(other(), budget=300, trials=2, out=out, resume=True, **options)
    assert {n: (out / n).read_bytes() for n in files} == files
    assert search(workload(), budget=300, trials=1, out=out, resume=True).baselines == first.baselines


def test_resume_on_another_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(workload(), budget=300, trials=1, out=tmp_path / "run")
    other = dataclasses.replace(samples.device_profile(), name="other-cpu")
    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: other)
    with pytest.raises(StudyError, match="made with another device;"):
        search(workload(), budget=300, trials=2, out=tmp_path / "run", resume=True)


# a storage of one's own


def test_a_database_as_storage(tmp_path: Path) -> None:
    url, out = f"sqlite:///{tmp_path}/study.db", tmp_path / "run"
    first = search(workload(), budget=300, trials=1, out=out, storage=url)
    assert names_of(out) - {"plan.json"} == FILES - {"study.journal"}
    with pytest.raises(StudyError, match="holds a search already"):
        search(workload(), budget=300, trials=2, out=out, storage=url)
    with pytest.raises(StudyError, match=r"storage sqlite:.* holds a search of this model already.*--resume"):
        search(workload(), budget=300, trials=2, out=tmp_path / "new", storage=url)
    assert not (tmp_path / "new").exists()
    second = search(workload(), budget=300, trials=2, out=tmp_path / "other", storage=url, resume=True)
    assert second.trials == 2
    assert [(m.name, m.drop) for m in second.baselines] == [(m.name, m.drop) for m in first.baselines]
    assert len(table(tmp_path / "other")) == len(second.baselines) + 2


@pytest.mark.parametrize("url", ["nonsense", "nosuchdb:///x", "sqlite:////nowhere/at/all.db"])
def test_a_storage_that_cannot_be_opened_leaves_nothing(tmp_path: Path, url: str) -> None:
    with pytest.raises(StudyError, match=r"storage .* cannot be opened: .*sqlite:///study\.db"):
        search(workload(), budget=300, trials=1, out=tmp_path / "run", storage=url)
    assert names_of(tmp_path) == set()


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
import test_search as t
torch.set_num_threads(1)
from autoprec.study import course
from autoprec.study.confirming import OutOfTime
import autoprec.study.run
autoprec.study.run.probe_device = t._profile
count = 0
def measure(request):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.evaluate(t._short(request))
course.evaluate = measure
t.search(t.workload(), budget=300, out={out!r})
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
    monkeypatch.setattr("autoprec.study.run.probe_device", _profile)
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


# unseen batches


def with_batches(count: int) -> Workload:
    work = workload()
    generator = torch.Generator().manual_seed(9)
    batches = [torch.randint(2, 64, (2, 12), generator=generator) for _ in range(count)]
    return work.with_batches([{"input_ids": ids, "labels": ids} for ids in batches])


def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every plan but FP32 come out faster, by how many units are low."""

    def change(request: Request, measure: Evaluate) -> Measurement:
        found = measure(request)
        low = sum(f is not Format.FP32 for f in found.assignment.values())
        speedup = 1.0 + 0.1 * low
        interval = (speedup * 0.99, speedup * 1.01)
        pace = "faster" if low else "same"
        return dataclasses.replace(found, speedup=speedup, speedup_ci95=interval, pace=pace, step_ms=10 / speedup)

    instead(monkeypatch, change)


def test_the_choice_is_confirmed_on_batches_that_nothing_else_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch)
    seen: list[Request] = []

    def record(request: Request) -> Measurement:
        seen.append(request)
        return evaluate(request)

    monkeypatch.setattr("autoprec.study.confirming.evaluate", record)
    work = with_batches(10)
    result = search(work, budget=300, trials=3, max_drop="50%", out=tmp_path / "run")
    assert result.chosen is not None and result.confirmed[-1].answer == "within"
    assert result.front[result.chosen].name == result.confirmed[-1].name
    assert f"confirmed on {result.confirmed[-1].batches} unseen batches" in result.verdict.text
    assert all(len(m.batch_drops) == 5 for m in result.front)
    tail = {id(batch) for batch in work.batches[5:]}
    assert seen and all(id(batch) in tail for request in seen for batch in request.workload.batches)


def test_a_plan_that_is_worse_on_unseen_batches_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch)
    tried: list[str] = []

    def change(request: Request) -> Measurement:
        found = evaluate(request)
        tried.append(request.name)
        return dataclasses.replace(found, drop=1e3) if request.name == tried[0] else found

    monkeypatch.setattr("autoprec.study.confirming.evaluate", change)
    result = search(with_batches(16), budget=300, trials=3, max_drop="50%", out=tmp_path / "run")
    assert result.confirmed[0].answer == "above" and "above the limit" in str(result.confirmed[0].reason)
    chosen = None if result.chosen is None else result.front[result.chosen].name
    assert chosen != result.confirmed[0].name


def test_too_few_batches_to_confirm_are_said(tmp_path: Path) -> None:
    result = search(workload(), budget=300, trials=1, out=tmp_path / "run")
    assert result.confirmed == ()
    assert "2 in all are too few; give 8 or more" in result.notes[-1]


def test_a_plan_that_failed_stays_out_when_time_ends_in_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch)
    tried: list[str] = []

    def change(request: Request) -> Measurement:
        tried.append(request.name)
        if request.name != tried[0]:
            raise OutOfTime
        return dataclasses.replace(evaluate(request), drop=1e3)

    monkeypatch.setattr("autoprec.study.confirming.evaluate", change)
    result = search(with_batches(16), budget=300, trials=3, max_drop="50%", out=tmp_path / "run")
    assert [one.name for one in result.confirmed] == [tried[0]]
    assert "the budget ended before a plan was confirmed" in result.notes[-1]
    assert result.chosen is None or result.front[result.chosen].name != tried[0]


# finalists trained


def test_the_finalist_of_a_search_for_training_is_trained_beside_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch)
    work = with_batches(10).with_mode("train")
    before = state_of(work.model)
    result = search(work, budget=300, trials=2, max_drop="50%", out=tmp_path / "run")
    assert_as_found(work.model, before)
    assert result.chosen is not None
    (trained,) = result.trained
    assert [arm.name for arm in trained.arms] == [result.front[result.chosen].name]
    assert trained.seeds == 3 and 10 <= trained.steps <= 60
    assert saved(tmp_path / "run").trained == result.trained


def test_a_finalist_that_trains_worse_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch)
    tried: list[str] = []

    def worse(work: Workload, plans: dict[str, Plan], **options: Any) -> TrainingConfirmation:
        found = confirm_training(work, plans, **options | {"steps": 2, "seeds": 2})
        tried.extend(plans)
        verdict = TrainingVerdict.WORSE if len(tried) == 1 else TrainingVerdict.NOT_WORSE
        return dataclasses.replace(found, arms=(dataclasses.replace(found.arms[0], verdict=verdict),))

    monkeypatch.setattr("autoprec.study.finalists.confirm_training", worse)
    work = with_batches(10).with_mode("train")
    result = search(work, budget=300, trials=2, max_drop="50%", out=tmp_path / "run")
    assert result.confirmed[0].name == tried[0] and "trained for 2 steps it is worse" in str(result.confirmed[0].reason)
    assert result.chosen is None or result.front[result.chosen].name != tried[0]
    assert [confirmation.arms[0].name for confirmation in result.trained] == tried


def test_a_budget_too_short_to_train_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch)
    monkeypatch.setattr("autoprec.study.finalists._FEWEST", 10**9)
    work = with_batches(10).with_mode("train")
    result = search(work, budget=300, trials=1, max_drop="50%", out=tmp_path / "run")
    assert result.trained == () and any("was not trained: the budget's rest" in note for note in result.notes)
