"""Measuring a plan again, here: one step audited, then its figures taken and held against those the plan came with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoprec.errors import UsageError
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.batches import Batch
from autoprec.probe.device import device_name
from autoprec.probe.steps import device_of, kept_state, plain_fp32
from autoprec.probe.workload import Workload
from autoprec.quantities import number
from autoprec.records import (
    AuditReport,
    Check,
    CheckOutcome,
    Figure,
    Measurement,
    Mode,
    Origin,
    Role,
    TrainingVerdict,
    Verification,
)
from autoprec.report.figures import figure_text
from autoprec.runtime.attach import applied
from autoprec.runtime.audit import audit
from autoprec.runtime.identity import weights_digest
from autoprec.training import confirm_training

__all__ = ["audited_step", "verify"]

PLAN = "the plan"

#: two times within 2 % count as the same; a peak of memory moves as much with the allocator's blocks
_SAME = 0.02


def verify(
    workload: Workload,
    plan: Plan,
    emulate: bool = False,
    *,
    forecast: Forecast | None = None,
    train_steps: int = 0,
    seeds: int = 8,
    learning_rate: float = 1e-4,
    tell: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Audit one step of a plan on a workload, measure it against FP32, and compare with the plan's own figures.

    A plan holds when every operator ran in the format planned, the plan could be run to its end, its gradient's error
    is within the limit, and none of its figures is worse here by more than the noise of the two. Figures of other
    data, weights or devices differ for good reasons: the plan names its weights and device, and a difference in these
    is a warning.

    Args:
        workload: model and batches, on the device to measure on, in the plan's mode.
        plan: a plan for this model.
        emulate: compute FP8 with its rounding and none of its speed where the device has none.
        train_steps: also train the plan and blanket BF16 beside FP32 for so many steps (`confirm_training`); a plan
            that trains worse does not hold.
        seeds: runs of each in that.
        learning_rate: in that.
        forecast: of a device that is not here, for which the plan is emulated and its times are predicted.
        tell: called with a sentence as each part begins.

    Raises:
        UsageError: training asked of a workload or plan for inference.
        PlanError, DeviceError: as `autoprec.apply`.
        MeasurementError: the reference cannot be run, or its output is not finite.
    """
    if train_steps and Mode.INFER in (workload.mode, plan.mode):
        raise UsageError("training can be confirmed of a plan for training, and this one was made for inference")
    here = device_of(workload.model)
    name = device_name(here) if forecast is None else forecast.device.name
    tell("Auditing one step")
    report = audited_step(workload, plan, workload.batches[0], emulate)
    tell("Measuring the plan beside FP32")
    found = evaluate(Request(workload=workload, plan=plan, emulate=emulate, forecast=forecast))
    checks = _checks(plan, found, here.type, name)
    problems = [*report.disagreements]
    if found.drop is None:
        problems.append(f"the plan could not be measured: {found.reason}")
    if (
        found.grad_error is not None
        and found.grad_error_limit is not None
        and found.grad_error > found.grad_error_limit
    ):
        problems.append(
            f"the gradient's relative squared error is {number(found.grad_error)}, over its limit of "
            f"{number(found.grad_error_limit)} (a tenth of what batches differ by)"
        )
    problems += [
        f"{check.figure} is worse than the plan says: {_text(check.here)}, against {_text(check.said)}"
        for check in checks
        if check.outcome is CheckOutcome.WORSE and check.figure != "step_ms"
    ]
    training = None
    if train_steps and found.drop is not None:
        arms = {PLAN: plan} | ({} if _is_blanket(plan) else {"uniform bf16": Plan.uniform(workload.model, Format.BF16)})
        training = confirm_training(
            workload, arms, steps=train_steps, seeds=seeds, learning_rate=learning_rate, emulate=emulate, tell=tell
        )
        arm = training.arms[0]
        if arm.verdict is TrainingVerdict.WORSE:
            problems.append(f"trained for {train_steps} steps the plan does worse than fp32: {arm.reason}")
    return Verification(
        training=training,
        model_id=workload.model_id,
        device=name,
        mode=workload.mode,
        measurement=found,
        checks=checks,
        audit=report,
        warnings=(*_warnings(workload, plan, report, name), *_missed(checks), *_away(workload, here, forecast)),
        problems=tuple(problems),
        holds=not problems,
    )


def _is_blanket(plan: Plan) -> bool:
    """Say whether a plan is uniform BF16 itself."""
    return plan.ambient is Format.BF16 and all(
        u.format is (Format.FP32 if u.role is Role.EMBEDDING else Format.BF16) for u in plan.units
    )


