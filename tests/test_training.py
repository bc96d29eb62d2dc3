"""Training confirmed: harm is found, no harm is not called harm, and other seeds of FP32 itself are no harm."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_storage import llama
from test_trainer import data_of, model_of

from autoprec import Plan, Workload, applied
from autoprec.cli.main import main
from autoprec.errors import DataError, UsageError
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.records import TrainingConfirmation, TrainingVerdict, Verification
from autoprec.runtime.tripwire import Tripwire
from autoprec.training import Ends, confirm_training, judged, margins, training_pace
from autoprec.verification import verify


def workload(batches: int = 8, **changes: float) -> Workload:
    torch.set_num_threads(1)
    rows = data_of(2 * batches)
    made = [{k: torch.stack([a[k], b[k]]) for k in a} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return Workload(model_of(**changes), made, "train")


@pytest.fixture(scope="module")
def found() -> TrainingConfirmation:
    given = workload()
    model: Any = given.model
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1e9)
        model.transformer.h[1].mlp.c_fc.weight.mul_(1e-3)
    before = [p.clone() for p in model.parameters()]
    plans = {choice: Plan.uniform(given.model, choice) for choice in ("fp32", "bf16", "fp16")}
    confirmed = confirm_training(given, {f"as {k}": v for k, v in plans.items()}, steps=6, seeds=3, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, given.model.parameters(), strict=True))
    return confirmed


def test_every_run_of_a_seed_starts_alike(found: TrainingConfirmation) -> None:
    by = {(curve.name, curve.seed): curve for curve in found.curves}
    assert len(by) == 12
    for seed in range(3):
        assert by["as fp32", seed].losses == by["fp32", seed].losses and len(by["fp32", seed].losses) == 6
        assert by["as bf16", seed].losses[0] == pytest.approx(by["fp32", seed].losses[0], rel=0.05)
    assert by["fp32", 0].losses != by["fp32", 1].losses
    assert found.seed_deviation == pytest.approx(stdev(by["fp32", seed].final_loss or 0.0 for seed in range(3)))
    assert found.notes == ("6 batches trained on, 2 held out",)


def test_the_same_is_not_worse_and_an_overflow_is(found: TrainingConfirmation) -> None:
    arms = {arm.name: arm for arm in found.arms}
    assert arms["as fp32"].verdict is TrainingVerdict.NOT_WORSE and arms["as fp32"].gap == 0.0
    assert arms["as fp16"].verdict is TrainingVerdict.WORSE and "3 of 3 runs" in arms["as fp16"].reason
    failed = next(curve for curve in found.curves if curve.name == "as fp16")
    assert failed.reason == "the loss is nan at step 1" and failed.losses == ()


def test_the_record_comes_back_from_json(found: TrainingConfirmation) -> None:
    text = json.dumps(as_json(found), allow_nan=False)
    assert from_json(TrainingConfirmation, json.loads(text), what="confirmation") == found


def test_a_gap_is_judged_by_the_seeds_own_noise() -> None:
    losses = [2.0, 2.1, 1.9, 2.05]
    reference = Ends(losses, losses)

    def verdict(held_out: list[float], trained: list[float] = losses) -> TrainingVerdict:
        return judged("x", Ends(held_out, trained), reference).verdict

    assert verdict([x + 0.001 for x in losses]) is TrainingVerdict.NOT_WORSE
    assert verdict([x + 0.3 for x in losses]) is TrainingVerdict.WORSE
    assert verdict([2.4, 1.6, 2.3, 1.9]) is TrainingVerdict.UNDECIDED
    assert judged("x", reference, reference).gap_ci95 == (0.0, 0.0)
    assert margins(reference) == (stdev(losses), stdev(losses))
    assert margins(Ends([2.0, 2.0 + 1e-9], [1e-4, 2e-4])) == pytest.approx((0.005, 0.005))


def test_what_learns_less_is_worse_however_its_held_out_loss_stands() -> None:
    """FP32 overfits, so a plan that loses its updates has the lower held-out loss."""
    reference = Ends([2.0, 2.1, 1.9, 2.05], [0.1, 0.12, 0.11, 0.1])
    arm = judged("x", Ends([1.8, 1.9, 1.7, 1.8], [0.5, 0.52, 0.49, 0.5]), reference)
    assert arm.verdict is TrainingVerdict.WORSE and arm.reason.startswith("a training loss of ")
    assert arm.gap is not None and arm.gap < 0 and arm.train_gap == pytest.approx(0.395)
    unsure = judged("x", Ends([1.8, 1.9, 1.7, 1.8], [0.5, 0.01, 0.3, 0.02]), reference)
    assert unsure.verdict is TrainingVerdict.UNDECIDED and "training loss" in unsure.reason


def test_other_seeds_of_fp32_are_hardly_ever_called_worse() -> None:
    """At most 2.5 % by construction: 1.25 % of either loss's 97.5 % intervals lie above zero. 8 seeds."""
    random.seed(0)

    def ends() -> Ends:
        return Ends(*([random.gauss(2.0, 0.01) for _ in range(8)] for _ in range(2)))

    assert sum(judged("x", ends(), ends()).verdict is TrainingVerdict.WORSE for _ in range(400)) <= 20


