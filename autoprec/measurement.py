"""The one door to measuring: an assignment against the FP32 reference, on the same weights and batches.

Each batch is run by the reference and by the plan, in alternating order, on one model: the plan is taken off for
the reference's turn. From these pairs come the drop (dropout off), the step time as a ratio, the peak of memory
and, in train mode, the error of the gradient. The model is given back as it was found.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from autoprec.errors import MeasurementError, first_line
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.batches import batch_to
from autoprec.probe.compare import Comparison, Summary, compare, median_ci95, summarise
from autoprec.probe.gradient import GradientError, gradient_error
from autoprec.probe.pacing import pace
from autoprec.probe.pairs import LONG_STEP_SECONDS, Pairs, first_ratio, one_example, out_of_memory
from autoprec.probe.passes import first_bad_unit
from autoprec.probe.readout import Readout, ReadoutKind
from autoprec.probe.steps import Peak, Stepper, device_of, kept_state, peak_bytes, plain_fp32
from autoprec.probe.turns import Turns
from autoprec.probe.workload import Workload
from autoprec.records import Measurement, MeasurementOrigins, Mode, Origin, Role
from autoprec.runtime.attach import Applied, apply

__all__ = ["DeviceFailed", "Request", "evaluate", "measure"]

_NOT_ALONE = "timed beside another process on the device, which would not end in time"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What to measure, and how long.

    At least `min_pairs` pairs are timed, then more until the interval of their ratio is narrow, `timing_seconds` are
    spent or `max_pairs` are had; after `deadline` (as `time.monotonic` counts) one pair will do.
    `reference_ms` is the clock of a study: step times are this divided by the speedup. A plan slower than
    `stop_slower` times the reference after its first step is stopped; one of which `is_hopeless` says so, told the
    drops of the batches so far, sees no more batches, and as few pairs as may be. `drop_only` leaves out all but drops.
    With a `forecast` nothing is timed: the device is not here, so times and memory are the forecast's, and formats are
    emulated. `beat` is called now and then while other processes have the device.
    """

    workload: Workload
    plan: Plan
    name: str = "plan"
    emulate: bool = False
    reference_ms: float | None = None
    min_pairs: int = 8
    max_pairs: int = 60
    timing_seconds: float = 3.0
    stop_slower: float | None = None
    gradient_batches: int = 2
    deadline: float = float("inf")
    is_hopeless: Callable[[Sequence[float]], bool] | None = None
    drop_only: bool = False
    forecast: Forecast | None = None
    beat: Callable[[], None] = lambda: None


class DeviceFailed(MeasurementError):
    """The device has failed: nothing can run on it from here on, in this process."""


def measure(workload: Workload, plan: Plan, emulate: bool = False, device: str = "auto") -> Measurement:
    """Measure a plan on a workload, against FP32, and return the figures with intervals and origins.

    Args:
        workload: model and batches, on the device to measure on.
        plan: a plan for this model.
        emulate: run FP8 with its rounding and none of its speed where the device has none; the drop is then
            `emulated` and there is no step time.
        device: `auto` or the torch device to move model and batches to.

    Raises:
        PlanError, DeviceError: as `autoprec.apply`.
        MeasurementError: the reference cannot be run, or its output is not finite.
    """
    if device != "auto":
        workload = _moved(workload, torch.device(device))
    return evaluate(Request(workload=workload, plan=plan, emulate=emulate, name=_name(plan)))


def evaluate(request: Request) -> Measurement:
    """Carry out one request; a plan that cannot be run to its end, is stopped or overflows says so in `reason`.

    Raises:
        MeasurementError: the reference cannot be run, or its output is not finite.
        DeviceFailed: the device has failed.
    """
    try:
        return _finite(request, _evaluate(request))
    except torch.AcceleratorError as error:
        raise DeviceFailed(
            f"the device failed while measuring {request.name}: {first_line(error)}. Start again in a new process; "
            "a search goes on with --resume."
        ) from error
    except MemoryError as error:
        reason = f"out of memory on the host: {first_line(error)}"
    except RuntimeError as error:
        reason = first_line(error)
        if out_of_memory(error):
            reason = f"out of memory: {reason}"
    gc.collect()  # what the failed step held
    if device_of(request.workload.model).type != "cpu":
        torch.accelerator.empty_cache()
    return _stopped(request, reason)


