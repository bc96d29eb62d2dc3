"""How much memory a step needs, before anything is run: weights, states, activations and what lives for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoprec.errors import UsageError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.anatomy import Part, operations
from autoprec.predict.blocks import Op
from autoprec.predict.describing import describe
from autoprec.predict.setup import (
    Adapters,
    Attention,
    Checkpointing,
    Loss,
    Optimizer,
    Setup,
    Sharding,
    StatePolicy,
    States,
    TrainMethod,
    choice_of,
    states_of,
    stored_policy,
)
from autoprec.predict.shape import Shape
from autoprec.predict.timeline import Fixed, moments
from autoprec.records import MemoryBreakdown, Mode, ModelFacts, ModelProfile, UnitMemory

__all__ = ["memory_bytes", "predict_memory", "setup_of", "simple_count"]

#: CUDA's context with the kernels of a training step, torch 2.1 with lazy loading: 0.47 to 0.92 GiB
#: (stas00/ml-engineering, debug/pytorch.md and training/performance); the middle
_CONTEXT_BYTES = {"cuda": round(0.7 * 2**30)}
#: the simple counts of teaching material: weights, gradients, two moments
_SIMPLE = {StatePolicy.FP32: 4 + 4 + 8, StatePolicy.MIXED: 2 + 2 + 8}
_LEAVES_OUT = (
    "fragmentation of the allocator",
    "buffers of communication between devices",
    "workspaces of matmul libraries",
    "the batch itself",
)


def memory_bytes(
    model_or_id: Any,
    plan_or_format: Plan | Format | str = Format.BF16,
    batch_size: int = 8,
    seq_len: int = 512,
    mode: Mode | str = "train",
    optimizer: Optimizer | str | None = "adamw",
    *,
    facts: ModelFacts | None = None,
    **choices: Any,
) -> MemoryBreakdown:
    """Predict the highest memory of one step on one device, by what holds it and by unit.

    Args:
        model_or_id: a `ModelProfile`, an `nn.Module`, or a name whose configuration is read and nothing else.
        plan_or_format: a plan, or a format for `Plan.uniform`.
        batch_size: sequences a micro-batch on one device.
        seq_len: tokens a sequence; of an image, its patches and class token.
        mode: train (forward, backward, optimizer step) or infer (forward).
        optimizer: `adamw`, `adamw-foreach`, `adamw-8bit`, `adamw-bf16-sr`, `sgd`, `sgd-momentum`, or None.
        facts: the model's configuration; without it heads are taken to be 64 wide.
        choices: `method` (full, lora, qlora), `policy` (fp32, mixed, mixed-master, bf16; by default what the plan
            stores), `checkpointing` (none, selective, full), `attention` (sdpa, flash, eager), `loss` (plain, narrow,
            fused), `sharding` (none, zero1, zero2, zero3, fsdp) over `devices`, `accumulation`, `dropout`,
            `adapter_rank`, `adapters` (all-linear, query-value), `double_quant`, `packed_inputs` (by 4-bit layers),
            `cache` (format of the KV cache in infer mode, or None), `device_kind` (whose context is counted).

    Returns:
        All figures in bytes, of origin predicted.

    Raises:
        UsageError: a batch, sequence or count below 1, or a choice that does not exist, with the closest.
        ModelError: the model cannot be found or read.
        PlanError: no such format, or a plan of another model.
    """
    profile, known = describe(model_or_id)
    plan = plan_or_format
    if not isinstance(plan, Plan):
        plan = Plan.uniform(profile, plan, mode=choice_of(Mode, mode, "mode"))
    setup = setup_of(plan, batch_size, seq_len, mode, optimizer, **choices)
    return predict_memory(profile, plan, setup, facts or known)


def setup_of(
    plan: Plan,
    batch_size: int,
    seq_len: int,
    mode: Mode | str = "train",
    optimizer: Optimizer | str | None = "adamw",
    *,
    method: TrainMethod | str = "full",
    policy: StatePolicy | str | None = None,
    checkpointing: Checkpointing | str = "none",
    attention: Attention | str = "sdpa",
    loss: Loss | str = "plain",
    sharding: Sharding | str = "none",
    devices: int = 1,
    accumulation: int = 1,
    dropout: bool = False,
    adapter_rank: int = 16,
    adapters: Adapters | str = "all-linear",
    double_quant: bool = False,
    packed_inputs: bool = False,
    cache: Format | str | None = "auto",
    device_kind: str = "cuda",
) -> Setup:
    """Return the setup that some words name; arguments and errors as in `memory_bytes`."""
    counts = {"batch_size": batch_size, "seq_len": seq_len, "devices": devices, "accumulation": accumulation}
    for name, value in (counts | {"adapter_rank": adapter_rank}).items():
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    step = choice_of(Mode, mode, "mode")
    keeper = None if optimizer is None or step is Mode.INFER else choice_of(Optimizer, optimizer, "optimizer")
    stored = stored_policy(plan, keeper) if policy is None else choice_of(StatePolicy, policy, "policy")
    held = None
    if step is Mode.INFER and cache is not None:
        held = plan.ambient if cache == "auto" else choice_of(Format, cache, "format")
    return Setup(
        mode=step,
        batch_size=batch_size,
        seq_len=seq_len,
        method=choice_of(TrainMethod, method, "method"),
        policy=stored,
        optimizer=keeper,
        checkpointing=choice_of(Checkpointing, checkpointing, "checkpointing"),
        attention=choice_of(Attention, attention, "attention"),
        loss=choice_of(Loss, loss, "loss"),
        sharding=choice_of(Sharding, sharding, "sharding"),
        devices=devices,
        accumulation=accumulation,
        dropout=dropout,
        adapter_rank=adapter_rank,
        adapters=choice_of(Adapters, adapters, "choice of adapters"),
        double_quant=double_quant,
        packed_inputs=packed_inputs,
        cache=held,
        device_kind=device_kind,
    )


def predict_memory(profile: ModelProfile, plan: Plan, setup: Setup, facts: ModelFacts | None = None) -> MemoryBreakdown:
    """Predict the highest memory of a step; a pure function of its arguments."""
    shape = Shape(profile, plan, setup, facts)
    parts = operations(shape)
    units = _units(shape, parts, setup)
    fixed = _fixed(shape, units, setup)
    found = moments(parts, fixed, trains=setup.trains, checkpointing=setup.checkpointing)
    worst = max(found, key=lambda moment: found[moment].total_bytes)
    return MemoryBreakdown(
        model_id=profile.model_id,
        mode=setup.mode,
        policy=_sentence(setup, plan),
        batch_size=setup.batch_size,
        seq_len=setup.seq_len,
        devices=setup.devices,
        accumulation=setup.accumulation,
        checkpointing=str(setup.checkpointing),
        parameters=profile.parameters,
        trained_parameters=_trained(shape),
        parts=found[worst],
        moment=worst,
        moments_bytes={moment: parts.total_bytes for moment, parts in found.items()},
        units=units,
        simple_bytes=simple_count(profile.parameters, setup),
        leaves_out=_LEAVES_OUT,
    )


def simple_count(parameters: int, setup: Setup) -> int:
    """Return what weights, gradients and optimizer states take by the count of teaching material.

    For Adam 16 bytes a parameter in FP32 (4 + 4 + 8) and 12 with 16-bit weights and gradients (2 + 2 + 8); it knows no
    master copies, activations, logits or casts.
    """
    if not setup.trains:
        return parameters * (4 if setup.policy is StatePolicy.FP32 else 2)
    states = states_of(setup.policy, setup.optimizer)
    return round(parameters * (states.total - states.master))


def _trained(shape: Shape) -> int:
    if shape.full:
        return shape.profile.parameters if shape.setup.trains else 0
    return sum(shape.trained(unit, 0) for unit in shape.profile.units)


def _units(shape: Shape, parts: Sequence[Part], setup: Setup) -> tuple[UnitMemory, ...]:
    """Return what each unit holds on one device, and the parameters outside units as the last row."""
    rows, placed = [], 0
    states = states_of(setup.policy if shape.full else StatePolicy.FP32, setup.optimizer)
    for unit, part in zip(shape.profile.units, parts, strict=True):
        leaves = shape.own_leaves(unit)
        count = sum(leaf.parameters for leaf in leaves)
        placed += count
        stored = sum(shape.weight_bytes(leaf, leaf.parameters, unit.role) for leaf in leaves)
        rows.append(_row(unit.name, stored, shape.trained(unit, count), states, part.ops, setup, shape.full))
    rest = max(0, shape.profile.parameters - placed)
    stored = shape.weight_bytes(None, rest, None)
    rows.append(_row("outside units", stored, shape.trained(None, rest), states, [], setup, shape.full))
    return tuple(rows)


def _row(
    name: str, stored: float, trained: int, states: States, ops: Sequence[Op], setup: Setup, full: bool
) -> UnitMemory:
    share = {kind: 1 / setup.devices if kind in _divided(setup.sharding) else 1.0 for kind in ("w", "g", "o")}
    adapters = 0 if full else trained * states.weight
    return UnitMemory(
        name=name,
        weights_bytes=round((stored + adapters) * share["w"]),
        masters_bytes=round(trained * states.master * share["o"]),
        gradients_bytes=round(trained * states.gradient * share["g"]),
        optimizer_bytes=round(trained * states.optimizer * share["o"]),
        activations_bytes=round(sum(op.activations for op in ops)) if setup.trains else 0,
        scores_bytes=round(sum(op.scores for op in ops)) if setup.trains else 0,
        logits_bytes=round(sum(op.logits for op in ops)) if setup.trains else 0,
        casts_bytes=round(sum(op.casts for op in ops)) if setup.trains else 0,
        cache_bytes=round(sum(op.cache for op in ops)),
    )


def _divided(sharding: Sharding) -> str:
    """Return what is divided among devices: optimizer states, gradients, weights."""
    return {Sharding.NONE: "", Sharding.ZERO1: "o", Sharding.ZERO2: "og"}.get(sharding, "ogw")


def _fixed(shape: Shape, units: Sequence[UnitMemory], setup: Setup) -> Fixed:
    states = states_of(setup.policy if shape.full else StatePolicy.FP32, setup.optimizer)
    share = 1 / setup.devices if "g" in _divided(setup.sharding) else 1.0
    gathered = 0.0
    if "w" in _divided(setup.sharding) and setup.devices > 1:
        # the unit that computes and the one fetched ahead of it, in the format they compute in
        whole = sorted(u.weights_bytes * setup.devices for u in units)[-2:]
        gathered = sum(whole) * min(1.0, shape.ambient / states.weight)
    optimizer_share = 1 / setup.devices if "o" in _divided(setup.sharding) else 1.0
    return Fixed(
        weights=sum(u.weights_bytes for u in units),
        masters=sum(u.masters_bytes for u in units),
        optimizer=sum(u.optimizer_bytes for u in units),
        context=_CONTEXT_BYTES.get(setup.device_kind, 0),
        gradients=sum(u.gradients_bytes for u in units),
        gradient_share=share,
        accumulates=setup.accumulation > 1,
        optimizer_temporary=_trained(shape) * states.temporary * optimizer_share,
        stream=shape.stream_bytes,
        gathered=gathered,
    )


def _sentence(setup: Setup, plan: Plan) -> str:
    """Return what is stored how, and the savings that are on."""
    if not setup.trains:
        width = "fp32" if setup.policy is StatePolicy.FP32 else str(plan.ambient)
        return f"{width} weights, forward only"
    if setup.method is TrainMethod.FULL:
        word = {
            StatePolicy.FP32: "fp32 weights under the plan, fp32 gradients",
            StatePolicy.MIXED: "16-bit weights and gradients without master copies",
            StatePolicy.MIXED_MASTER: "16-bit weights and gradients, fp32 master copies",
            StatePolicy.BF16: "bf16 weights, gradients and states",
        }[setup.policy]
    else:
        base = "NF4 (embeddings, norms and head in {})" if setup.method is TrainMethod.QLORA else "{}"
        word = f"frozen base in {base.format(plan.ambient)}, fp32 adapters of rank {setup.adapter_rank}"
    extras = [f"optimizer {setup.optimizer}" if setup.optimizer else "no optimizer"]
    if setup.checkpointing is not Checkpointing.NONE:
        extras.append(f"{setup.checkpointing} checkpointing")
    if setup.loss is Loss.FUSED:
        extras.append("fused cross-entropy")
    if setup.attention is Attention.EAGER:
        extras.append("eager attention")
    if setup.sharding is not Sharding.NONE:
        extras.append(f"{setup.sharding} over {setup.devices} devices")
    return ", ".join([word, *extras])