def test_what_overflows_fp16_trains_once_the_tripwire_has_widened_it() -> None:
    """The same function as before, but products of the gate pass 65,504."""
    torch.manual_seed(0)
    model: Any = llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0**24)
        model.model.layers[1].mlp.down_proj.weight.mul_(2.0**-24)
    ids = torch.randint(0, 64, (8, 2, 12))
    given = Workload(model, [{"input_ids": row, "labels": row} for row in ids], "train")
    plan = Plan.uniform(model, "fp16")
    with applied(model, plan) as handle:
        wire = Tripwire(handle, every=1)
        for index in range(2):
            with wire.step(index):
                (65536 * model(input_ids=ids[0], labels=ids[0]).loss).backward()  # as a gradient scaler would
            model.zero_grad()
        widened = handle.plan
    assert [unit for unit, f in widened.assignment.items() if f is Format.BF16] == ["blocks.1.ffn"]
    found = confirm_training(given, {"fp16": plan, "widened": widened}, steps=4, seeds=2)
    assert [arm.verdict is TrainingVerdict.WORSE for arm in found.arms] == [True, False]


def test_what_it_takes() -> None:
    given = workload(batches=1)
    with pytest.raises(DataError, match="2 batches or more"):
        confirm_training(given, {"x": Plan.uniform(given.model, "bf16")})
    with pytest.raises(UsageError, match="2 seeds or more"):
        confirm_training(workload(2), {}, seeds=1)


def test_verify_trains_the_plan_beside_blanket_bf16() -> None:
    given = workload()
    plan = Plan.uniform(given.model, "bf16")
    plan = plan.replace({plan.units[-1].name: "fp32"})
    found = verify(given, plan, train_steps=4, seeds=2)
    assert found.training is not None
    assert [arm.name for arm in found.training.arms] == ["the plan", "uniform bf16"]
    assert found.holds
    with pytest.raises(UsageError, match="made for inference"):
        verify(given.with_mode("infer"), plan, train_steps=4)


OWN = """
import sys
sys.path.insert(0, {tests!r})
from test_training import workload

def make():
    return workload()
"""


def test_the_command_prints_the_page_and_keeps_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN.format(tests=str(Path(__file__).parent)))
    Plan.uniform(workload().model, "bf16").save("plan.json")
    arguments = ["verify", "plan.json", "own.py:make", "--train-steps", "3", "--seeds", "2"]
    page = CliRunner(env={"COLUMNS": "100"}).invoke(main, [*arguments, "--curves", "curves.json"])
    assert page.exit_code == 0, page.output
    words = " ".join(page.stdout.split())
    assert "Trained beside FP32" in words and "over seeds; the margin is" in words
    assert max(map(len, page.stdout.splitlines())) <= 100
    kept = from_json(TrainingConfirmation, json.loads(Path("curves.json").read_text()), what="curves")
    assert [len(curve.losses) for curve in kept.curves] == [3] * 4
    document = CliRunner().invoke(main, [*arguments, "--json"])
    assert from_json(Verification, json.loads(document.stdout), what="verification").training is not None


def test_the_pace_of_training_is_that_of_its_steps_and_leaves_the_model_alone() -> None:
    given = workload(8)
    before = [p.detach().clone() for p in given.model.parameters()]
    pace = training_pace(given, Plan.uniform(given.model, "bf16"))
    assert pace.step_seconds > 0 and pace.ends_seconds > 0
    assert pace.seconds(10, 3) == pytest.approx(30 * pace.step_seconds + 3 * pace.ends_seconds)
    assert all(torch.equal(a, b) for a, b in zip(before, given.model.parameters(), strict=True))
    assert all(p.grad is None for p in given.model.parameters())
