"""Plans side by side: figures, targets, training over seeds, devices elsewhere, runs read back, and bad input."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from scipy import stats
from test_matrix import case_of

from autoprec import Plan, Workload
from autoprec.cli import compare as command
from autoprec.cli.main import main
from autoprec.comparison import BY_NAME, Candidate, Recorded, compare_plans, plan_by_name, recorded_plans
from autoprec.comparison.figures import as_target, saved, share_of
from autoprec.comparison.trained import trained_figures
from autoprec.errors import PlanError, UsageError
from autoprec.files import as_json, from_json, write_json
from autoprec.probe.units import probe_units
from autoprec.records import (
    Figure,
    Mode,
    Origin,
    PlanComparison,
    TargetName,
    TargetOutcome,
    TrainedArm,
    TrainingConfirmation,
    TrainingCurve,
    TrainingVerdict,
)
from autoprec.report.compared import print_comparison
from autoprec.study.away import absent_device, forecast_of
from autoprec.verification import audited_step

#: a classifier of four answers that sees its label in the first token, so that training teaches it something
OWN = """
import torch
from torch import nn

import autoprec

class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return self.head(hidden[:, 0])

def make(width=16, mode="train"):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = torch.randint(0, 32, (4, 8, 6))
    batches = [{"input_ids": i, "labels": i[:, 0] % 4} for i in ids]
    return autoprec.Workload(Model(width), batches, mode=mode, task="classification")

def other():
    return make(32)
