"""A few steps of a workload, watched: once in FP32 for sizes, once in the format that was asked for what breaks in it.

In FP32 the largest value in and out of each unit and the exponents of its gradients are noted; FP16's range is then a
matter of arithmetic, at any loss scale. In the low format (blanket autocast, as a flag gives it) the first unit with
a value that is not finite is the one that overflows. Weights, buffers and random state are given back as they were.

Not promised: other batches have other largest values; times are medians of a few steps on a machine that others may
use.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.doctor.exponent import Sizes, suggested_scale
from autoprec.errors import AutoprecError, DataError, first_line
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.batches import Batch
from autoprec.probe.numerics import watched
from autoprec.probe.pairs import LONG_STEP_SECONDS, Pairs
from autoprec.probe.passes import first_bad_unit
from autoprec.probe.steps import Stepper, device_of, kept_state, plain_fp32
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import Mode, ModelProfile, OpKind, Origin, TraceReport, UnitTrace
from autoprec.runtime.attach import Applied, applied
from autoprec.runtime.audit import audit
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.watching import Watch

__all__ = ["Traced", "traced"]

#: batches that are looked at: more change the largest values by little, and a trace should take seconds
_BATCHES = 3
_PAIRS = 5


@dataclass(frozen=True, slots=True)
class Traced:
    """A report, and what could not be done with the reason."""

    report: TraceReport
    notes: tuple[str, ...]


def traced(
    workload: Workload,
    choice: Format,
    *,
    asked: bool = False,
    waits_s: tuple[float, ...] | None = None,
    workers: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Traced:
    """Run up to three batches of a workload in FP32 and in a format, and say what was seen.

    Args:
        workload: on the device to run on.
        choice: fp16 or bf16; what the settings ask for, else fp16, whose range is the narrower.
        asked: the settings ask for it, so a loop's steps take its time and not FP32's.
        waits_s: seconds waited for each batch when they were read; None where they were in memory.
        workers: of the loader.
        tell: called with a sentence as each part begins.

    Raises:
        ModelError, MeasurementError: the model cannot be run.
    """
    model = workload.model
    profile, modules = probe_units(model, model_id=workload.model_id), canonical_modules(model)
    batches, notes = workload.batches[:_BATCHES], []
    with kept_state(model, weights=True):
        tell("Running in FP32")
        wide = _wide(workload, profile, modules, batches)
        notes += wide.notes
        whole = Sizes()
        for sizes in wide.gradients.values():
            whole.join(sizes)
        scale = suggested_scale(whole.largest)
        low = _Low()
        if wide.bad is None:
            tell(f"Running in {choice}")
            low = _low(workload, choice, batches, scale, wide.trains)
            notes += low.notes
    share, reason = _waiting(waits_s, workers, low.step_s if asked else low.fp32_s)
    return Traced(
        TraceReport(
            format=choice, device=device_of(model).type, batches=len(batches), units=tuple(_rows(profile, wide)),
            first_non_finite=low.bad, non_finite_in_fp32=wide.bad,
            gradient_flushed_share=whole.flushed(), gradient_subnormal_share=whole.subnormal(),
            flushed_share_scaled=whole.flushed(scale) if scale else None, loss_scale=scale,
            step_ms=None if low.step_s is None else 1e3 * low.step_s,
            fp32_step_ms=None if low.fp32_s is None else 1e3 * low.fp32_s,
            waiting_share=share, waiting_reason=reason, low_precision_share=low.share, origin=Origin.MEASURED,
        ),
        tuple(notes),
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Wide:
    largest: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Sizes] = field(default_factory=dict)
    trains: bool = False
    bad: str | None = None
    notes: list[str] = field(default_factory=list)


def _wide(
    workload: Workload, profile: ModelProfile, modules: dict[str, nn.Module], batches: tuple[Batch, ...]
) -> _Wide:
    found = _Wide(trains=workload.mode is Mode.TRAIN)
    handles = [
        modules[name].register_forward_hook(partial(_follow, found.gradients.setdefault(unit.name, Sizes())))
        for unit in profile.units
        for name in unit.modules
    ]
    try:
        with plain_fp32(device_of(workload.model).type), watched(profile, modules, found.largest):
            for batch in batches:
                _forward_backward(workload, batch, found)
                if not _finite(found):
                    found.bad = first_bad_unit(workload, batch)
                    break
    finally:
        for handle in handles:
            handle.remove()
    return found


def _forward_backward(workload: Workload, batch: Batch, found: _Wide) -> None:
    with torch.set_grad_enabled(found.trains):
        raw = workload.forward(batch)
        if not found.trains:
            return
        try:
            loss = workload.training_loss(batch, raw)
        except DataError as error:  # an encoder without labels still has activations
            found.trains = False
            found.notes.append(f"gradients were not looked at: {first_line(error)}")
            return
        loss.backward()
        if not bool(torch.isfinite(loss)):
            found.largest["the loss"] = math.inf


def _finite(found: _Wide) -> bool:
    return all(math.isfinite(v) for v in found.largest.values())


def _follow(sizes: Sizes, module: nn.Module, args: Any, output: Any) -> None:
    result = output[0] if isinstance(output, tuple) else output
    if isinstance(result, Tensor) and result.requires_grad:
        result.register_hook(lambda gradient: sizes.add(gradient))


@dataclass(slots=True, eq=False)
class _Low:
    bad: str | None = None
    step_s: float | None = None
    fp32_s: float | None = None
    share: float | None = None
    notes: list[str] = field(default_factory=list)


def _low(workload: Workload, choice: Format, batches: tuple[Batch, ...], scale: float | None, trains: bool) -> _Low:
    found = _Low()
    try:
        plan = Plan.uniform(workload.model, choice)
        with applied(workload.model, plan, emulate=True) as handle:
            for batch in batches:
                started = time.perf_counter()
                found.bad = _first_overflow(workload, handle, batch, scale if choice is Format.FP16 else None, trains)
                if found.bad or time.perf_counter() - started > 2 * LONG_STEP_SECONDS:
                    break
            if found.bad:  # its steps would be skipped: their time says nothing
                return found
            _times(workload, handle, batches[0], trains, found)
            found.share = _share(workload, handle, batches[0], choice, trains)
    except (AutoprecError, RuntimeError) as error:
        found.notes.append(f"{choice} was not run to its end: {first_line(error)}")
    return found


def _first_overflow(workload: Workload, handle: Applied, batch: Batch, scale: float | None, trains: bool) -> str | None:
    """Return the unit whose result is the first that is not finite, forward first and then gradients; None if none
    is."""
    with Watch(handle.plan, canonical_modules(workload.model)) as watch, torch.set_grad_enabled(trains):
        raw = workload.forward(batch)
        if trains:
            (workload.training_loss(batch, raw) * (scale or 1.0)).backward()
    readings = watch.readings()
    forward = [r for r in readings if math.isinf(r.largest_output)]
    if forward:
        return min(forward, key=lambda r: r.order).unit
    backward = [r for r in readings if math.isinf(r.largest_gradient or 0.0)]
    return f"{backward[-1].unit} (its gradient)" if backward else None


def _times(workload: Workload, handle: Applied, batch: Batch, trains: bool, found: _Low) -> None:
    stepper, pairs = Stepper(workload if trains else workload.with_mode(Mode.INFER)), Pairs()
    for count in range(_PAIRS + 1):
        pairs.pair(handle, partial(stepper.run, batch), partial(stepper.run, batch))
        if pairs.plan_s[-1] + pairs.reference_s[-1] > (1 if count else 2) * LONG_STEP_SECONDS:
            break
    found.step_s = statistics.median(pairs.plan_s[1:] or pairs.plan_s)  # the first sets up kernels
    found.fp32_s = statistics.median(pairs.reference_s[1:] or pairs.reference_s)


def _share(workload: Workload, handle: Applied, batch: Batch, choice: Format, trains: bool) -> float | None:
    """Return the share of matmul calls whose operands reached the kernel in the format."""
    report = audit(
        workload.model, handle.plan, batch, backward=trains, run=partial(workload.forward, batch),
        loss=partial(workload.training_loss, batch) if trains else None,
    )  # fmt: skip
    calls = [(row.calls, row.executed == choice) for row in report.rows if row.kind is OpKind.MATMUL]
    total = sum(count for count, _ in calls)
    return sum(count for count, low in calls if low) / total if total else None


def _rows(profile: ModelProfile, wide: _Wide) -> list[UnitTrace]:
    rows = []
    for unit in profile.units:
        largest, sizes = wide.largest.get(unit.name), wide.gradients.get(unit.name, Sizes())
        if largest is None or not math.isfinite(largest):
            continue
        seen = 0 < sizes.largest < math.inf
        rows.append(
            UnitTrace(
                unit=unit.name, largest_activation=largest, largest_gradient=sizes.largest if seen else None,
                flushed_share=sizes.flushed(), subnormal_share=sizes.subnormal(),
            )
        )  # fmt: skip
    return rows


def _waiting(waits_s: tuple[float, ...] | None, workers: int, step_s: float | None) -> tuple[float | None, str | None]:
    """Return the share of a loop's time in which it waits for data, and how that was had."""
    if waits_s is None:
        return None, "not measured: the batches were in memory"
    if step_s is None:
        return None, "not measured: the step could not be timed"
    wait = statistics.median(waits_s[1:] or waits_s)  # the first starts workers
    said = f"{1e3 * wait:.1f} ms a batch with {workers or 'no'} workers, {1e3 * step_s:.1f} ms a step"
    if workers:  # batches are made while the step runs
        return max(0.0, wait - step_s) / max(wait, step_s), said
    return wait / (wait + step_s), said
