"""Tests of what a search does with its choice: confirmed on batches not seen before, and trained beside FP32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from searching import Evaluate, assert_as_found, instead, saved, state_of, workload

from autoprec import Plan, Workload, search
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.records import (
    Measurement,
    Progress,
    TrainingConfirmation,
    TrainingVerdict,
)
from autoprec.study.confirming import OutOfTime
from autoprec.training import confirm_training

pytestmark = pytest.mark.usefixtures("short_measurements")

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
    before, said = state_of(work.model), list[Progress]()
    result = search(work, budget=300, trials=2, max_drop="50%", out=tmp_path / "run", progress=said.append)
    assert_as_found(work.model, before)
    assert result.chosen is not None
    runs = [news for news in said if news.message.startswith("training in ")]
    assert [news.message for news in runs[::2]] == [f"training in fp32, seed {n} of 3" for n in (1, 2, 3)]
    left = [news.eta_seconds or 0.0 for news in runs]
    assert len(runs) == 6 and 0 < left[5] < left[0]
    # from the first baseline on, the end that is named is that of the search: training it is the longest part of all
    named = [news for news in said if news.message.startswith(("measuring ", "trial "))]
    assert all(news.eta_seconds and not news.at_most for news in named)  # a number of trials was asked for
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