"""


def own(**changes: Any) -> Workload:
    space: dict[str, Any] = {}
    exec(OWN, space)
    made = space["make"](**changes)
    assert isinstance(made, Workload)
    return made


def named(workload: Workload, *names: str) -> list[Candidate]:
    return [
        Candidate(name=name, source="by name", plan=plan_by_name(name, workload.model, mode=workload.mode))
        for name in names
    ]


@pytest.fixture(scope="module")
def found() -> PlanComparison:
    workload = own()
    mixed = Plan.uniform(workload.model, "bf16").replace({"head": "fp32"})
    candidates = [*named(workload, "fp32", "bf16", "fp8", "tf32"), Candidate(name="mine", source="x.json", plan=mixed)]
    return compare_plans(workload, candidates, train_steps=3, seeds=3, learning_rate=0.05, pairs=6)


# figures


def test_every_figure_has_its_interval_and_origin(found: PlanComparison) -> None:
    assert found.reference.name == "fp32" and [plan.name for plan in found.plans] == ["bf16", "fp8", "tf32", "mine"]
    assert found.metric == "accuracy" and found.batches == 4
    for row in (found.reference, found.plans[0], found.plans[3]):
        assert row.speedup and row.speedup.ci95 and row.speedup.origin is Origin.MEASURED and row.speedup.unit == "x"
        assert row.peak_bytes and row.peak_bytes.origin is Origin.PREDICTED
        assert row.task_metric and row.task_metric.ci95 and row.task_metric.unit == "%"
        assert row.low_share and row.low_share.ci95 and row.low_share.origin is Origin.MEASURED
        assert row.reasons == () or "varies" in row.reasons[0]
    bf16 = found.plans[0]
    assert bf16.drop and bf16.drop.ci95 and bf16.drop.ci95[0] <= bf16.drop.value <= bf16.drop.ci95[1]
    assert bf16.measurement and bf16.measurement.drop_percent == bf16.drop.value > 0
    assert bf16.memory_saved and bf16.memory_saved.origin is Origin.PREDICTED
    assert found.reference.drop and found.reference.drop.value == 0.0


def test_the_share_is_of_what_ran(found: PlanComparison) -> None:
    shares = [row.low_share.value if row.low_share else None for row in (found.reference, *found.plans)]
    assert shares[0] == 0.0 and shares[1] == 100.0 and shares[2] is None
    assert shares[4] is not None and 0.0 < shares[4] < 100.0


def test_what_cannot_run_says_why_and_stops_nobody(found: PlanComparison) -> None:
    fp8, tf32 = found.plans[1], found.plans[2]
    assert fp8.measurement is None and "--emulate" in fp8.reasons[0]
    assert tf32.measurement is None and "NVIDIA GPUs since Ampere" in tf32.reasons[0]
    assert {target.outcome for target in fp8.targets} == {TargetOutcome.UNKNOWN}
    assert fp8.trained is None


def test_a_plan_that_overflows_has_no_figures_and_the_others_have() -> None:
    workload = own()
    with torch.no_grad():
        for parameter in (workload.model.up.weight, workload.model.down.weight):  # type: ignore[union-attr]
            parameter.mul_(3e3)  # type: ignore[operator]
    fp16, bf16 = compare_plans(workload, named(workload, "fp16", "bf16"), pairs=6).plans
    assert fp16.measurement and "not finite on batch 0" in fp16.reasons[0]
    assert (fp16.drop, fp16.task_metric, fp16.low_share, fp16.speedup) == (None, None, None, None)
    assert bf16.drop and bf16.speedup and bf16.low_share


def test_plans_are_trained_over_seeds(found: PlanComparison) -> None:
    assert found.training is not None and found.training.metric == "accuracy"
    assert [arm.name for arm in found.training.arms] == ["bf16", "mine"]
    for row in (found.reference, found.plans[0], found.plans[3]):
        trained = row.trained
        assert trained and trained.runs == 3 and trained.failed == 0 and trained.loss and trained.metric
        assert trained.failed_share.ci95 and trained.failed_share.ci95[1] > 50
    finals = [curve.final_metric for curve in found.training.curves if curve.name == "fp32"]
    reference = found.reference.trained
    assert reference and reference.metric and all(final is not None for final in finals)
    assert reference.metric.value == pytest.approx(100 * sum(final or 0.0 for final in finals) / 3)
    assert reference.loss_change is None and found.plans[0].trained and found.plans[0].trained.loss_change


def test_training_figures_count_failures_and_pair_by_seed() -> None:
    def curve(name: str, seed: int, loss: float | None, metric: float | None) -> TrainingCurve:
        return TrainingCurve(
            name=name, seed=seed, losses=(), final_loss=loss, skipped_steps=0, reason=None, final_metric=metric
        )

    curves = [curve("fp32", seed, 1.0 + seed, 0.8 + 0.01 * seed) for seed in range(4)]
    curves += [curve("fp16", seed, 1.1 + seed, 0.79 + 0.01 * seed) for seed in range(3)] + [
        curve("fp16", 3, None, None)
    ]
    arm = TrainedArm(name="fp16", gap=None, gap_ci95=None, verdict=TrainingVerdict.WORSE, reason="1 of 4 runs")
    confirmed = TrainingConfirmation(
        steps=5,
        seeds=4,
        learning_rate=0.1,
        reference_loss=2.5,
        seed_deviation=1.0,
        margin=1.0,
        arms=(arm,),
        curves=tuple(curves),
        metric="accuracy",
    )
    got = trained_figures(confirmed, "fp16", Origin.MEASURED)
    assert (got.runs, got.failed, got.verdict) == (4, 1, TrainingVerdict.WORSE)
    # Clopper and Pearson by the beta distribution, 1 of 4
    ends = (100 * stats.beta.ppf(0.025, 1, 4), 100 * stats.beta.ppf(0.975, 2, 3))
    assert got.failed_share.ci95 == pytest.approx(ends)
    assert got.loss and got.loss.value == pytest.approx(2.1)  # seeds 0 to 2 only
    assert got.loss_change and got.loss_change.value == pytest.approx(0.1) and got.loss_change.ci95
    assert got.loss_change.ci95[1] - got.loss_change.ci95[0] < 1e-9  # paired: equal gaps have no spread
    assert got.metric_change and got.metric_change.value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("value", "ci95", "larger", "outcome"),
    [
        (2.5, (2.1, 2.9), True, TargetOutcome.MET),
        (2.5, (1.9, 2.9), True, TargetOutcome.OPEN),
        (1.5, (1.4, 2.0), True, TargetOutcome.NOT_MET),
        (2.5, None, True, TargetOutcome.MET),
        (1.5, (1.4, 1.9), False, TargetOutcome.MET),
        (2.5, (1.9, 2.9), False, TargetOutcome.OPEN),
    ],
)
def test_targets(value: float, ci95: tuple[float, float] | None, larger: bool, outcome: TargetOutcome) -> None:
    figure = Figure(value=value, ci95=ci95, unit="x", origin=Origin.MEASURED)
    assert as_target(figure, TargetName.SPEEDUP, 2.0, "x", larger).outcome is outcome
    assert as_target(None, TargetName.SPEEDUP, 2.0, "x", larger).outcome is TargetOutcome.UNKNOWN


def test_memory_saved_is_of_fp32s_and_may_be_negative() -> None:
    def peak(value: float, origin: Origin) -> Figure:
        return Figure(value=value, ci95=None, unit="bytes", origin=origin)

    predicted = saved(peak(70, Origin.PREDICTED), peak(100, Origin.PREDICTED))
    assert predicted.value == pytest.approx(30) and predicted.ci95 == pytest.approx((26.5, 33.5))
    measured = saved(peak(120, Origin.MEASURED), peak(100, Origin.MEASURED))
    assert measured.value == pytest.approx(-20) and measured.ci95 is None


def test_an_audit_times_products() -> None:
    workload = own()
    plan = Plan.uniform(workload.model, "bf16").replace({"head": "fp32"})
    report = audited_step(workload, plan, workload.batches[0])
    assert all(row.ms > 0 for row in report.rows if row.executed in ("bf16", "fp32") and "mm" in row.operators[0])
    share = share_of([report])
    low = sum(row.ms for row in report.rows if row.executed == "bf16")
    assert share and share.value == pytest.approx(100 * low / sum(row.ms for row in report.rows if row.ms))


# elsewhere


def test_a_device_that_is_not_here_is_emulated_and_predicted() -> None:
    torch.set_num_threads(1)
    case = case_of("llama")
    workload = Workload(case.model, [case.batch, case.batch], "train")
    known = absent_device(torch.device("cpu"), "h100-sxm")
    assert known is not None
    forecast = forecast_of(workload, probe_units(workload.model), known)
    got = compare_plans(workload, named(workload, "bf16", "fp8", "tf32"), forecast=forecast)
    assert got.device == "h100-sxm-80gb" and "is not here" in got.notes[0]
    bf16, fp8, tf32 = got.plans
    for row in (bf16, fp8, tf32):
        assert row.speedup and row.speedup.origin is Origin.PREDICTED and row.drop
        assert row.drop.origin is Origin.EMULATED and row.low_share and row.low_share.origin is Origin.PREDICTED
        assert row.low_share.value == 100.0 and row.measurement and row.measurement.drop
    assert got.reference.low_share and got.reference.low_share.value == 0.0
    assert got.metric == "perplexity" or got.metric is None
    mixed = plan_by_name("bf16", workload.model, mode=Mode.TRAIN).replace({"lm_head": "fp32"})
    share = forecast.of(mixed).low_share
    assert 0 < share.low < share.value < share.high < 1


# records and pages


def test_the_record_comes_back_from_json(found: PlanComparison) -> None:
    text = json.dumps(as_json(found), allow_nan=False)
    assert from_json(PlanComparison, json.loads(text), what="comparison") == found


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_page_fits_and_says_it(found: PlanComparison, width: int) -> None:
    file = io.StringIO()
    print_comparison(Console(file=file, width=width), found)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for word in ("memory saved", "accuracy, less fp32's", "low-precision share", "runs that failed", "0 of 3"):
        assert word in text
    assert "speedup over 2 x" in text and "drop under 0.5 %" in text and "fp8: it was not run" in text


# runs read back


def run_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    write_json(path / "result.json", as_json(dataclasses.replace(samples.search_result(), **changes)))
    samples.plan().save(path / "plan.json")
    return path


def test_runs_are_read_and_not_measured_again(tmp_path: Path) -> None:
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", chosen=0)
    document = run("compare", str(one), str(two), "bf16", "--recorded", "--json")
    assert document.exit_code == 0, document.output
    got = from_json(PlanComparison, json.loads(document.stdout), what="comparison")
    assert [plan.name for plan in got.plans] == ["one", "two", "bf16"]
    assert [plan.speedup.value if plan.speedup else None for plan in got.plans] == [1.45, 1.62, 1.62]
    assert got.plans[0].drop and got.plans[0].drop.origin is Origin.EMULATED
    assert got.plans[0].low_share is None and "not measured again" in got.notes[0]
    assert got.plans[0].memory_saved and got.plans[0].memory_saved.value == 0.0


def test_runs_that_have_nothing_to_say_about_each_other_are_refused(tmp_path: Path) -> None:
    first = samples.search_result()
    for changed in (
        dataclasses.replace(first, model_id="org/other"),
        dataclasses.replace(first, mode=Mode.INFER),
    ):
        with pytest.raises(PlanError, match="searches of different"):
            recorded_plans([Recorded(name="a", result=first), Recorded(name="b", result=changed)])
    with pytest.raises(PlanError, match="chose no plan"):
        recorded_plans([Recorded(name="a", result=dataclasses.replace(first, chosen=None))])
    with pytest.raises(PlanError, match="measured no plan fp8; it has bf16, fp16"):
        recorded_plans([Recorded(name="a", result=first), Recorded(name="fp8", result=None)])
    with pytest.raises(UsageError, match="leave out --recorded"):
        recorded_plans([Recorded(name="bf16", result=None)])


# command


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, list(arguments))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    model = own().model
    Plan.uniform(model, "bf16").replace({"head": "fp32"}).save("plan.json")
    Plan.uniform(own(width=32).model, "bf16").save("other.json")
    Plan.uniform(model, "bf16", mode="infer").save("infer.json")
    Path("broken.json").write_text("{")
    return tmp_path


def test_compare_prints_a_page_or_one_document(files: Path) -> None:
    page = run("compare", "plan.json", "bf16", "own.py:make", "--pairs", "6")
    assert page.exit_code == 0, page.output
    assert "low-precision share" in page.stdout and "Measuring" not in page.stdout
    Path("run").mkdir()
    Path("plan.json").rename("run/plan.json")
    document = run("compare", "run", "fp16", "own.py:make", "--pairs", "6", "--json", "--mode", "infer")
    assert document.exit_code == 0, document.output
    got = from_json(PlanComparison, json.loads(document.stdout), what="comparison")
    assert [plan.name for plan in got.plans] == ["run", "fp16"] and got.mode is Mode.INFER
    assert any("run was made for mode train, and ran in infer" in note for note in got.notes)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bf16", "own.py:make"], 2, "two plans or more, and got 1"),
        (["bf16", "fp61"], 2, "'fp61' was taken as the model; closest: fp16"),
        (["own.py:make"], 2, "got 0"),
        (["bf17", "bf16", "own.py:make"], 2, "'bf17' is no plan file, no run folder and no plan by name"),
        (["bf16", "bf16", "own.py:make"], 2, "'bf16' stands twice"),
        (["bf16", "fp16"], 2, "plans by name say no model"),
        (["plan.json", "other.json", "own.py:make"], 1, "different models"),
        (["plan.json", "bf16", "own.py:other"], 1, "is another model"),
        (["plan.json", "infer.json", "own.py:make"], 2, "--mode train or --mode infer"),
        (["infer.json", "bf16", "own.py:make", "--train-steps", "2"], 2, "these are for inference"),
        (["broken.json", "bf16", "own.py:make"], 1, "damaged or cut off"),
        (["nothing.json", "bf16", "own.py:make"], 1, "nothing.json does not exist"),
        (["bf16", "fp16", "own.py:make", "--seeds", "3"], 2, "give --train-steps too"),
        (["bf16", "fp16", "own.py:make", "--device", "h1000"], 1, "h100"),
        (["plan.json", "bf16", "--recorded"], 2, "'plan.json' is a file"),
        (["bf16", "fp16", "--recorded", "--train-steps", "2"], 2, "nothing to train"),
        (["bf16", "fp16", "own.py:make", "--recorded"], 2, "loads no model"),
    ],
)
def test_bad_input_is_told(files: Path, arguments: list[str], code: int, words: str) -> None:
    result = run("compare", *arguments)
    text = " ".join(result.stderr.split())
    assert result.exit_code == code, result.output
    assert words in text and result.stdout == "" and "Traceback" not in text


def test_the_names_of_the_command_are_those_of_the_library() -> None:
    assert command.NAMES == BY_NAME
    with pytest.raises(PlanError, match="closest: bf16"):
        plan_by_name("bf61", own().model, mode=Mode.TRAIN)
