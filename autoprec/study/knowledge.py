"""What a search knows before its first trial: each decision's drop and its time, from probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from autoprec.errors import MeasurementError, StudyError
from autoprec.files import as_json, from_json, read_json
from autoprec.formats import Format
from autoprec.predict.forecast import Forecast
from autoprec.probe.survey import pass_forwards
from autoprec.probe.workload import Workload
from autoprec.records import Estimate, Mode, Origin, Progress, SensitivityProfile, SpeedProfile
from autoprec.study.budget import Budget
from autoprec.study.folder import RunFolder
from autoprec.study.space import SearchSpace

__all__ = ["drop_priors", "forecast_priors", "sensitivity_of", "speed_of", "time_priors"]

T = TypeVar("T")

#: what the probe may take: no more than this share of the budget, nor than so many passes over all batches beside what
#: it needs to begin with (a probe by itself takes four, and a search has more use for each)
_SHARE, _SWEEPS, _BEGIN_SECONDS = 0.15, 6.0, 1.0
#: what timing units one by one may take, of the budget and in steps; and a step with its backward in forwards
_SPEED_SHARE, _SPEED_STEPS, _BACKWARD = 0.06, 60.0, 3.0
#: by how much the sum of predicted units may differ from what a decision adds to a step: casts at borders
_BORDERS = 1.1


def sensitivity_of(
    workload: Workload,
    space: SearchSpace,
    budget: Budget,
    folder: RunFolder,
    seed: int,
    tell: Callable[[Progress], None],
    forward_seconds: float,
    probe: Callable[..., SensitivityProfile],
) -> tuple[SensitivityProfile | None, str | None]:
    """Probe the formats of a space, or read what an earlier run of the folder probed; None with the reason where not.

    `sensitivity.json` is written by then. `forward_seconds` is what a forward of one batch takes; `probe` is
    `probe_sensitivity`, here or in a worker.
    """
    formats = _low_formats(space)
    if not formats:
        return None, None
    known = _kept(SensitivityProfile, folder, "sensitivity")
    if known and known.data_digest == workload.data_digest() and set(formats) <= set(known.formats):
        return known, None
    sweep = len(workload.batches) * forward_seconds * pass_forwards(len(formats))
    seconds = min(_SHARE * budget.seconds, _BEGIN_SECONDS + _SWEEPS * sweep)
    try:
        found = probe(workload, formats, seconds=seconds, seed=seed, units=space.profile, progress=tell)
    except MeasurementError as error:
        return None, f"no sensitivity was probed: {error}"
    found = dataclasses.replace(found, file=None)  # a run folder is sent to others; the cache is this user's
    folder.write("sensitivity.json", as_json(found))
    return found, None


def _low_formats(space: SearchSpace) -> tuple[Format, ...]:
    """Return the formats beside FP32 that any decision may take."""
    return tuple(dict.fromkeys(f for d in space.decisions for f in d.formats if f is not Format.FP32))


def _kept(kind: type[T], folder: RunFolder, name: str) -> T | None:
    """Return what an earlier run of the folder found out, or None."""
    path = folder.path / f"{name}.json"
    if not path.exists():
        return None
    data = read_json(path, what=f"{name} profile", error=StudyError)
    return from_json(kind, data, what=f"{name} profile {path}", error=StudyError)


def drop_priors(space: SearchSpace, known: SensitivityProfile | None) -> dict[str, dict[str, Estimate]] | None:
    """Return the drop of each decision in each format: the sum over its units; units that never ran drop nothing.

    A unit of a decision that nothing else is known of leaves that decision's format out.
    """
    if known is None:
        return None
    rows = {(row.unit, row.format): row.drop for row in known.drops}
    idle = set(known.never_ran)
    found: dict[str, dict[str, Estimate]] = {}
    for decision in space.decisions:
        for choice in decision.formats:
            own = [rows.get((unit, choice)) for unit in decision.units if unit not in idle]
            parts = [part for part in own if part is not None]
            if choice is not Format.FP32 and len(parts) == len(own):
                found.setdefault(decision.name, {})[str(choice)] = Estimate(
                    sum(p.value for p in parts), sum(p.low for p in parts), sum(p.high for p in parts), Origin.PREDICTED
                )
    return found


def speed_of(
    workload: Workload,
    space: SearchSpace,
    budget: Budget,
    folder: RunFolder,
    tell: Callable[[Progress], None],
    forward_seconds: float,
    probe: Callable[..., SpeedProfile],
) -> tuple[SpeedProfile | None, str | None]:
    """Time the formats of a space unit by unit, or read what an earlier run of the folder found; None with the reason.

    `speed.json` is written by then. `forward_seconds` is what a forward of one batch takes; `probe` is `probe_speed`,
    here or in a worker.
    """
    formats = _low_formats(space)
    if not formats:
        return None, None
    known = _kept(SpeedProfile, folder, "speed")
    if known and known.fingerprint == space.profile.fingerprint and known.mode is workload.mode:
        return known, None
    try:
        step = forward_seconds * (_BACKWARD if workload.mode is Mode.TRAIN else 1.0)
        seconds = min(_SPEED_SHARE * budget.seconds, _SPEED_STEPS * step)
        found = probe(workload, formats, seconds=seconds, progress=tell)
    except MeasurementError as error:
        return None, f"no unit was timed by itself: {error}"
    folder.write("speed.json", as_json(found))
    return found, None


def time_priors(space: SearchSpace, known: SpeedProfile | None) -> dict[str, dict[str, Estimate]] | None:
    """Return about what each decision takes in each format: the sum over its units that were timed in it."""
    if known is None:
        return None
    timed = {(row.unit, row.format) for row in known.times}
    found: dict[str, dict[str, Estimate]] = {}
    for decision in space.decisions:
        for choice in decision.formats:
            ran = [unit for unit in decision.units if (unit, Format.FP32) in timed]
            if not ran or not all((unit, choice) in timed for unit in ran):
                continue
            parts = [known[unit, choice] for unit in ran]
            value, low, high = (
                max(sum(ends), 0.0) for ends in zip(*((p.value, p.low, p.high) for p in parts), strict=True)
            )
            found.setdefault(decision.name, {})[str(choice)] = Estimate(value, low, high, Origin.PREDICTED)
    return found


def forecast_priors(space: SearchSpace, forecast: Forecast) -> dict[str, dict[str, Estimate]]:
    """Return what each decision's units take in each format on a device that is not here, as predicted."""
    times = {f: forecast.unit_ms(f) for f in dict.fromkeys(f for d in space.decisions for f in d.formats)}
    found: dict[str, dict[str, Estimate]] = {}
    for decision in space.decisions:
        for choice in decision.formats:
            value = max(sum(times[choice].get(unit, 0.0) for unit in decision.units), 1e-6)
            found.setdefault(decision.name, {})[str(choice)] = Estimate(
                value, value / _BORDERS, value * _BORDERS, Origin.PREDICTED
            )
    return found
