"""What a model's units take in each format on the device they are on, and with it what any assignment takes.

Blocks of a transformer repeat, so one unit of each shape is timed, by itself, on what went into it in a step of the
reference; formats take turns, FP32 among them, because a shared machine's speed drifts, and only ratios within a round
mean anything. Then a few whole steps tell what of it arrives in a step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from autoprec import __version__
from autoprec.errors import MeasurementError, first_line
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.cache import device_name
from autoprec.probe.calls import Call, record_calls
from autoprec.probe.clock import Clock
from autoprec.probe.payoff import why_not
from autoprec.probe.rates import median_interval
from autoprec.probe.replay import repeatable
from autoprec.probe.sites import find_sites, in_format
from autoprec.probe.steps import Stepper, device_of, kept_state, plain_fp32, timed
from autoprec.probe.timers import Work, timer_of
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import Estimate, Mode, ModelProfile, Origin, Progress, SpeedProfile, UnitTime
from autoprec.runtime.attach import applied
from autoprec.runtime.fp8 import fp8_missing
from autoprec.runtime.identity import canonical_modules

__all__ = ["probe_speed"]

#: rounds of whole steps and of every shape that are made first, and the share of the time that whole steps may take
_STEPS, _FIRST_ROUNDS, _STEPS_SHARE = 5, 4, 0.5
#: a format this many times slower than FP32 after a first run is settled
_SETTLED = 3.0
#: of a step: what all shapes' intervals together may still be off, when it is enough
_ENOUGH = 0.01
_SECONDS = 30.0

News = Callable[[Progress], None]


@dataclass(slots=True, eq=False)
class _Shape:
    """A call that stands for all of its shape, with its seconds by format and round: forward, and both ways."""

    call: Call
    works: dict[Format, tuple[Work, Work | None]] = field(default_factory=dict)
    forward: dict[Format, list[float]] = field(default_factory=dict)
    total: dict[Format, list[float]] = field(default_factory=dict)
    #: calls of this shape in a step
    count: int = 0

    def round(self, backwards: bool) -> None:
        """Time each format once, in one order or the other."""
        order = list(self.works)
        for choice in reversed(order) if backwards else order:
            forward, both = self.works[choice]
            self.forward.setdefault(choice, []).append(forward.seconds())
            self.total.setdefault(choice, []).append(both.seconds() if both else self.forward[choice][-1])

    def settle(self) -> None:
        """Time no longer what is far slower than FP32."""
        for choice in list(self.works):
            if self.ratio(choice).value > _SETTLED:
                del self.works[choice]

    def ratio(self, choice: Format) -> Estimate:
        """Return the seconds in a format over those in FP32, of the same rounds."""
        own, wide = self.total[choice], self.total[Format.FP32]
        middle, low, high = median_interval([a / b for a, b in zip(own, wide, strict=False)])
        return Estimate(middle, low, high, Origin.MEASURED)

    def doubt(self) -> float:
        """Return by how many seconds of a step this shape may be off, in the format that saves the most of it."""
        wide = statistics.median(self.total[Format.FP32])
        spreads = [self.ratio(f) for f in self.works if f is not Format.FP32]
        return max((self.count * wide * (r.high - r.low) / 2 for r in spreads), default=0.0)


def probe_speed(
    workload: Workload,
    formats: Sequence[Format | str] = (Format.BF16, Format.FP16),
    *,
    seconds: float = _SECONDS,
    progress: News | None = None,
) -> SpeedProfile:
    """Measure what each unit takes in each format in a step of a workload, and a few whole steps.

    Args:
        workload: on the device to measure on; its first batch is the step, its mode says whether that has a backward.
        formats: beside FP32; what the device or its units cannot run is left out with a note.
        seconds: about how long; at least some rounds are made.
        progress: called with news as they come.

    Returns:
        times with the spread they were seen with. Not promised: times of batches of another size, and that they hold
        beside another load. Emulated FP8 has no time.

    Raises:
        MeasurementError: the reference cannot be run.
    """
    clock, tell = Clock(time.monotonic()), progress or (lambda news: None)
    clock.allowed = seconds
    try:
        return _probe(workload, tuple(dict.fromkeys(Format(f) for f in formats)), clock, tell)
    except RuntimeError as error:
        raise MeasurementError(
            f"the FP32 reference cannot be timed: {first_line(error)}. Check that the model takes these batches; where "
            "memory is short, try a smaller --batch-size or --seq-len."
        ) from error


def _probe(workload: Workload, formats: tuple[Format, ...], clock: Clock, tell: News) -> SpeedProfile:
    model, device = workload.model, device_of(workload.model)
    profile, modules = probe_units(model, model_id=workload.model_id), canonical_modules(model)
    missing = fp8_missing(device)
    notes = [f"fp8 is not timed: {missing}"] if missing and Format.FP8 in formats else []
    low = tuple(f for f in formats if f is not Format.FP32 and not (f is Format.FP8 and missing))
    ambient = Format.FP16 if low == (Format.FP16,) else Format.BF16
    training = workload.mode is Mode.TRAIN
    with kept_state(model, weights=training), repeatable(model), plain_fp32(device.type):
        model.train(training)
        steps = _whole_steps(workload, profile, low, ambient, clock)
        tell(Progress(stage="speed", message="whole steps timed", elapsed_seconds=clock.elapsed))
        sites = find_sites(profile, modules, low, ambient, emulated=False)
        with torch.set_grad_enabled(training):
            calls = record_calls(workload, workload.batches[0], sites, modules, gradients=training)
            shapes = _time_shapes(calls, low, modules, ambient, device, notes, clock, training)
        tell(Progress(stage="speed", message=f"{len(shapes)} shapes timed", elapsed_seconds=clock.elapsed))
        times = tuple(_unit_times(profile, calls, shapes, low, device, training))
    reference = _interval(steps[None])
    return SpeedProfile(
        model_id=workload.model_id,
        fingerprint=profile.fingerprint,
        device=device_name(device),
        mode=workload.mode,
        ambient=ambient,
        tokens=workload.tokens(workload.batches[0]),
        formats=low,
        reference_ms=reference.scaled(1e3),
        around=_interval(_ratios(steps, Format.FP32)),
        corrections=_corrections(steps, times, low, reference.value),
        times=times,
        seconds=clock.elapsed,
        notes=tuple(dict.fromkeys(notes)),
        versions={"autoprec": __version__, "torch": torch.__version__},
    )


# whole steps


def _whole_steps(
    workload: Workload, profile: ModelProfile, low: Sequence[Format], ambient: Format, clock: Clock
) -> dict[Format | None, list[float]]:
    """Return seconds of steps in rounds: of the reference (None), and with all units in each format.

    A format that is far slower than FP32 after its first step has that one alone.
    """
    wide = Plan.assign(
        profile,
        {u.name: Format.FP32 for u in profile.units},
        ambient=ambient,
        fp8_recipe="tensorwise" if Format.FP8 in low else None,
        mode=workload.mode,
    )
    plans = {f: wide.replace({u.name: f for u in profile.units if f in u.formats}) for f in (Format.FP32, *low)}
    runs: dict[Format | None, Callable[[], float]] = {None: partial(_step, workload, None)}
    runs |= {choice: partial(_step, workload, plan) for choice, plan in plans.items()}
    found: dict[Format | None, list[float]] = {choice: [] for choice in runs}
    for run in (runs[None], runs[Format.FP32]):
        run()  # sets up kernels and optimizer states
    order, begun, number = list(runs), clock.elapsed, 0
    while True:
        for choice in order if number % 2 == 0 else reversed(order):
            found[choice].append(runs[choice]())
        number += 1
        order = [c for c in order if found[c][0] < _SETTLED * found[None][0]]
        spent = clock.elapsed - begun
        if number > 1 and spent + spent / number > _STEPS_SHARE * clock.allowed:
            break
        if number >= _STEPS and all(_is_narrow(_ratios(found, c)) for c in order if c is not None):
            break
    return found


def _is_narrow(ratios: Sequence[float]) -> bool:
    known = _interval(ratios)
    return len(ratios) > _STEPS and known.high - known.low < _ENOUGH


def _step(workload: Workload, plan: Plan | None) -> float:
    """Return the seconds of one step under a plan, or of the reference."""
    around = applied(workload.model, plan) if plan else contextlib.nullcontext()
    with around:
        stepper = Stepper(workload, plan.grad_scaler if plan else None)
        if workload.mode is Mode.TRAIN:
            stepper.run(workload.batches[0])  # makes the optimizer's states
        return timed(stepper.device, partial(stepper.run, workload.batches[0]))[0]


def _ratios(steps: Mapping[Format | None, Sequence[float]], choice: Format) -> list[float]:
    return [a / b for a, b in zip(steps[choice], steps[None], strict=False)]


def _corrections(
    steps: Mapping[Format | None, Sequence[float]],
    times: Sequence[UnitTime],
    low: Sequence[Format],
    reference_s: float,
) -> dict[Format, Estimate]:
    """Return by format what whole steps save over what their units save one by one."""
    wide = {row.unit: row.step_ms for row in times if row.format is Format.FP32}
    found = {}
    for choice in low:
        saved = sum(wide[row.unit] * (row.ratio.value - 1) for row in times if row.format is choice) / 1e3
        ratios = [a - b for a, b in zip(_ratios(steps, choice), _ratios(steps, Format.FP32), strict=False)]
        if ratios and saved:
            whole = _interval(ratios)
            ends = sorted((whole.low * reference_s / saved, whole.high * reference_s / saved))
            if (value := whole.value * reference_s / saved) > 0:
                found[choice] = Estimate(value, ends[0], ends[1], Origin.MEASURED)
    return found


# shapes


def _time_shapes(
    calls: Sequence[Call],
    low: Sequence[Format],
    modules: Mapping[str, nn.Module],
    ambient: Format,
    device: torch.device,
    notes: list[str],
    clock: Clock,
    training: bool,
) -> dict[str, _Shape]:
    """Time one call of each shape: all of them some rounds, then those that leave most in doubt while there is time."""
    shapes: dict[str, _Shape] = {}
    make = timer_of(device, notes)
    for call in calls:
        shape = shapes.setdefault(call.shape, _Shape(call))
        shape.count += call.count
    for shape in shapes.values():
        for choice in (Format.FP32, *(f for f in low if f in shape.call.site.swaps)):
            around = partial(_in_format, shape.call, choice, modules, ambient)
            shape.works[choice] = (
                make(shape.call.forward, around),
                make(shape.call.both, around) if training else None,
            )
        shape.round(False)
        shape.settle()
    for number in range(1, _FIRST_ROUNDS):
        for shape in shapes.values():
            shape.round(number % 2 == 1)
    step = sum(s.count * statistics.median(s.total[Format.FP32]) for s in shapes.values())
    while clock.elapsed < clock.allowed and sum(s.doubt() for s in shapes.values()) > _ENOUGH * step:
        most = max(shapes.values(), key=_Shape.doubt)
        most.round(len(most.total[Format.FP32]) % 2 == 1)
    return shapes


@contextlib.contextmanager
def _in_format(call: Call, choice: Format, modules: Mapping[str, nn.Module], ambient: Format) -> Iterator[None]:
    """Put a call's unit into a format; in FP32 it runs as in the reference."""
    with contextlib.nullcontext() if choice is Format.FP32 else in_format(call.site, choice, modules, ambient):
        yield


