"""Plans on the real models: equal to autocast, and FP8's loss where an independent measurement found it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_real_models import load, part, smollm2
from torch import Tensor

from autoprec import Plan, Workload, applied, probe_units
from autoprec.doctor.hosts import host_profile
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.records import Role, Support, VerdictDecision
from autoprec.study.run import search

#: the eight documents of the recorded FP8 figures, by their place among all of the corpus
BROWN_WINDOWS = (0, 62, 124, 186, 248, 310, 372, 434)


def brown_windows(tokenizer: Any) -> list[dict[str, Tensor]]:
    """The first 512 tokens of each document (the file holds the even places)."""
    rows = [json.loads(line) for line in (part("brown") / "brown.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for place in BROWN_WINDOWS:
        ids = tokenizer(rows[place // 2]["text"], verbose=False, return_tensors="pt")["input_ids"][:, :512]
        found.append({"input_ids": ids, "labels": ids})
    return found


def austen_windows(tokenizer: Any, rows: int, length: int, count: int) -> list[dict[str, Tensor]]:
    text = (part("austen") / "sense_and_sensibility.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text[:400_000], verbose=False)["input_ids"])[: rows * length * count]
    return [{"input_ids": chunk, "labels": chunk} for chunk in ids.view(count, rows, length)]


@pytest.mark.real
def test_uniform_bf16_is_autocast_on_smollm2() -> None:
    model, tokenizer = smollm2()
    batch = austen_windows(tokenizer, 1, 64, 1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = model(**batch)
    expected.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with applied(model, Plan.uniform(model, "bf16")):
        found = model(**batch)
        found.loss.backward()
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.real
def test_uniform_bf16_is_autocast_on_minilm() -> None:
    model, tokenizer = load("minilm", "AutoModel")
    batch = tokenizer(
        ["Precision is a choice.", "A second, somewhat longer sentence."], padding=True, return_tensors="pt"
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = model(**batch).last_hidden_state
    with torch.no_grad(), applied(model, Plan.uniform(model, "bf16")):
        assert torch.equal(model(**batch).last_hidden_state, expected)


@pytest.mark.real
@pytest.mark.parametrize(
    ("head", "body", "recorded", "error"),
    # fake quantisation of weights and inputs, measured apart from this project: change in nats, standard error
    [(Format.FP32, Format.FP8, 0.0192, 0.0046), (Format.FP8, Format.FP32, 0.0289, 0.0042)],
    ids=["all-but-head", "head-alone"],
)
def test_fp8_costs_smollm2_what_was_recorded(head: Format, body: Format, recorded: float, error: float) -> None:
    model, tokenizer = smollm2()
    profile = probe_units(model)
    formats = {u.name: head if u.role is Role.LM_HEAD else body for u in profile.units if u.role is not Role.EMBEDDING}
    plan = Plan.assign(profile, formats, ambient="fp32", mode="infer")
    workload = Workload(model, brown_windows(tokenizer), mode="infer")
    found = evaluate(Request(workload=workload, plan=plan, emulate=True, min_pairs=1, max_pairs=1))
    assert found.loss_rise is not None and found.drop is not None
    # the same windows and rounding; only our results are summed in another order. Three of its standard errors
    assert found.loss_rise == pytest.approx(recorded, abs=3 * error)
    assert 0.2 * recorded < found.drop < 5 * recorded


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_search_keeps_its_budget_and_nothing_measured_beats_the_choice(name: str, tmp_path: Any) -> None:
    if name == "smollm2":
        model, tokenizer = smollm2()
        workload = Workload(model, austen_windows(tokenizer, 2, 128, 6), mode="infer", model_id=name)
    else:
        model, tokenizer = load("minilm", "AutoModel")
        rows = austen_windows(tokenizer, 8, 64, 6)
        workload = Workload(model, [{"input_ids": r["input_ids"]} for r in rows], mode="infer", model_id=name)
    result = search(workload, budget="4m", out=tmp_path / "run")
    longest = 60.0  # one measurement more than the budget, on a machine that others use too
    assert result.seconds <= 240 + longest
    measured = [*result.front, *result.baselines]
    if host_profile().supports(Format.BF16) is not Support.NATIVE:  # with AVX2 alone nothing is faster than FP32
        assert result.chosen is None and result.verdict.decision is VerdictDecision.DO_NOTHING
        assert not (tmp_path / "run" / "plan.json").exists()
        reference = next(plan.step_ms for plan in result.baselines if plan.name == "uniform fp32")
        assert reference is not None  # 2 %: what counts as the same time
        assert all(other.step_ms is None or other.step_ms > 0.98 * reference for other in measured)
        return
    assert result.chosen is not None, result.verdict.text
    chosen = result.front[result.chosen]
    assert chosen.drop is not None and chosen.step_ms is not None
    for other in measured:
        if other.drop is not None and other.step_ms is not None:
            assert not (other.drop < chosen.drop and other.step_ms < chosen.step_ms), other.name
    plan = Plan.load(tmp_path / "run" / "plan.json")
    again = evaluate(Request(workload=workload, plan=plan, min_pairs=1, max_pairs=1))
    # the same weights, batches and kernels
    assert again.drop == pytest.approx(chosen.drop, rel=1e-6)
