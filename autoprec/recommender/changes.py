"""What would change a recommendation: more or fewer tokens a step, another card, another limit; all worked out anew.

Plans for the other conditions come from the same rules, times and peaks from the same models as the recommendation's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from autoprec.catalog import find_device
from autoprec.errors import AutoprecError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.fitting import RESERVE
from autoprec.predict.forecast import speed_ratio
from autoprec.predict.memory import predict_memory
from autoprec.predict.setup import TrainMethod
from autoprec.quantities import DropLimit
from autoprec.recommender.neighbours import Pricing, takes_fp8
from autoprec.records import Estimate, Role, Support
from autoprec.report.figures import format_counts, interval

__all__ = ["Planner", "change_figures"]

#: cards that are rented by the hour in most clouds and notebooks; which of them would change the answer is worked out
_RENTED = ("t4", "l4", "a100-sxm-80gb", "h100-sxm-80gb", "b200", "mi300x")
#: the longest step that is looked at, in tokens; beyond it no single device goes
_MOST_TOKENS = 1 << 20
#: other limits that are tried, as multiples of the one given
_LIMITS = (0.2, 4.0)
_GB = 1e9
_NO_FIT = "one sequence does not fit"

#: a plan of the same model under another condition: device, batch_size or max_drop
Planner = Callable[..., Plan]


def change_figures(
    plan: Plan, pricing: Pricing, planner: Planner, limit: DropLimit, batch_size: int
) -> list[dict[str, Any]]:
    """Return what would change the answer, as {kind, at, text, ...}; empty where nothing that was tried does."""
    found = [*_tokens(plan, pricing), *_limits(plan, planner, limit)]
    return [*found, *_devices(plan, pricing, planner, batch_size)]


def _tokens(plan: Plan, pricing: Pricing) -> Iterator[dict[str, Any]]:
    """Yield from how many tokens a step FP8 pays: where even the low end of its predicted gain is above 1."""
    device, setup = pricing.device, pricing.setup
    if (
        device.supports(Format.FP8) is not Support.NATIVE
        or setup.method is TrainMethod.QLORA
        or plan.ambient is Format.FP32
    ):
        return
    names = [n for n, f in pricing.facts.items() if _inner(f) and takes_fp8(f)]
    if not names:
        return
    wide, narrow = (plan.replace(dict.fromkeys(names, f)) for f in (plan.ambient, Format.FP8))

    def gain(batch: int) -> Estimate:
        one = dataclasses.replace(setup, batch_size=batch)
        return speed_ratio(pricing.step(wide, one, compiled=True), pricing.step(narrow, one, compiled=True))

    try:
        batch = _first(lambda b: gain(b).low > 1, max(1, _MOST_TOKENS // setup.seq_len))
    except AutoprecError:  # no time model of this device
        return
    uses, unit = Format.FP8 in plan.formats, f"{len(names)} units"
    if batch is None:
        if not uses:
            yield _change("tokens", None, f"fp8 pays at no batch: in {unit} it never gains more than its doubt")
        return
    at, ratio = batch * setup.seq_len, gain(batch)
    how = f"predicted {interval(ratio.value, (ratio.low, ratio.high), suffix='x')} over {plan.ambient}, compiled"
    if uses and batch > setup.batch_size:
        mine = gain(setup.batch_size)
        value = interval(mine.value, (mine.low, mine.high), suffix="x")
        text = f"from {at:,} tokens a step fp8 surely pays ({how} there); at these {setup.tokens:,} it is {value}"
        yield _change("tokens", at, text, ratio)
    elif uses and batch > 1:
        yield _change("tokens", at, f"below {at:,} tokens a step fp8 no longer surely pays ({how} there)", ratio)
    elif not uses and batch > setup.batch_size:
        yield _change("tokens", at, f"from {at:,} tokens a step fp8 pays in {unit}: {how}", ratio)
    elif not uses:
        here = gain(setup.batch_size)
        why = plan.unit(names[0]).reason.rpartition("; ")[2]
        how = interval(here.value, (here.low, here.high), suffix="x")
        text = f"fp8 in {unit} would be {how} as fast over {plan.ambient} as predicted; why it is left out: {why}"
        yield _change("formats", None, text, here)


def _inner(fact: Any) -> bool:
    return fact.unit.role in (Role.ATTENTION, Role.FFN) and fact.block is not None and not fact.edge


def _first(holds: Callable[[int], bool], most: int) -> int | None:
    """Return the first count for which something holds that then goes on to hold; None up to `most`."""
    high = 1
    while not holds(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _limits(plan: Plan, planner: Planner, limit: DropLimit) -> Iterator[dict[str, Any]]:
    """Yield a tighter and a looser limit where they lead to another plan."""
    for times in _LIMITS:
        other = dataclasses.replace(limit, value=limit.value * times)
        changed = planner(max_drop=other).diff(plan).units
        if changed and other != limit:
            theirs = format_counts({name: pair[0] for name, pair in changed.items() if pair[0] is not None})
            yield _change("max_drop", str(other), f"with --max-drop {other}: {theirs} in the units that differ")


def _devices(plan: Plan, pricing: Pricing, planner: Planner, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield the rented cards on which the plan, or how the batch fits, would be another."""
    here = _fits(plan, pricing, batch_size)
    for name in _RENTED:
        device = find_device(name)
        if device.name == pricing.device.name:
            continue
        other = dataclasses.replace(
            pricing, device=device, setup=dataclasses.replace(pricing.setup, device_kind=device.kind)
        )
        its = planner(device=device)
        there = _fits(its, other, batch_size)
        if _kind(its) == _kind(plan) and there == here:
            continue
        words = [_words(its) if _kind(its) != _kind(plan) else "the same formats"]
        if there and there != here:
            words.append(there)
        change = _change("device", device.name, f"on {device.name}: {', '.join(words)}")
        runs = not there.startswith(_NO_FIT)
        yield change | (_slower(plan, its, pricing, other, change["text"]) if runs else {})


