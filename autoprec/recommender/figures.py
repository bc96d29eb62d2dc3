"""What a recommendation expects: the memory of the states, and the matmul time against FP32."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.recommender.features import UnitFacts, bandwidth, rate_tflops, step_seconds
from autoprec.records import DeviceProfile, Estimate, Mode, ModelProfile, Origin, Role

__all__ = ["Method", "adapter_parameters", "expected_figures", "memory_figures"]

#: rank of the adapters that LoRA's memory is counted with (the default of many recipes, not of peft, which is 8)
ADAPTER_RANK = 16
_ADAM_BYTES = 8  # two moments in FP32
_NF4_BYTES = 0.5


class Method(StrEnum):
    """What is trained."""

    FULL = "full"  #: every weight
    LORA = "lora"  #: adapters beside a frozen base
    QLORA = "qlora"  #: adapters beside a frozen base in 4 bits


def memory_figures(
    profile: ModelProfile, facts: Mapping[str, UnitFacts], plan: Plan, device: DeviceProfile, method: Method
) -> dict[str, Any]:
    """Return the bytes of weights, gradients and optimizer states under the plan, and under other policies.

    Not counted, and said in `leaves_out`: activations, logits, temporary casts and what the framework itself takes.
    """
    count = profile.parameters
    trained = count if method is Method.FULL else adapter_parameters(facts)
    if plan.mode is Mode.INFER:
        policy, weights, trained = "fp32 weights, forward only", 4.0 * count, 0
    elif method is Method.FULL:
        policy, weights = "fp32 weights under the plan, fp32 gradients, Adam in fp32", 4.0 * count
    else:
        policy, weights = _frozen_base(profile, facts, plan, method, trained)
    gradients, optimizer = 4 * trained, _ADAM_BYTES * trained
    total = round(weights) + gradients + optimizer
    size = device.memory_bytes
    return {
        "policy": policy,
        "parameters": count,
        "trained_parameters": trained,
        "weights_bytes": round(weights),
        "gradients_bytes": gradients,
        "optimizer_bytes": optimizer,
        "total_bytes": total,
        "device_bytes": size,
        "share_of_device": total / size if size else None,
        "origin": str(Origin.PREDICTED),
        "leaves_out": ["activations", "logits", "temporary casts", "the framework's own memory"],
        "alternatives": _alternatives(count) if plan.mode is Mode.TRAIN and method is Method.FULL else [],
    }


def adapter_parameters(facts: Mapping[str, UnitFacts]) -> int:
    """Return the weights of adapters of rank 16 on every linear layer of attention and FFN."""
    leaves = [leaf for f in facts.values() if f.unit.role in (Role.ATTENTION, Role.FFN) for leaf in f.gemms]
    return sum(ADAPTER_RANK * (leaf.inputs + leaf.outputs) for leaf in leaves)


def expected_figures(plan: Plan, facts: Mapping[str, UnitFacts], device: DeviceProfile, tokens: int) -> dict[str, Any]:
    """Return how many times less matmul time the plan needs than FP32 without TF32, with its origin and its limits."""
    needed: set[str] = {Format.FP32, *(plan.unit(name).format for name, f in facts.items() if f.gemms)}
    if plan.tf32 and plan.ambient is Format.FP32:
        needed.add("tf32")
    rates = {name: rate for name in sorted(needed) if (rate := rate_tflops(device, name)) is not None}
    figure: dict[str, Any] = {
        "against": "fp32 with tf32 off",
        "tokens_per_step": tokens,
        "rates_tflops": {n: {"value": r.value, "origin": str(r.origin)} for n, r in rates.items()},
        "leaves_out": [
            "attention scores, norms, softmax and other memory-bound work, so a whole step gains less",
            "casts at borders between formats",
            "the optimizer step",
            "data loading",
        ],
    }
    if missing := sorted(needed - set(rates)):
        figure["matmul_speedup"] = None
        figure["reason"] = f"no rate is known for {', '.join(missing)} on {device.name}"
        return figure
    figure["matmul_speedup"] = _speedup(plan, facts, device, tokens, rates)
    return figure


def _speedup(
    plan: Plan,
    facts: Mapping[str, UnitFacts],
    device: DeviceProfile,
    tokens: int,
    rates: Mapping[str, Estimate],
) -> dict[str, Any]:
    """Return the ratio of matmul times: from middle rates, and its extremes from the ends of their intervals."""
    fp32 = {name: Format.FP32 for name in facts}
    moved = bandwidth(device)

    def seconds(formats: Mapping[str, Format], end: str, tf32: bool, recipe: Fp8Recipe | None) -> float:
        chosen = {name: float(getattr(rate, end)) for name, rate in rates.items()}
        return step_seconds(
            facts, formats, chosen, tokens=tokens, mode=plan.mode, bytes_per_s=moved, tf32=tf32, recipe=recipe
        )

    assignment, tf32 = plan.assignment, "tf32" in rates
    if all(choice is Format.FP32 for name, choice in assignment.items() if facts[name].gemms) and not tf32:
        value = low = high = 1.0
    else:
        value, low, high = (
            seconds(fp32, reference, False, None) / seconds(assignment, own, tf32, plan.fp8_recipe)
            for reference, own in (("value", "value"), ("high", "low"), ("low", "high"))
        )
    measured = all(rate.origin is Origin.MEASURED for rate in rates.values())
    return {
        "value": value,
        "low": low,
        "high": high,
        "origin": str(Origin.PREDICTED if measured else Origin.DATASHEET),
    }


def _frozen_base(
    profile: ModelProfile, facts: Mapping[str, UnitFacts], plan: Plan, method: Method, trained: int
) -> tuple[str, float]:
    """Return the policy and the bytes of a frozen base with fp32 adapters."""
    width = 2 if plan.ambient is not Format.FP32 else 4
    stored = f"frozen base in {plan.ambient}"
    if method is Method.LORA:
        policy = f"{stored}, fp32 adapters of rank {ADAPTER_RANK} with gradients and Adam in fp32"
        return policy, width * profile.parameters + 4.0 * trained
    # 4-bit loaders leave embeddings and the output head alone; the scales of NF4's blocks are left out here
    packed = sum(f.parameters for f in facts.values() if f.unit.role is not Role.LM_HEAD)
    policy = (
        f"frozen base in NF4 (embeddings, norms and head in {plan.ambient}), "
        f"fp32 adapters of rank {ADAPTER_RANK} with gradients and Adam in fp32"
    )
    return policy, _NF4_BYTES * packed + width * (profile.parameters - packed) + 4.0 * trained


def _alternatives(count: int) -> list[dict[str, Any]]:
    """Return other ways to hold the states, by bytes a parameter: weights, gradients, Adam's moments."""
    policies = {
        "fp32, or autocast over fp32 weights": 4 + 4 + 8,
        "autocast over fp32 weights, 8-bit Adam": 4 + 4 + 2,
        "bf16 weights and gradients, Adam in fp32": 2 + 2 + 8,
        "bf16 throughout, without master weights: small updates are lost": 2 + 2 + 4,
    }
    return [{"policy": p, "bytes_per_parameter": b, "total_bytes": b * count} for p, b in policies.items()]
