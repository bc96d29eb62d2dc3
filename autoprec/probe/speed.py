"""What a model's units take in each format on the device they are on, and with it what any assignment takes.

Blocks of a transformer repeat, so one unit of each shape is timed, by itself, on what went into it in a step of the
reference; formats take turns, FP32 among them, because a shared machine's speed drifts, and only ratios within a round
mean anything. Then a few whole steps tell what of it arrives in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from autoprec import __version__
from autoprec.errors import MeasurementError, first_line
from autoprec.formats import Format
from autoprec.probe.arrival import Part, arrival
from autoprec.probe.calls import record_calls
from autoprec.probe.clock import Clock
from autoprec.probe.device import device_name
from autoprec.probe.rates import median_interval
from autoprec.probe.replay import repeatable
from autoprec.probe.shapecache import ShapeCache
from autoprec.probe.shapes import time_shapes, unit_times
from autoprec.probe.sites import find_sites
from autoprec.probe.steps import device_of, kept_state, plain_fp32
from autoprec.probe.turns import Turns
from autoprec.probe.units import probe_units
from autoprec.probe.whole import time_steps
from autoprec.probe.workload import Workload
from autoprec.records import Estimate, Mode, Origin, Progress, SpeedProfile
from autoprec.runtime.fp8 import fp8_missing
from autoprec.runtime.identity import canonical_modules

__all__ = ["probe_speed"]

#: how long a probe takes, and the share of that for shapes; whole steps have the rest
_SECONDS, _SHAPES_SHARE = 40.0, 0.4

News = Callable[[Progress], None]


def probe_speed(
    workload: Workload,
    formats: Sequence[Format | str] = (Format.BF16, Format.FP16),
    *,
    seconds: float = _SECONDS,
    cache: bool = True,
    progress: News | None = None,
) -> SpeedProfile:
    """Measure what each unit takes in each format in a step of a workload, and a few whole steps.

    Args:
        workload: on the device to measure on; its first batch is the step, its mode says whether that has a backward.
        formats: beside FP32; what the device or its units cannot run is left out with a note.
        seconds: about how long; at least some rounds are made.
        cache: read and write the user's cache of times of shapes, by device, driver, torch, threads, mode and format;
            whole steps are timed each time.
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
        with Turns(device_of(workload.model)).computing() as turns, turns.timing():
            return _probe(workload, tuple(dict.fromkeys(Format(f) for f in formats)), clock, cache, tell)
    except RuntimeError as error:
        raise MeasurementError(
            f"the FP32 reference cannot be timed: {first_line(error)}. Check that the model takes these batches; where "
            "memory is short, try a smaller --batch-size or --seq-len."
        ) from error


def _probe(workload: Workload, formats: tuple[Format, ...], clock: Clock, cache: bool, tell: News) -> SpeedProfile:
    model, device = workload.model, device_of(workload.model)
    profile, modules = probe_units(model, model_id=workload.model_id), canonical_modules(model)
    missing = fp8_missing(device)
    notes = [f"fp8 is not timed: {missing}"] if missing and Format.FP8 in formats else []
    low = tuple(f for f in formats if f is not Format.FP32 and not (f is Format.FP8 and missing))
    ambient = Format.FP16 if low == (Format.FP16,) else Format.BF16
    training, tokens = workload.mode is Mode.TRAIN, workload.tokens(workload.batches[0])
    with kept_state(model, weights=training), repeatable(model), plain_fp32(device.type):
        model.train(training)
        sites = find_sites(profile, modules, low, ambient, emulated=False)
        with torch.set_grad_enabled(training):
            calls = record_calls(workload, workload.batches[0], sites, profile, modules, gradients=training)
            kept = ShapeCache.of(device, workload.mode, ambient) if cache else None
            shapes = time_shapes(
                calls, low, modules, ambient, device, notes, clock, _SHAPES_SHARE, kept, training=training
            )
        times = tuple(unit_times(profile, calls, shapes, low, device, tokens, training=training))
        tell(Progress(stage="speed", message=f"{len(shapes)} shapes timed", elapsed_seconds=clock.elapsed))
        steps = time_steps(workload, profile, times, ambient, clock)
        tell(Progress(stage="speed", message="whole steps timed", elapsed_seconds=clock.elapsed))
    alone: dict[Part, Estimate] = {
        (r.shape, r.format): _less_one(r.ratio) for r in times if r.format is not Format.FP32
    }
    middle, lowest, highest = median_interval([1e3 * s for s in steps.reference_s])
    return SpeedProfile(
        model_id=workload.model_id,
        fingerprint=profile.fingerprint,
        device=device_name(device),
        mode=workload.mode,
        ambient=ambient,
        tokens=tokens,
        formats=low,
        reference_ms=Estimate(middle, lowest, highest, Origin.MEASURED),
        times=times,
        arrival=arrival(alone, list(steps.runs(times))),
        seconds=clock.elapsed,
        notes=tuple(dict.fromkeys(notes)),
        versions={"autoprec": __version__, "torch": torch.__version__},
    )


def _less_one(ratio: Estimate) -> Estimate:
    return Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.origin)