def _slower(plan: Plan, its: Plan, pricing: Pricing, other: Pricing, text: str) -> dict[str, Any]:
    """Return the text with the predicted step over the one here, where both have a time model."""
    try:
        here = pricing.step(plan, compiled=Format.FP8 in plan.formats)
        ratio = other.step(its, compiled=Format.FP8 in its.formats).step_ms.value / here.step_ms.value
    except AutoprecError:
        return {}
    return {"text": f"{text}; a step takes {ratio:.2g} times as long, predicted", "step_ratio": ratio}


def _fits(plan: Plan, pricing: Pricing, batch_size: int) -> str:
    """Say how a batch fits: '' where nothing is known of the device's memory."""
    size = pricing.device.memory_bytes
    if size is None:
        return ""
    usable = (1 - RESERVE) * size

    def peak(batch: int) -> int:
        setup = dataclasses.replace(pricing.setup, batch_size=batch, accumulation=1)
        return predict_memory(pricing.profile, plan, setup, pricing.model_facts).total_bytes

    if peak(batch_size) <= usable:
        return "all of the batch fits at once"
    needs = peak(1)
    if needs <= usable:
        return "the batch fits in parts"
    return f"{_NO_FIT} ({needs / _GB:.0f} of {size / _GB:.0f} GB)"


def _kind(plan: Plan) -> tuple[object, ...]:
    """Return what of a plan one would call another answer."""
    return (plan.ambient, plan.formats, plan.fp8_recipe, plan.grad_scaler is not None)


def _words(plan: Plan) -> str:
    scaler = " with a gradient scaler" if plan.grad_scaler is not None else ""
    tf32 = ", tf32 on" if plan.tf32 and plan.ambient is Format.FP32 else ""
    return f"{format_counts(plan.assignment)}{scaler}{tf32}"


def _change(kind: str, at: int | str | None, text: str, speedup: Estimate | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind, "at": at, "text": text}
    return found if speedup is None else found | {"speedup": as_json(speedup)}