def audited_step(workload: Workload, plan: Plan, batch: Batch, emulate: bool = False) -> AuditReport:
    """Audit a step of a plan on one batch of a workload; model and random state are left as they were.

    Raises:
        PlanError, DeviceError: as `autoprec.apply`.
    """
    training = workload.mode is Mode.TRAIN
    with kept_state(workload.model, weights=False), plain_fp32(device_of(workload.model).type):
        workload.model.train(training)
        with applied(workload.model, plan, emulate):
            return audit(
                workload.model,
                plan,
                batch,
                run=lambda: workload.forward(batch),
                loss=lambda raw: workload.training_loss(batch, raw),
                backward=training,
            )


def _checks(plan: Plan, found: Measurement, kind: str, name: str) -> tuple[Check, ...]:
    """Compare each figure of the plan with the one here; smaller is better, but for the speedup.

    A step time is compared where the plan's is a prediction for this device: a measured one is another machine's.
    """
    known, elsewhere = plan.evidence, plan.device.name not in ("any", name)
    other = f"the plan's is of {plan.device.name}" if elsewhere else None
    measured = found.origin.peak_bytes is not Origin.PREDICTED
    whole = "it is the whole process's on a CPU" if kind == "cpu" and measured else None
    step = known.step_ms if known.step_ms is not None and known.step_ms.origin is Origin.PREDICTED else None
    asked = (
        ("drop", known.drop, found.drop, found.drop_ci95, found.origin.drop, 0.0, None),
        ("step_ms", step, found.step_ms, found.step_ms_ci95, found.origin.step_ms, _SAME, other),
        ("speedup", known.speedup, found.speedup, found.speedup_ci95, found.origin.step_ms, _SAME, other),
        ("peak_bytes", known.peak_bytes, found.peak_bytes, None, found.origin.peak_bytes, _SAME, other or whole),
    )
    checks = []
    for name, said, value, ci95, origin, slack, reason in asked:
        if said is None:
            continue
        if value is None or origin is None:
            checks.append(_check(name, said, None, CheckOutcome.NOT_COMPARED, found.reason or "it was not measured"))
            continue
        mine = Figure(value=value, ci95=ci95, unit=said.unit, origin=origin)
        outcome = (
            CheckOutcome.NOT_COMPARED if reason else _outcome(said, mine, slack, larger_is_better=name == "speedup")
        )
        checks.append(_check(name, said, mine, outcome, reason))
    return tuple(checks)


def _check(name: str, said: Figure, here: Figure | None, outcome: CheckOutcome, reason: str | None) -> Check:
    return Check(figure=name, said=said, here=here, outcome=outcome, reason=reason)


def _outcome(said: Figure, here: Figure, slack: float, *, larger_is_better: bool) -> CheckOutcome:
    """Say how two figures stand: the same where their intervals, widened by the slack, meet."""
    said_low, said_high = said.ci95 or (said.value, said.value)
    low, high = here.ci95 or (here.value, here.value)
    if high < said_low * (1 - slack):
        return CheckOutcome.WORSE if larger_is_better else CheckOutcome.BETTER
    if low > said_high * (1 + slack):
        return CheckOutcome.BETTER if larger_is_better else CheckOutcome.WORSE
    return CheckOutcome.SAME


def _missed(checks: tuple[Check, ...]) -> list[str]:
    """Say of a predicted step time that the measured one lies outside its interval: the plan is none the worse."""
    return [
        f"the step time was predicted as {_text(check.said)} and is {_text(check.here)} here"
        for check in checks
        if check.figure == "step_ms" and check.outcome in (CheckOutcome.WORSE, CheckOutcome.BETTER)
    ]


def _away(workload: Workload, here: torch.device, forecast: Forecast | None) -> list[str]:
    """Say what stands behind the figures of a device that is not here, and what to run there."""
    if forecast is None:
        return []
    return [
        f"{forecast.device.name} is not here: the drop is emulated on {here.type}, times and memory are predicted",
        *forecast.reference.doubts,
        f"on {forecast.device.name}, to confirm: autoprec verify PLAN {workload.model_id}",
    ]


def _warnings(workload: Workload, plan: Plan, report: AuditReport, name: str) -> list[str]:
    known = plan.evidence
    found = []
    if plan.device.name not in ("any", name):
        found.append(f"the plan was made for {plan.device.name} ({plan.device.origin}); this is {name}")
    if plan.mode is not workload.mode:
        found.append(f"the plan was made for mode {plan.mode}; it was run in mode {workload.mode}")
    if known.weights_digest and known.weights_digest != weights_digest(workload.model):
        found.append("the plan's figures were measured on other weights of this model")
    torch_then = known.versions.get("torch")
    if torch_then and torch_then != str(torch.__version__):
        found.append(f"the plan was measured with torch {torch_then}; this is {torch.__version__}")
    if known.drop is None and known.speedup is None:
        found.append("the plan came without measured figures, so there is nothing to compare these with")
    if report.unused:
        names = ", ".join(report.unused[:3]) + (f" and {len(report.unused) - 3} more" if report.unused[3:] else "")
        found.append(f"never called in this step, so nothing is known of them: {names}")
    return found


def _text(figure: Figure | None) -> str:
    return "-" if figure is None else figure_text(figure)
