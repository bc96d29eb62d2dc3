"""What a recommendation expects: the peak of memory, and the matmul time against FP32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autoprec.errors import AutoprecError
from autoprec.files import as_json
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.predict.fitting import RESERVE, fit_batch, remedies_for
from autoprec.predict.memory import predict_memory
from autoprec.predict.setup import Checkpointing, Optimizer, Setup, StatePolicy, TrainMethod, states_of
from autoprec.predict.steptime import predict_step
from autoprec.recommender.features import UnitFacts, bandwidth, rate_tflops, step_seconds
from autoprec.records import BatchFit, DeviceProfile, Estimate, MemoryBreakdown, ModelFacts, ModelProfile, Origin

__all__ = ["expected_figures", "memory_figures", "step_figures"]


def memory_figures(
    profile: ModelProfile, plan: Plan, device: DeviceProfile, setup: Setup, model_facts: ModelFacts | None
) -> dict[str, Any]:
    """Return the predicted peak of a step by what holds it, the largest micro-batch, and the peaks of other policies.

    Where the batch does not fit, the figures are those of the micro-batch that does, with gradient accumulation; with
    full checkpointing where that makes all of it fit. `policy` says what is counted.
    """
    size = device.memory_bytes
    fit = _fitted(profile, plan, setup, model_facts, size) if size else None
    found = fit.breakdown if fit else predict_memory(profile, plan, setup, model_facts)
    parts = found.parts
    return {
        "policy": found.policy,
        "parameters": found.parameters,
        "trained_parameters": found.trained_parameters,
        "weights_bytes": parts.weights_bytes,
        "gradients_bytes": sum(unit.gradients_bytes for unit in found.units),
        "optimizer_bytes": parts.optimizer_bytes,
        "total_bytes": found.total_bytes,
        "device_bytes": size,
        "share_of_device": found.total_bytes / size if size else None,
        "peak_at": str(found.moment),
        "breakdown": {f.name: value for f in fields(parts) if (value := getattr(parts, f.name))},
        "checkpointing": found.checkpointing,
        "batch_size": found.batch_size,
        "largest_micro_batch": fit.largest_micro_batch if fit else None,
        "micro_batch": fit.micro_batch if fit else setup.batch_size,
        "accumulation": found.accumulation,
        "over_bytes": (fit.over_bytes or None) if fit else None,
        "remedies": [as_json(remedy) for remedy in fit.remedies] if fit else [],
        "simple_count_bytes": found.simple_bytes,
        "origin": str(found.origin),
        "leaves_out": list(found.leaves_out),
        "alternatives": _alternatives(profile, plan, found, setup, model_facts),
    }


def _fitted(
    profile: ModelProfile, plan: Plan, setup: Setup, model_facts: ModelFacts | None, size_bytes: int
) -> BatchFit:
    """Return how a batch fits a device: as it is, checkpointed where that makes all of it fit, else accumulated.

    Accumulating repeats no work; checkpointing does, so it is also taken where not even one sequence fits without.
    """
    usable = round((1 - RESERVE) * size_bytes)
    found = fit_batch(profile, plan, setup, model_facts, usable, setup.batch_size, advise=False)
    if setup.trains and found.micro_batch != setup.batch_size:
        again = dataclasses.replace(setup, checkpointing=Checkpointing.FULL)
        smaller = fit_batch(profile, plan, again, model_facts, usable, setup.batch_size, advise=False)
        if smaller.micro_batch == setup.batch_size or (smaller.micro_batch and not found.micro_batch):
            found = smaller
    if found.micro_batch:
        return found
    one = dataclasses.replace(setup, batch_size=1, accumulation=found.accumulation)
    remedies = remedies_for(profile, plan, one, model_facts, usable)
    return dataclasses.replace(found, remedies=remedies)


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


def step_figures(
    profile: ModelProfile, plan: Plan, device: DeviceProfile, setup: Setup, model_facts: ModelFacts | None
) -> dict[str, Any]:
    """Return the predicted time of a step of the plan, eager and compiled, beside FP32's and the ambient format's.

    With the largest batch that fits for each, and its tokens a second. `step_reason` says why where no time can be
    predicted: the time model knows GPUs.
    """
    others = {"uniform fp32": Format.FP32, f"uniform {plan.ambient}": plan.ambient}
    plans = {"plan": plan} | {
        name: Plan.uniform(profile, f, device=device, mode=plan.mode) for name, f in others.items()
    }
    figures: dict[str, Any] = {"step_ms": {}, "compiled_step_ms": {}}
    try:
        for name, one in plans.items():
            for key, compiled in (("step_ms", False), ("compiled_step_ms", True)):
                found = predict_step(profile, one, device, setup, model_facts, compiled=compiled)
                figures[key][name] = as_json(found.step_ms)
                if name == "plan" and compiled is (Format.FP8 in plan.formats):  # as it is meant to run
                    figures["spent_ms"] = {str(kind): ms for kind, ms in found.kinds_ms.items()}
                if name == "plan" and not compiled:
                    figures |= {"sustained": dict(found.rates), "doubts": list(found.doubts)}
                    figures["host_bound"] = [str(phase) for phase in found.host_bound]
        figures["at_largest_batch"] = {
            name: _at_largest(profile, one, device, setup, model_facts) for name, one in plans.items()
        }
    except AutoprecError as fault:
        return {"step_ms": None, "step_reason": str(fault)}
    return figures


def _at_largest(
    profile: ModelProfile, plan: Plan, device: DeviceProfile, setup: Setup, model_facts: ModelFacts | None
) -> dict[str, Any]:
    """Return the largest batch that fits the device with a plan, and the tokens a second there; empty where none fits.

    What a plan saves in memory may buy a larger batch, which pays more than its formats where steps are short.
    """
    if device.memory_bytes is None:
        return {}
    alone = dataclasses.replace(setup, batch_size=1, accumulation=1)
    fit = fit_batch(profile, plan, alone, model_facts, round((1 - RESERVE) * device.memory_bytes), advise=False)
    if not fit.micro_batch:
        return {}
    full = dataclasses.replace(alone, batch_size=fit.micro_batch)
    step = predict_step(profile, plan, device, full, model_facts).step_ms
    tokens = 1e3 * fit.micro_batch * setup.seq_len
    rate = Estimate(tokens / step.value, tokens / step.high, tokens / step.low, Origin.PREDICTED)
    return {"batch_size": fit.micro_batch, "tokens_per_s": as_json(rate)}


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


def _alternatives(
    profile: ModelProfile, plan: Plan, found: MemoryBreakdown, setup: Setup, model_facts: ModelFacts | None
) -> list[dict[str, Any]]:
    """Return other ways to hold the states: bytes a parameter of weights, gradients and moments, and the peak."""
    if not setup.trains or setup.method is not TrainMethod.FULL:
        return []
    policies = {
        "fp32, or autocast over fp32 weights": (StatePolicy.FP32, Optimizer.ADAMW),
        "autocast over fp32 weights, 8-bit Adam": (StatePolicy.FP32, Optimizer.ADAMW_8BIT),
        "16-bit weights and gradients, fp32 master copies, Adam in fp32": (StatePolicy.MIXED_MASTER, Optimizer.ADAMW),
        "16-bit weights and gradients, Adam in fp32, no master copies: small updates are lost": (
            StatePolicy.MIXED,
            Optimizer.ADAMW,
        ),
        "bf16 throughout, without master weights: small updates are lost": (StatePolicy.BF16, Optimizer.ADAMW),
    }
    rows = []
    for name, (policy, optimizer) in policies.items():
        other = dataclasses.replace(
            setup,
            policy=policy,
            optimizer=optimizer,
            batch_size=found.batch_size,
            checkpointing=Checkpointing(found.checkpointing),
            accumulation=found.accumulation,
        )
        rows.append(
            {
                "policy": name,
                "bytes_per_parameter": round(states_of(policy, optimizer).total, 2),
                "states_bytes": round(states_of(policy, optimizer).total * profile.parameters),
                "total_bytes": predict_memory(profile, plan, other, model_facts).total_bytes,
            }
        )
    return rows