def _unit_times(
    profile: ModelProfile,
    calls: Sequence[Call],
    shapes: Mapping[str, _Shape],
    low: Sequence[Format],
    device: torch.device,
    training: bool,
) -> Iterator[UnitTime]:
    """Yield a row for each unit and format: the sum over its sites, each as its shape was timed."""
    for unit in profile.units:
        own = [(shapes[call.shape], call) for call in calls if call.site.unit == unit.name]
        for choice in (Format.FP32, *low):
            if not own or not all(choice in shape.total for shape, _ in own):
                continue
            wide = [call.count * statistics.median(shape.total[Format.FP32]) for shape, call in own]
            ratios = [shape.ratio(choice) for shape, _ in own]
            value, lower, upper = (
                sum(w * end for w, end in zip(wide, ends, strict=True)) / sum(wide)
                for ends in zip(*((r.value, r.low, r.high) for r in ratios), strict=True)
            )
            both = 1e3 * value * sum(wide)
            forward = 1e3 * sum(c.count * statistics.median(s.forward[choice]) for s, c in own)
            ratio = Estimate(value, lower, upper, Origin.MEASURED)
            yield UnitTime(
                unit=unit.name,
                format=choice,
                shape=" + ".join(sorted({call.shape for _, call in own})),
                forward_ms=min(forward, both) if training else both,
                backward_ms=max(both - forward, 0.0) if training else None,
                ratio=ratio,
                reason=None if choice is Format.FP32 else why_not(profile, unit, choice, ratio, device),
            )


# figures


def _interval(values: Sequence[float]) -> Estimate:
    middle, low, high = median_interval(values)
    return Estimate(middle, low, high, Origin.MEASURED)
