"""A plan measured again: what holds is said to hold, and a figure or an operator that is not as planned is named."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from test_matrix import case_of, plan_of

import autoprec.verification
from autoprec import Plan, Workload
from autoprec.cli.main import main
from autoprec.errors import DeviceError, PlanError
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.plan import Evidence
from autoprec.records import CheckOutcome, Figure, KernelRow, Measurement, Origin, Verification
from autoprec.report.audits import print_audit, print_verification
from autoprec.runtime.scope import Scope
from autoprec.verification import verify

#: a tied head whose weight is used behind its module's back, so that no scope can act on it
BYPASSED = """
import torch
from torch import nn
from torch.nn import functional as F

import autoprec

class Model(nn.Module):
    def __init__(self, honest):
        super().__init__()
        self.honest = honest
        self.embed = nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.down(F.gelu(self.up(hidden)))
        return self.lm_head(hidden) if self.honest else hidden @ self.lm_head.weight.t()

def make(honest):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = torch.randint(0, 32, (3, 4, 12))
    return autoprec.Workload(Model(honest), list(ids), mode="infer")

def honest():
    return make(True)

def bypassed():
    return make(False)
"""


def workload(name: str = "llama", mode: str = "train") -> Workload:
    torch.set_num_threads(1)
    case = case_of(name)
    if isinstance(case.batch, torch.Tensor):
        return Workload(case.model, [(case.batch + 7 * i) % 90 for i in range(3)], mode)
    return Workload(case.model, [{k: (v + 7 * i) % 90 for k, v in case.batch.items()} for i in range(3)], mode)


def figure(value: float, low: float, high: float, unit: str = "nats") -> Figure:
    return Figure(value=value, ci95=(low, high), unit=unit, origin=Origin.MEASURED)


@pytest.fixture(scope="module")
def mixed() -> tuple[Workload, Plan, Verification]:
    given = workload()
    plan = plan_of(given.model, "mixed")
    return given, plan, verify(given, plan, emulate=True)


def test_a_sound_plan_holds(mixed: tuple[Workload, Plan, Verification]) -> None:
    given, plan, found = mixed
    assert found.holds and found.problems == () and found.audit.disagreements == ()
    assert found.measurement.drop is not None and found.measurement.drop > 0
    assert {row.unit for row in found.audit.rows} >= {u.name for u in plan.units}
    assert any("without measured figures" in warning for warning in found.warnings)
    assert not any(isinstance(module, Scope) for module in given.model.modules())
    assert given.model.training is False  # as it came


def test_the_record_comes_back_from_json(mixed: tuple[Workload, Plan, Verification]) -> None:
    found = mixed[2]
    text = json.dumps(as_json(found), allow_nan=False)
    assert from_json(Verification, json.loads(text), what="verification") == found


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ((1.0, 0.9, 1.1), CheckOutcome.SAME),
        ((0.1, 0.05, 0.15), CheckOutcome.WORSE),
        ((9.0, 8.0, 10.0), CheckOutcome.BETTER),
    ],
)
def test_the_drop_is_held_against_the_plans(
    mixed: tuple[Workload, Plan, Verification], said: tuple[float, float, float], outcome: CheckOutcome
) -> None:
    given, plan, first = mixed
    here = first.measurement.drop
    assert here is not None
    known = Evidence(
        drop=figure(here * said[0], here * said[1], here * said[2]), weights_digest="another", versions={"torch": "1.0"}
    )
    found = verify(given, plan.with_evidence(known), emulate=True)
    (check,) = found.checks
    assert (check.figure, check.outcome) == ("drop", outcome)
    assert found.holds is (outcome is not CheckOutcome.WORSE)
    assert any("drop is worse than the plan says" in p for p in found.problems) is (outcome is CheckOutcome.WORSE)
    assert any("other weights" in w for w in found.warnings)
    assert any("measured with torch 1.0" in w for w in found.warnings)


def test_speed_of_another_device_is_not_compared() -> None:
    given = workload("bare_gpt", "infer")
    plan = Plan.uniform(given.model, "bf16")
    known = Evidence(
        speedup=figure(9.0, 8.9, 9.1, "times FP32"),
        peak_bytes=Figure(value=1.0, ci95=None, unit="bytes", origin=Origin.MEASURED),
    )
    elsewhere = dataclasses.replace(plan.device, name="h100-sxm-80gb", kind="cuda", origin=Origin.DATASHEET)
    moved = dataclasses.replace(plan, device=elsewhere).with_evidence(known)
    found = verify(given, moved)
    assert {c.figure: c.outcome for c in found.checks} == {
        "speedup": CheckOutcome.NOT_COMPARED,
        "peak_bytes": CheckOutcome.NOT_COMPARED,
    }
    assert found.holds
    assert any("was made for h100-sxm-80gb (datasheet)" in w for w in found.warnings)
    here = verify(given, plan.with_evidence(known))  # made for any device: nine times FP32 is promised here too
    assert here.checks[0].outcome is CheckOutcome.WORSE and not here.holds


def test_fp8_is_refused_unless_emulated() -> None:
    given = workload("bare_gpt", "infer")
    plan = Plan.uniform(given.model, "fp8")
    with pytest.raises(DeviceError, match="emulate"):
        verify(given, plan)
    found = verify(given, plan, emulate=True)
    assert found.holds and found.measurement.speedup is None
    assert found.measurement.origin.drop is Origin.EMULATED


def test_a_plan_that_overflows_does_not_hold() -> None:
    given = workload("bare_gpt", "infer")
    with torch.no_grad():
        for parameter in given.model.parameters():
            parameter.mul_(1e3)
    found = verify(given, Plan.uniform(given.model, "fp16"))
    assert not found.holds
    assert "could not be measured: the output is not finite" in found.problems[0]


def test_a_gradient_over_its_limit_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    given = workload()

    def over(request: Request) -> Measurement:
        return dataclasses.replace(evaluate(request), grad_error=0.2, grad_error_limit=0.1)

    monkeypatch.setattr(autoprec.verification, "evaluate", over)
    found = verify(given, Plan.uniform(given.model, "bf16"))
    assert found.problems == (
        "the gradient's relative squared error is 0.200, over its limit of 0.100 (a tenth of what batches differ by)",
    )


def test_another_model_is_refused() -> None:
    plan = Plan.uniform(case_of("bert").model, "bf16")
    with pytest.raises(PlanError):
        verify(workload(), plan)


# pages


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_page_fits_and_says_it(mixed: tuple[Workload, Plan, Verification], width: int) -> None:
    file = io.StringIO()
    print_verification(Console(file=file, width=width), mixed[2])
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "every unit ran as planned" in words and "the plan holds here" in words and "casts:" in words
    assert {str(f) for f in Format} <= set(words.split())


def test_kernels_are_shown_where_there_are_some(mixed: tuple[Workload, Plan, Verification]) -> None:
    rows = tuple(KernelRow(unit="lm_head", name=f"gemm_bf16_{i}", calls=3, ms=0.5) for i in range(12))
    file = io.StringIO()
    print_audit(Console(file=file, width=100), dataclasses.replace(mixed[2].audit, kernels=rows))
    text = file.getvalue()
    assert "12 by name, 6.00 ms" in text and "gemm_bf16_9" in text and "gemm_bf16_10" not in text


# command


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["verify", *arguments])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(BYPASSED)
    space: dict[str, object] = {}
    exec(BYPASSED, space)
    model = space["Model"](True)  # type: ignore[operator]
    plan = Plan.uniform(model, "bf16", mode="infer").replace({"lm_head": "fp32"})
    plan.save("plan.json")
    return tmp_path


def test_verify_prints_a_page_or_one_document(files: Path) -> None:
    page = run("plan.json", "own.py:honest")
    assert page.exit_code == 0, page.output
    assert "the plan holds here" in page.stdout
    document = run("plan.json", "own.py:honest", "--json")
    assert document.exit_code == 0
    assert from_json(Verification, json.loads(document.stdout), what="verification").holds
    Path("run").mkdir()
    Path("plan.json").rename("run/plan.json")
    assert run("run", "own.py:honest").exit_code == 0


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_fails_where_a_unit_runs_otherwise(files: Path, options: tuple[str, ...]) -> None:
    result = run("plan.json", "own.py:bypassed", *options)
    assert result.exit_code == 1
    assert "lm_head.weight was used in bf16" in result.stderr and "Traceback" not in result.stderr
    if options:
        assert json.loads(result.stdout)["holds"] is False
    else:
        assert "NO" in result.stdout and "does not hold here" in result.stdout


def test_verify_without_a_model_takes_the_plans_own(files: Path) -> None:
    result = run("plan.json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "autoprec verify plan.json MODEL" in result.stderr
    assert run("nothing.json").exit_code == 1
    assert "plan.json" in run(str(files / "..")).stderr
