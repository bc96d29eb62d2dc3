"""Why each unit of a plan has its format: what it drops and takes, and what another format would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoprec.formats import Format
from autoprec.quantities import number
from autoprec.records import Estimate, Explained, Origin, Removal, SensitivityProfile, Step
from autoprec.study.sampler import Believed
from autoprec.study.space import SearchSpace

__all__ = ["explain"]

#: gains of time below this share of a step are none
_NOTHING = 1e-3


def explain(
    space: SearchSpace,
    assignment: Mapping[str, Format],
    believed: Mapping[str, Mapping[Format, Believed]],
    known: SensitivityProfile | None,
    *,
    limit: float,
    step_ms: float,
    drop_unit: str = "nats",
    vetoes: Sequence[Removal] = (),
) -> tuple[Explained, ...]:
    """Return one row a decision of the space, in its order; empty where the space does not hold the assignment.

    Args:
        believed: drops and times of decisions by format, learnt from all trials.
        known: what the probe said before.
        limit: of the drop; step_ms: of the plan.
        vetoes: formats that units are kept from, which are no wider or narrower step.
    """
    choices = space.choices(assignment)
    if choices is None:
        return ()
    now = {name: Format(choice) for name, choice in choices.items()}
    drops = {name: believed[name][choice].drop.value for name, choice in now.items()}
    saved = {name: -believed[name][choice].time.value for name, choice in now.items()}
    total, gain = sum(drops.values()), sum(max(s, 0.0) for s in saved.values())
    found = []
    for decision in space.decisions:
        name, choice = decision.name, now[decision.name]
        steps = {f: _step(believed[name], choice, f) for f in decision.formats}
        barred = {v.format: v.reason for v in vetoes if v.unit in decision.units and v.format is not choice}
        order = sorted(set(decision.formats) - barred.keys(), key=list(Format).index)
        at = order.index(choice)
        wider = steps[order[at - 1]] if at > 0 else None
        narrower = steps[order[at + 1]] if at + 1 < len(order) else None
        found.append(
            Explained(
                unit=name,
                format=choice,
                probed=_probed(known, decision.units, choice),
                drop=believed[name][choice].drop,
                drop_share=drops[name] / total if total > 0 else 0.0,
                time_ms=believed[name][choice].time,
                time_share=max(saved[name], 0.0) / gain if gain > 0 else 0.0,
                wider=wider,
                narrower=narrower,
                reason="; ".join(
                    [
                        _reason(choice, wider, narrower, total, limit, _NOTHING * step_ms, drop_unit),
                        *(f"never {f}: {why}" for f, why in barred.items()),
                    ]
                ),
            )
        )
    return tuple(found)


def _step(own: Mapping[Format, Believed], now: Format, other: Format) -> Step:
    return Step(
        format=other,
        drop=own[other].drop.value - own[now].drop.value,
        time_ms=own[other].time.value - own[now].time.value,
    )


def _probed(known: SensitivityProfile | None, units: tuple[str, ...], choice: Format) -> Estimate | None:
    """Return what the probe said of all units of a decision; None where it said nothing of one."""
    if known is None:
        return None
    try:
        parts = [known[unit, choice] for unit in units if unit not in known.never_ran]
    except KeyError:
        return None
    return Estimate(
        sum(p.value for p in parts), sum(p.low for p in parts), sum(p.high for p in parts), Origin.PREDICTED
    )


def _reason(
    choice: Format, wider: Step | None, narrower: Step | None, total: float, limit: float, none_ms: float, unit: str
) -> str:
    """Say in a sentence why not wider and why not narrower."""
    if narrower is None and wider is None:
        return f"{choice} is its only format"
    parts = []
    if wider is not None:
        drop = f"{number(-wider.drop)} {unit} of drop"
        if wider.time_ms <= none_ms:
            parts.append(f"{wider.format} would cost no time and save {drop}")
        else:
            parts.append(f"{wider.format} would cost {number(wider.time_ms)} ms to save {drop}")
    if narrower is not None:
        if narrower.time_ms >= -none_ms:
            parts.append(f"{narrower.format} would save no time")
        elif total + narrower.drop > limit:
            parts.append(f"{narrower.format} would save {number(-narrower.time_ms)} ms and pass the limit")
        else:
            drop = f"{number(narrower.drop)} {unit} more drop"
            parts.append(f"{narrower.format} would save {number(-narrower.time_ms)} ms for {drop}")
    return "; ".join(parts)
