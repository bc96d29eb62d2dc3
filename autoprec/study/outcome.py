"""What a search came to: the front, the choice and the verdict, and the evidence that goes into its plan."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from autoprec.plan import Evidence
from autoprec.quantities import DropLimit
from autoprec.records import Confirmed, DeviceProfile, Figure, Measurement, Origin, Standing, Verdict
from autoprec.study.front import measured_front
from autoprec.study.verdict import best_uniform, choose, decide

__all__ = ["Outcome", "evidence", "on_one_clock", "outcome_of", "standing_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Front and verdict of all measurements; `chosen` is an index of `front`, or None for do-nothing."""

    baselines: tuple[Measurement, ...]
    front: tuple[Measurement, ...]
    chosen: int | None
    verdict: Verdict

    @property
    def best(self) -> Measurement | None:
        """The measurement of the plan to use."""
        return None if self.chosen is None else self.front[self.chosen]

    def with_plan(self, path: str) -> Outcome:
        """Return the outcome with the chosen measurement's plan file named."""
        front = tuple(dataclasses.replace(m, plan=path) if m is self.best else m for m in self.front)
        return dataclasses.replace(self, front=front)


def outcome_of(
    measured: Sequence[Measurement],
    baselines: Collection[str],
    limit: DropLimit,
    search_seconds: float,
    confirmed: Sequence[Confirmed] = (),
    unconfirmed: str | None = None,
    beside: Collection[str] = (),
) -> Outcome:
    """Return the outcome of a search.

    Args:
        baselines: names of those of the measurements that are baselines.
        confirmed: plans tried on unseen batches; one that was not shown to be within the limit is not chosen.
        unconfirmed: why nothing was confirmed, where that could not be settled.
        beside: names of all that is no trial: the recommended plan stands with the baselines where the space lacks it,
            but takes a plan file to follow, so that nothing is decided as if it were one of them.
    """
    uniform = best_uniform([m for m in measured if m.name in baselines], limit)
    compared = [_over_uniform(m, uniform) for m in measured]
    bases = tuple(m for m in compared if m.name in baselines)
    front = tuple(measured_front(compared, baselines))
    failed = {one.name for one in confirmed if one.answer != "within"}
    accepted = next((one for one in confirmed if one.answer == "within"), None)
    tried_all = bool(confirmed) and accepted is None and unconfirmed is None
    usable = [m for m in front if m.name not in failed and (accepted is None or m.name == accepted.name)]
    picked = None if tried_all else choose(usable, baselines, limit)
    chosen = None if picked is None else front.index(usable[picked])
    verdict = decide(front, chosen, bases, limit, search_seconds / 3600, confirmed, unconfirmed)
    shown = tuple(m for m in compared if m.name in baselines or m.name in beside)
    return Outcome(baselines=shown, front=front, chosen=chosen, verdict=verdict)


def on_one_clock(measured: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurements with step times on one clock: the median reference step of all of them.

    Each was timed beside the reference in its own minute; only their ratios to it compare.
    """
    known = [m.reference_step_ms for m in measured if m.reference_step_ms is not None]
    if not known:
        return list(measured)
    clock = statistics.median(known)
    return [_with_clock(m, clock) for m in measured]


def standing_of(
    reference: Measurement,
    measured: Sequence[Measurement],
    baselines: Collection[str],
    limit: DropLimit,
    drop_unit: str,
    *,
    beside: Collection[str],
) -> Standing:
    """Return what a search that still runs has so far: as `outcome_of`, with nothing confirmed."""
    _, *known = on_one_clock([reference, *measured])
    front = measured_front(known, baselines)
    return Standing(
        baselines=tuple(m for m in known if m.name in beside),
        front=tuple(front),
        chosen=choose(front, baselines, limit),
        trials=sum(m.name not in beside for m in known),
        limit=str(limit),
        drop_unit=drop_unit,
    )


def _with_clock(found: Measurement, clock: float) -> Measurement:
    if found.speedup is None:
        return found
    interval = found.speedup_ci95 and (clock / found.speedup_ci95[1], clock / found.speedup_ci95[0])
    return dataclasses.replace(found, step_ms=clock / found.speedup, step_ms_ci95=interval)


def _over_uniform(found: Measurement, uniform: Measurement | None) -> Measurement:
    if uniform is None or not uniform.speedup or found.speedup is None:
        return found
    return dataclasses.replace(found, speedup_over_uniform=found.speedup / uniform.speedup)


def evidence(found: Measurement, device: DeviceProfile, *, drop_unit: str, weights_digest: str, seed: int) -> Evidence:
    """Return a measurement's figures as the evidence of its plan."""
    time, memory = found.origin.step_ms, found.origin.peak_bytes
    return Evidence(
        drop=_figure(found.drop, found.drop_ci95, drop_unit, found.origin.drop),
        step_ms=_figure(found.step_ms, found.step_ms_ci95, "ms", time),
        speedup=_figure(found.speedup, found.speedup_ci95, "times FP32", time),
        peak_bytes=_figure(found.peak_bytes, None, "bytes", memory),
        weights_digest=weights_digest,
        versions=dict(device.versions),
        seed=seed,
    )


def _figure(value: float | None, ci95: tuple[float, float] | None, unit: str, origin: Origin | None) -> Figure | None:
    return None if value is None or origin is None else Figure(value=value, ci95=ci95, unit=unit, origin=origin)
