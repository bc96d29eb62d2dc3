"""The plans next to a recommended one: one step safer, one step faster, and what each costs or gains.

The steps are those that people take by hand: FP8 back to 16 bits, the output head or the ends in FP32; FP8 in units
that were left out, 16 bits where it was FP32. What a step does to the quality cannot be told from facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoprec.errors import AutoprecError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.forecast import speed_ratio
from autoprec.predict.memory import predict_memory
from autoprec.predict.setup import Setup, TrainMethod
from autoprec.predict.steptime import StepTime, predict_step
from autoprec.recommender.advice import overflows_fp16
from autoprec.recommender.features import UnitFacts
from autoprec.records import DeviceProfile, ModelFacts, ModelProfile, Role, Support

__all__ = ["Pricing", "neighbour_figures", "takes_fp8"]

#: a predicted gain below this is no step worth naming
_LEAST_GAIN = 1.01
#: torch._scaled_mm takes sizes that divide by this
_FP8_MULTIPLE = 16

Step = tuple[str, Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """What plans of one model are priced for."""

    profile: ModelProfile
    facts: Mapping[str, UnitFacts]
    device: DeviceProfile
    setup: Setup
    model_facts: ModelFacts | None

    def step(self, plan: Plan, setup: Setup | None = None, *, compiled: bool = False) -> StepTime:
        """Return the predicted step of a plan.

        Raises:
            DeviceError: there is no time model of the device, or it lacks a format.
        """
        return predict_step(
            self.profile, plan, self.device, setup or self.setup, self.model_facts, compiled=compiled, crowding=False
        )


def neighbour_figures(plan: Plan, pricing: Pricing) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the step to the safer side and the one to the faster, each with `what` (None: nothing further) and why.

    `speedup` is over the plan, below 1 where it costs time; None where no time can be predicted.
    """
    safer = next(_safer(plan, pricing), None)
    if safer is None:
        slow = {"what": None, "reason": "nothing is safer than fp32 with tf32 off"}
    else:
        slow = _figures(safer, plan, pricing)
    return slow, _faster_figures(plan, pricing)


def _faster_figures(plan: Plan, pricing: Pricing) -> dict[str, Any]:
    tried = 0
    for step in _faster(plan, pricing):
        found = _figures(step, plan, pricing)
        tried += 1
        if found["speedup"] is None:
            return {"what": None, "reason": f"not known from facts: {found['reason']}; autoprec search measures it"}
        if found["speedup"]["value"] >= _LEAST_GAIN:
            return found
    reason = "no further format is native here" if not tried else "no narrower format gains 1 % as predicted"
    return {"what": None, "reason": reason}


def takes_fp8(fact: UnitFacts) -> bool:
    """Say whether a unit's matmuls can run in FP8 at all: there are some, and all sizes divide by 16."""
    sizes = [size for leaf in fact.gemms for size in (leaf.inputs, leaf.outputs)]
    return Format.FP8 in fact.unit.formats and bool(sizes) and all(size % _FP8_MULTIPLE == 0 for size in sizes)


def _safer(plan: Plan, pricing: Pricing) -> Iterator[Step]:
    """Yield steps to wider formats, the smallest first."""
    around = plan.ambient
    narrow = [u for u in plan.units if u.format is Format.FP8]
    attention = [u.name for u in narrow if u.role is Role.ATTENTION]
    if attention and len(attention) < len(narrow):
        yield f"attention of {len(attention)} blocks back to {around}", _changed(plan, attention, around)
    elif narrow:
        yield f"all {len(narrow)} fp8 units back to {around}", _changed(plan, [u.name for u in narrow], around)
    low = {u.name for u in plan.units if u.format in (Format.BF16, Format.FP16)}
    heads = [u.name for u in plan.units if u.role is Role.LM_HEAD and u.name in low]
    if heads:
        yield f"{heads[0]} in {_wide(plan)}", _changed(plan, heads, Format.FP32)
    ends = [name for name, fact in pricing.facts.items() if fact.edge and name in low]
    if ends and len(ends) < len(low):
        yield f"first and last block in {_wide(plan)}", _changed(plan, ends, Format.FP32)
    if plan.ambient is not Format.FP32:
        tf32 = pricing.device.tf32.support is Support.NATIVE
        wide = _uniform(plan, pricing, Format.FP32, tf32=tf32)
        yield f"everything in fp32{', tf32 on' if tf32 else ''}", wide
    elif plan.tf32:
        yield "tf32 off", _uniform(plan, pricing, Format.FP32)


