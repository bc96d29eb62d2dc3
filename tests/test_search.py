"""Tests of searches as a whole: real measurements of a small GPT-2, seconds each.

Times are measured and never asserted. Where a verdict must come out one way, speedups are put into real
measurements by hand.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import tiny_models
import torch
from searching import (
    FILES,
    MEASUREMENT_KEYS,
    RESULT_KEYS,
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
from torch import Tensor

from autoprec import Plan, Workload, applied, search
from autoprec.catalog import find_device
from autoprec.errors import StudyError
from autoprec.files import from_json, read_json
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.recommender.learned import current_tree, shipped_tree
from autoprec.recommender.table import user_table
from autoprec.records import (
    DeviceProfile,
    FormatSupport,
    Measurement,
    Mode,
    Progress,
    Support,
    VerdictDecision,
)
from autoprec.study import course
from autoprec.study.away import predictable
from autoprec.study.reading import read_run

pytestmark = pytest.mark.usefixtures("short_measurements")

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
    # bf16 weights without fp32 copies are measured, but not to train with
    assert [m.name for m in result.baselines if m.barred] == (["cast bf16"] if mode == "train" else [])
    assert mode == "infer" or "cast bf16" not in {m.name for m in result.front}

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
    standing = next(p.standing for p in reversed(news) if p.standing)
    assert (standing.trials, standing.limit, standing.drop_unit) == (5, "0.25%", "nats")
    assert [(m.name, m.step_ms) for m in standing.front] == [(m.name, m.step_ms) for m in result.front]
    assert {m.name for m in standing.baselines} == {m.name for m in result.baselines}
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
    result = search(workload(), budget=300, trials=1, out=tmp_path / "beside", progress=news.append)
    beside = [p.measurement.name for p in news if p.stage == "baselines" and p.measurement]
    assert beside[-1] == "recommended"
    assert [m.name for m in result.baselines] == beside and result.baselines[-1].drop is not None
    assert read_run(tmp_path / "beside").baselines[-1].name == "recommended"


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


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_where_only_fp32_is_native_there_is_nothing_to_choose_and_the_search_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    known = sample_device()
    slow = FormatSupport(Support.EMULATED, "it runs, and gains nothing beyond the noise")
    plain = dataclasses.replace(known, formats={**known.formats, Format.BF16: slow})
    monkeypatch.setattr("autoprec.study.run.probe_device", lambda *_, **__: plain)
    instead(monkeypatch, lambda r, real: real(r) if r.name == "uniform fp32" else stopped(r))

    result = search(workload(mode), budget=300, out=tmp_path / "run")
    assert result.trials == 0 and result.chosen is None
    assert result.verdict.text.startswith("Do nothing: every plan but FP32 is far slower here, or cannot run")
    assert [m.name for m in result.front] == ["uniform fp32"]
    assert not any(m.barred for m in result.baselines)  # the reason of what never ended is why it was stopped


def test_a_format_without_a_known_peak_is_not_searched_in(tmp_path: Path) -> None:
    result = search(workload("infer"), budget=300, out=tmp_path / "run", device="rtx-a2000-12gb")
    reasons = {m.name: m.reason for m in result.baselines}
    for key in ("tf32", "bf16", "fp16"):
        assert f"cannot run {key}: no peak in {key} is known of it" in str(reasons[f"uniform {key}"])
    assert result.chosen is None and result.trials == 0
    assert {r.format for r in result.removed if "no peak" in r.reason} == {Format.BF16, Format.FP16}
    assert result.predicted_bound is None or result.predicted_bound["faster_percent"] == 0
    plain, known = find_device("h100-nvl-94gb"), predictable(find_device("h100-nvl-94gb"))
    assert plain.supports(Format.FP8) is Support.NATIVE and known.supports(Format.FP8) is Support.ABSENT
    assert known.supports(Format.BF16) is Support.NATIVE and known.tf32.support is Support.ABSENT


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_unit_near_the_end_of_fp16s_range_is_kept_from_it(tmp_path: Path, mode: str) -> None:
    work, out = workload(mode), tmp_path / "run"
    model: Any = work.model
    with torch.no_grad():  # activations of 22,000: finite in fp16 here, and above an eighth of what it holds
        model.transformer.h[0].mlp.c_fc.weight.mul_(5e4)
        model.transformer.h[0].mlp.c_proj.weight.div_(5e4)
    result = search(work, budget=300, trials=12, out=out, device="t4")
    fp16 = next(m for m in result.baselines if m.name == "uniform fp16")
    assert fp16.drop is not None and fp16.step_ms is not None
    assert fp16.barred and "not to be chosen: fp16 in blocks.0.ffn, where |activations| are above" in str(fp16.reason)
    assert not any(m.barred for m in result.baselines if m.name == "uniform fp32")
    assert [(r.unit, r.format) for r in result.removed if "|activations|" in r.reason] == [
        ("blocks.0.ffn", Format.FP16)
    ]
    proposed = [row for row in table(out) if row["trial"].isdigit() and row["state"] == "COMPLETE"]
    asked = [row for row in proposed if "not to be chosen" not in row["reason"]]
    assert {row["blocks.0.ffn"] for row in asked} == {"fp32"} and "fp16" in {row["blocks.1.ffn"] for row in asked}
    assert len(proposed) - len(asked) <= 1  # the recommended plan, which is asked for and not chosen
    assert all(m.assignment["blocks.0.ffn"] is not Format.FP16 for m in result.front)
    again = search(work, budget=300, trials=14, out=out, device="t4", resume=True)
    assert all(m.assignment["blocks.0.ffn"] is not Format.FP16 for m in again.front)


def stopped(request: Request) -> Measurement:
    return Measurement(name=request.name, assignment=request.plan.assignment, reason="stopped after its first step")


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
    with pytest.raises(StudyError, match=r"made with another device \(sample-cpu then, other-cpu now\); .*--force"):
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


# what a search teaches


def test_a_finished_search_teaches_the_recommender_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    search(workload(), budget=300, trials=1, out=tmp_path / "first", learn=False)
    assert not user_table().exists()
    news = list[Progress]()
    result = search(workload(), budget=300, trials=1, out=tmp_path / "second", progress=news.append)
    rows = list(csv.DictReader(user_table().read_text().splitlines()))
    # two blocks of two units and the head: those the tree is asked about
    assert all(float(row["log2_outlier"]) > 0 for row in rows)  # weights were here to be looked at
    assert len(rows) == 5 and f"5 units added to {user_table()}" in news[-2].message
    assert {row["role"] for row in rows} == {"attention", "ffn", "lm_head"}
    assert {row["origin"] for row in rows} == {"search"} and {row["group"] for row in rows} == {""}
    best = result.reference if result.chosen is None else result.front[result.chosen]
    low = [f is not Format.FP32 for n, f in best.assignment.items() if "embed" not in n]
    assert sorted(row["label"] != "fp32" for row in rows) == sorted(low)
    assert all(float(row["drop_bf16"]) > 0 and row["drop_fp8"] == "" for row in rows)
    text = user_table().read_text()
    assert "tiny" not in text and "GPT2" not in text  # shapes and figures only
    assert current_tree().rows == shipped_tree().rows + 5