def _evaluate(request: Request) -> Measurement:
    workload, plan = request.workload, request.plan
    device = device_of(workload.model)
    training = workload.mode is Mode.TRAIN
    with (
        Turns(device, request.deadline, request.beat).computing() as turns,
        kept_state(workload.model, weights=training),
        plain_fp32(device.type),
    ):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # nothing is trained here
            handle = apply(workload.model, plan, request.emulate)
        try:
            if request.drop_only:
                handle.model.eval()
                kind, parts = _drop(request, handle, Pairs(), turns)
                if fault := _not_finite(workload, parts):
                    return _stopped(request, fault)
                return _drops_alone(request, summarise(kind, parts), parts)
            if request.forecast is None:
                # 0 times a NaN gradient would still spoil a weight
                with kept_state(workload.model, weights=training), turns.timing():
                    reason = _too_slow(request, handle)
                if reason is not None:
                    return _stopped(request, reason)
            handle.model.eval()
            timing = Pairs()
            kind, parts = _drop(request, handle, timing, turns)
            if fault := _not_finite(workload, parts):
                return _stopped(request, fault)
            if len(parts) < len(workload.batches):
                request = replace(request, min_pairs=min(request.min_pairs, 2), timing_seconds=0.0)
            gradient = (
                gradient_error(workload, handle, request.gradient_batches)
                if training
                else GradientError(None, None, None)
            )
            handle.model.train(training)
            if request.forecast is not None:
                handle.remove()
                return _forecasted(request, request.forecast, summarise(kind, parts), parts, gradient)
            with turns.timing() as alone:
                _time(request, handle, timing)
            stepper = Stepper(workload, plan.grad_scaler)
            peak = peak_bytes(device, lambda: stepper.run(workload.batches[0]))
        finally:
            if handle._attached:
                handle.remove()
    metric = _metric(request)
    found = _measurement(request, summarise(kind, parts), parts, gradient, timing, peak, metric)
    return found if alone else replace(found, reason="; ".join(filter(None, (found.reason, _NOT_ALONE))))


# drop


def _drop(request: Request, handle: Applied, timing: Pairs, turns: Turns) -> tuple[ReadoutKind, list[Comparison]]:
    """Compare every batch, one batch's outputs held at a time.

    In infer mode these runs are timed steps as well, where no other process uses the device.
    """
    workload, parts, kind = request.workload, [], ReadoutKind.LOGITS
    timed = workload.mode is Mode.INFER and request.forecast is None and not request.drop_only and turns.alone_now()
    clock = timing if timed else Pairs()
    with torch.no_grad():
        for index, batch in enumerate(workload.batches):
            turns.let_pass()
            run = partial(workload.forward, batch)
            raw, own = clock.pair(handle, run, run)
            reference = workload.readout(batch, raw)
            kind = reference.kind
            _check_reference(reference, index)
            parts.append(compare(reference, workload.readout(batch, own)))
            if request.is_hopeless and request.is_hopeless(_batch_drops(parts)):
                break
    if not any(part.weight.sum() > 0 for part in parts):
        raise MeasurementError(
            "no position counts: every label is -100 or masked. Give batches with labels to predict."
        )
    return kind, parts


def _not_finite(workload: Workload, parts: Sequence[Comparison]) -> str | None:
    """Say in which unit of the plan, still on, values stop being finite; None where all outputs are."""
    bad = next((index for index, part in enumerate(parts) if not part.finite), None)
    if bad is None:
        return None
    with torch.no_grad():
        return f"the output is not finite on batch {bad}: {first_bad_unit(workload, workload.batches[bad])}"