def _faster(plan: Plan, pricing: Pricing) -> Iterator[Step]:
    """Yield steps to narrower formats that are native, the least risky first."""
    device = pricing.device
    low = device.ambient
    if plan.ambient is Format.FP32:
        if not plan.tf32 and device.tf32.support is Support.NATIVE:
            yield "tf32 on", _uniform(plan, pricing, Format.FP32, tf32=True)
        scaled = low is not Format.FP16 or not pricing.setup.trains or device.kind in ("cuda", "xpu")
        if low is not Format.FP32 and scaled and not _hazard(plan, low):
            yield f"matmuls in {low}", _uniform(plan, pricing, low, tf32=plan.tf32)
        return
    wide = [u.name for u in plan.units if u.format is Format.FP32 and u.role is not Role.EMBEDDING]
    if wide and not _hazard(plan, plan.ambient):
        yield f"{_units(wide)} from fp32 to {plan.ambient}", _changed(plan, wide, plan.ambient)
    if device.supports(Format.FP8) is not Support.NATIVE or pricing.setup.method is TrainMethod.QLORA:
        return
    for what, names in _left_out(plan, pricing.facts):
        yield f"fp8 in {what}", _changed(plan, names, Format.FP8)


def _left_out(plan: Plan, facts: Mapping[str, UnitFacts]) -> Iterator[tuple[str, list[str]]]:
    """Yield groups of units that could take FP8 and do not."""
    free = {n: f for n, f in facts.items() if takes_fp8(f) and plan.unit(n).format is not Format.FP8}
    inner = {n: f for n, f in free.items() if f.block is not None and not f.edge}
    for role, word in ((Role.FFN, "the FFN"), (Role.ATTENTION, "the attention")):
        names = [n for n, f in inner.items() if f.unit.role is role]
        if names:
            yield f"{word} of {len(names)} blocks", names
    ends = [n for n, f in free.items() if f.edge and f.unit.role in (Role.FFN, Role.ATTENTION)]
    if ends:
        yield f"first and last block too, which long runs keep in 16 bits ({_units(ends)})", ends
    heads = [n for n, f in free.items() if f.unit.role is Role.LM_HEAD]
    if heads:
        yield f"{heads[0]}, which published runs keep in 16 bits", heads


def _hazard(plan: Plan, low: Format) -> bool:
    return low is Format.FP16 and overflows_fp16(plan.model.class_name)


def _wide(plan: Plan) -> str:
    return "fp32, multiplied in tf32" if plan.tf32 else "fp32"


def _units(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} units"


def _changed(plan: Plan, names: list[str], choice: Format) -> Plan:
    return plan.replace(dict.fromkeys(names, choice))


def _uniform(plan: Plan, pricing: Pricing, choice: Format, *, tf32: bool = False) -> Plan:
    return Plan.uniform(pricing.profile, choice, device=pricing.device, mode=plan.mode, tf32=tf32)


def _figures(step: Step, plan: Plan, pricing: Pricing) -> dict[str, Any]:
    what, other = step
    figures: dict[str, Any] = {
        "what": what,
        "units": len(plan.diff(other).units),
        "step_ms": None,
        "speedup": None,
        "peak_bytes": predict_memory(pricing.profile, other, pricing.setup, pricing.model_facts).total_bytes,
        "drop": "not known from facts: autoprec search or verify measures it",
    }
    # casts of FP8 must be fused, so a plan with it is compiled; what it is compared with is, too
    compiled = Format.FP8 in plan.formats | other.formats
    try:
        mine, theirs = pricing.step(plan, compiled=compiled), pricing.step(other, compiled=compiled)
    except AutoprecError as fault:
        return figures | {"reason": str(fault)}
    return figures | {
        "step_ms": as_json(theirs.step_ms),
        "speedup": as_json(speed_ratio(mine, theirs)),
        "compiled": compiled,
    }
