"""From a measured front to one sentence to act on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from autoprec.probe.pacing import SAME
from autoprec.quantities import DropLimit, number
from autoprec.records import Confirmed, Measurement, Verdict, VerdictDecision
from autoprec.report.figures import drop_unit
from autoprec.study.front import feasible

__all__ = ["REFERENCE", "best_uniform", "choose", "decide", "wanted"]

#: the baseline that is the reference itself; its speedup is noise, whatever its interval says
REFERENCE = "uniform fp32"


def best_uniform(baselines: Sequence[Measurement], limit: DropLimit) -> Measurement | None:
    """Return the fastest feasible uniform baseline within the limit."""
    usable = [m for m in baselines if m.name.startswith("uniform") and feasible(m) and _within(m, limit)]
    return min(usable, key=_step, default=None)


def choose(front: Sequence[Measurement], baselines: Collection[str], limit: DropLimit) -> int | None:
    """Return the index of the member of the front to use, or None where none beats the reference's speed.

    The fastest within the limit; but a baseline of the front whose time is the same is taken instead, because it
    needs no plan file to follow.
    """
    usable = [i for i, m in enumerate(front) if _within(m, limit) and _beats_reference(m) and m.name != REFERENCE]
    if not usable:
        return None
    fastest = min(usable, key=lambda i: _step(front[i]))
    plain = [i for i in usable if front[i].name in baselines and _step(front[i]) <= SAME * _step(front[fastest])]
    return min(plain, key=lambda i: _step(front[i])) if plain else fastest


def wanted(front: Sequence[Measurement], baselines: Collection[str], limit: DropLimit) -> Iterator[Measurement]:
    """Yield the members of the front that would be chosen, each if all before it were found to be too bad."""
    left = list(front)
    while (index := choose(left, baselines, limit)) is not None:
        yield left.pop(index)


def decide(
    front: Sequence[Measurement],
    chosen: int | None,
    baselines: Sequence[Measurement],
    limit: DropLimit,
    search_hours: float,
    confirmed: Sequence[Confirmed] = (),
    unconfirmed: str | None = None,
) -> Verdict:
    """Return the verdict of a search that took `search_hours`; `unconfirmed` says why nothing was confirmed."""
    uniform = best_uniform(baselines, limit)
    named = uniform.name if uniform else None
    if chosen is None:
        why = f"no plan measured is faster than FP32 by more than its noise with a drop within {limit}"
        if confirmed:
            tried = "; ".join(f"{one.name}: {one.reason}" for one in confirmed)
            why = f"no plan was shown to keep {limit} on unseen batches ({tried})"
        elif len(baselines) > 1 and all(m.step_ms is None for m in (*baselines, *front) if m.name != REFERENCE):
            why = "every plan but FP32 is far slower here, or cannot run (for another device: --device NAME)"
        return Verdict(
            decision=VerdictDecision.DO_NOTHING,
            text=f"Do nothing: {why}.",
            best_uniform=named,
            break_even_hours=None,
        )
    best = front[chosen]
    unit, percent = drop_unit((*baselines, *front)), number(best.drop_percent or 0.0, 2)
    figures = f"{_ratio(best)} as fast as FP32, drop {number(best.drop or 0.0)} {unit} ({percent} %, limit {limit})"
    figures += _confirmation(best, confirmed, unconfirmed, unit)
    if best.name in {m.name for m in baselines}:
        return Verdict(
            decision=VerdictDecision.USE_UNIFORM,
            text=f"Use {best.name}: {figures}. No per-layer plan within the limit is faster by more than noise.",
            best_uniform=named,
            break_even_hours=None,
        )
    gain = _step(uniform) / _step(best) if uniform else None
    real = gain is not None and gain > SAME and uniform is not None and _clearly_faster(best, uniform)
    beside = _beside(best, uniform, gain, real)
    return Verdict(
        decision=VerdictDecision.USE_PLAN,
        text=f"Use plan.json: {figures}; {beside}.",
        best_uniform=named,
        break_even_hours=search_hours / (1 - 1 / gain) if real and gain is not None else None,
    )


def _confirmation(best: Measurement, confirmed: Sequence[Confirmed], unconfirmed: str | None, unit: str) -> str:
    found = next((one for one in confirmed if one.name == best.name and one.answer == "within"), None)
    if found is not None and found.drop is not None and found.high is not None:
        drop, most = number(found.drop), number(found.high)
        return f", confirmed on {found.batches} unseen batches (drop {drop} {unit}, at most {most})"
    return f" ({unconfirmed})" if unconfirmed else ""


def _beside(best: Measurement, uniform: Measurement | None, gain: float | None, real: bool) -> str:
    if uniform is None or gain is None:
        return "no uniform plan is within the limit"
    if real:
        return f"{gain:.2f} times as fast as {uniform.name}, the best uniform plan"
    if uniform.drop is not None and best.drop is not None and best.drop < uniform.drop:
        return f"as fast as {uniform.name} within noise, with {_share(best.drop, uniform.drop)} of its drop"
    return f"not faster than {uniform.name} by more than noise"


def _share(drop: float, other: float) -> str:
    return f"{100 * drop / other:.0f} %" if other > 0 else "none"


def _ratio(best: Measurement) -> str:
    low_high = f" ({best.speedup_ci95[0]:.2f}–{best.speedup_ci95[1]:.2f})" if best.speedup_ci95 else ""
    return f"{best.speedup or 0.0:.2f}{low_high} times"


def _within(measurement: Measurement, limit: DropLimit) -> bool:
    return (
        measurement.drop is not None
        and measurement.drop_percent is not None
        and limit.allows(measurement.drop, measurement.drop_percent)
    )


def _beats_reference(measurement: Measurement) -> bool:
    """Say whether the pairs of steps show the plan to be faster; without that, whether its speedup passes 'same'."""
    if measurement.pace is not None:
        return measurement.pace == "faster"
    if measurement.speedup_ci95 is not None:
        return measurement.speedup_ci95[0] > 1.0
    return (measurement.speedup or 0.0) > SAME


def _clearly_faster(one: Measurement, other: Measurement) -> bool:
    if one.speedup_ci95 is None or other.speedup_ci95 is None:
        return False
    return one.speedup_ci95[0] > other.speedup_ci95[1]


def _step(measurement: Measurement) -> float:
    return measurement.step_ms if measurement.step_ms is not None else float("inf")