def _batch_drops(parts: Sequence[Comparison]) -> tuple[float, ...]:
    """Return the mean drop of each batch in which anything counts."""
    counted = [part for part in parts if part.weight.sum() > 0]
    return tuple(max(float(part.drop.sum() / part.weight.sum()), 0.0) for part in counted)


def _check_reference(reference: Readout, batch: int) -> None:
    if not reference.is_finite():
        raise MeasurementError(
            f"the FP32 reference's output is not finite on batch {batch}, so no plan can be compared with it. "
            "Check the weights and this batch; autoprec changes neither."
        )


# time


def _too_slow(request: Request, handle: Applied) -> str | None:
    """Run the first step of each side; they also warm up. Return a reason to stop, or None.

    Where a step is long, one example of the batch goes first: a format without hardware can be 20 times as slow.
    """
    handle.model.train(request.workload.mode is Mode.TRAIN)
    batch = request.workload.batches[0]
    if request.stop_slower is not None and (request.reference_ms or 0.0) > 1e3 * LONG_STEP_SECONDS:
        ratio = first_ratio(request.workload, handle, one_example(batch))
        if ratio > request.stop_slower:
            return f"stopped after a step on one example: {ratio:.1f} times as slow as the reference"
    ratio = first_ratio(request.workload, handle, batch)
    if request.stop_slower is None or ratio <= request.stop_slower:
        return None
    return f"stopped after its first step: {ratio:.1f} times as slow as the reference"


def _time(request: Request, handle: Applied, timing: Pairs) -> None:
    """Time more pairs of steps, on the batches in turn, until the request is satisfied."""
    workload = request.workload
    reference, own = Stepper(workload), Stepper(workload, request.plan.grad_scaler)
    if workload.mode is Mode.TRAIN:  # not timed: optimizer states are made, allocators and kernels warm up
        Pairs().pair(handle, partial(reference.run, workload.batches[0]), partial(own.run, workload.batches[0]))
    while _wants_more(request, timing):
        batch = workload.batches[len(timing.plan_s) % len(workload.batches)]
        timing.pair(handle, partial(reference.run, batch), partial(own.run, batch))


def _wants_more(request: Request, timing: Pairs) -> bool:
    """Say whether another pair is to be timed; one there is always."""
    pairs = len(timing.plan_s)
    if pairs == 0 or time.monotonic() >= request.deadline:
        return pairs == 0
    if pairs < request.min_pairs:
        return True
    spent = sum(timing.reference_s) + sum(timing.plan_s)
    return pairs < request.max_pairs and spent < request.timing_seconds and not timing.is_narrow()


# result


def _metric(request: Request) -> float | None:
    """Return the user's own metric under the plan, dropout off."""
    workload = request.workload
    if workload.metric is None:
        return None
    with kept_state(workload.model, weights=False):
        handle = apply(workload.model, request.plan, request.emulate)
        try:
            workload.model.eval()
            with torch.no_grad():
                return float(workload.metric(workload.model, workload.batches))
        finally:
            handle.remove()


def _measurement(
    request: Request,
    summary: Summary,
    parts: Sequence[Comparison],
    gradient: GradientError,
    timing: Pairs,
    peak: Peak,
    metric: float | None,
) -> Measurement:
    fake = request.emulate and Format.FP8 in request.plan.formats
    speedup, speedup_ci = timing.ratio()
    reference_ms = median_ci95(timing.reference_s)[0] * 1e3
    clock = request.reference_ms or reference_ms
    reasons = [r for r in (gradient.reason, peak.reason) if r]
    if len(parts) < len(request.workload.batches):
        reasons.append(f"stopped after {len(parts)} of {len(request.workload.batches)} batches: too large a drop")
    if fake:
        reasons.append("FP8 is emulated: its numbers are real, its speed and memory are not measured")
    drops = _drops_alone(request, summary, parts)
    return replace(
        drops,
        loss_rise=summary.loss_rise.value if summary.loss_rise else None,
        loss_rise_ci95=summary.loss_rise.ci95 if summary.loss_rise else None,
        grad_error=gradient.error,
        grad_error_limit=gradient.limit,
        step_ms=None if fake else clock / speedup,
        step_ms_ci95=None if fake or speedup_ci is None else (clock / speedup_ci[1], clock / speedup_ci[0]),
        reference_step_ms=reference_ms,
        speedup=None if fake else speedup,
        speedup_ci95=None if fake else speedup_ci,
        pace=None if fake else str(pace(timing.reference_s, timing.plan_s).answer),
        peak_bytes=None if fake else peak.bytes,
        metric=metric,
        origin=replace(
            drops.origin,
            step_ms=None if fake else Origin.MEASURED,
            peak_bytes=None if fake or peak.bytes is None else Origin.MEASURED,
            metric=None if metric is None else Origin.EMULATED if fake else Origin.MEASURED,
        ),
        reason="; ".join(reasons) or None,
    )


def _forecasted(
    request: Request, forecast: Forecast, summary: Summary, parts: Sequence[Comparison], gradient: GradientError
) -> Measurement:
    """Return drops that were emulated here, with the times and memory that are predicted there."""
    figures, metric = forecast.of(request.plan), _metric(request)
    drops = _drops_alone(request, summary, parts)
    cut = len(parts) < len(request.workload.batches)
    reasons = (
        [f"stopped after {len(parts)} of {len(request.workload.batches)} batches: too large a drop"] if cut else []
    )
    return replace(
        drops,
        loss_rise=summary.loss_rise.value if summary.loss_rise else None,
        loss_rise_ci95=summary.loss_rise.ci95 if summary.loss_rise else None,
        grad_error=gradient.error,
        grad_error_limit=gradient.limit,
        step_ms=figures.step_ms.value,
        step_ms_ci95=(figures.step_ms.low, figures.step_ms.high),
        speedup=figures.speedup.value,
        speedup_ci95=(figures.speedup.low, figures.speedup.high),
        peak_bytes=figures.peak_bytes,
        metric=metric,
        origin=replace(
            drops.origin,
            step_ms=figures.step_ms.origin,
            peak_bytes=Origin.PREDICTED,
            metric=None if metric is None else Origin.EMULATED,
        ),
        reason="; ".join([*reasons, *([gradient.reason] if gradient.reason else [])]) or None,
    )


def _drops_alone(request: Request, summary: Summary, parts: Sequence[Comparison]) -> Measurement:
    fake = request.forecast is not None or (request.emulate and Format.FP8 in request.plan.formats)
    return Measurement(
        name=request.name,
        assignment=request.plan.assignment,
        drop=summary.drop.value,
        drop_ci95=summary.drop.ci95,
        drop_percent=summary.drop_percent,
        task_metric=summary.task_metric,
        origin=MeasurementOrigins(drop=Origin.EMULATED if fake else Origin.MEASURED),
        batch_drops=_batch_drops(parts),
    )


def _finite(request: Request, found: Measurement) -> Measurement:
    """Return a measurement without figures that are no numbers: they say so, and fail what cannot do without them."""
    figures = {f.name: getattr(found, f.name) for f in fields(found)}
    spoilt = [
        name
        for name, value in figures.items()
        if not all(math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float))
    ]
    if not spoilt:
        return found
    reason = f"not a finite number: {', '.join(spoilt)}"
    if {"drop", "step_ms", "grad_error", "batch_drops"} & set(spoilt):
        return _stopped(request, reason)
    nothing: dict[str, Any] = dict.fromkeys(spoilt)
    return replace(found, **nothing, reason="; ".join(filter(None, (found.reason, reason))))


def _stopped(request: Request, reason: str) -> Measurement:
    return Measurement(name=request.name, assignment=request.plan.assignment, reason=reason)


def _name(plan: Plan) -> str:
    formats = {u.format for u in plan.units if u.role is not Role.EMBEDDING}
    if len(formats) > 1:
        return "plan"
    return f"{'uniform' if plan.stream is Format.FP32 else 'cast'} {formats.pop()}"


def _moved(workload: Workload, device: torch.device) -> Workload:
    workload.model.to(device)
    return workload.with_batches(batch_to(batch, device) for batch in workload.batches)
