"""The largest micro-batch that fits a device, and what would make a model fit where not even one sequence does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from autoprec.catalog import find_device
from autoprec.errors import UsageError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.describing import describe
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.predict.setup import (
    Checkpointing,
    Loss,
    Optimizer,
    Setup,
    Sharding,
    StatePolicy,
    TrainMethod,
    choice_of,
)
from autoprec.records import BatchFit, DeviceProfile, Mode, ModelFacts, ModelProfile, Remedy

__all__ = ["RESERVE", "fit_batch", "largest_batch", "remedies_for"]

#: share of a device left free for what is not counted: fragmentation, workspaces, communication. Published peaks of
#: models in 16 bits were at most this much above the prediction (benchmarks/results/memory.json)
RESERVE = 0.05
_MOST = 1 << 20  #: sequences at once beyond which nobody looks
#: times as many devices that a model is tried on
_DEVICES = (2, 4, 8, 16, 64, 256)


def largest_batch(
    model_or_id: Any,
    plan_or_format: Plan | Format | str = Format.BF16,
    device: str | DeviceProfile | int = "h100-sxm",
    seq_len: int = 512,
    mode: Mode | str = "train",
    optimizer: Optimizer | str | None = "adamw",
    *,
    effective_batch: int | None = None,
    reserve: float = RESERVE,
    step_seconds: Callable[[int], float] | None = None,
    facts: ModelFacts | None = None,
    **choices: Any,
) -> BatchFit:
    """Return the largest micro-batch that fits a device, with the accumulation that keeps the effective batch.

    Args:
        model_or_id: as in `memory_bytes`.
        plan_or_format: a plan, or the format of every unit.
        seq_len: tokens a sequence.
        device: a catalogued name, a profile, or its memory in bytes.
        effective_batch: sequences an optimizer step over all devices; None takes the largest micro-batch as it is.
        reserve: share of the device's memory that stays free.
        step_seconds: the seconds of one forward and backward with a micro-batch of so many sequences; for tokens/s.
        facts: as in `memory_bytes`.
        **choices: as in `memory_bytes`.
        mode: as in `memory_bytes`.
        optimizer: as in `memory_bytes`.

    Returns:
        Where not even one sequence fits: by how much, and which changes would make it fit.

    Raises:
        UsageError, ModelError, PlanError: as in `memory_bytes`.
        DeviceError: no device is called so.
    """
    profile, known = describe(model_or_id)
    plan = plan_or_format
    if not isinstance(plan, Plan):
        plan = Plan.uniform(profile, plan, mode=choice_of(Mode, mode, "mode"))
    size, kind = _memory_of(device)
    choices.setdefault("device_kind", kind)
    setup = setup_of(plan, 1, seq_len, mode, optimizer, **choices)
    if not 0 <= reserve < 1:
        raise UsageError(f"reserve must be a share from 0 to below 1, got {reserve}")
    fit = fit_batch(profile, plan, setup, facts or known, round((1 - reserve) * size), effective_batch)
    if step_seconds is None or not fit.micro_batch:
        return fit
    seconds = step_seconds(fit.micro_batch)
    return dataclasses.replace(fit, tokens_per_s=fit.micro_batch * setup.devices * seq_len / seconds)


def fit_batch(
    profile: ModelProfile,
    plan: Plan,
    setup: Setup,
    facts: ModelFacts | None,
    usable_bytes: int,
    effective_batch: int | None = None,
    *,
    advise: bool = True,
) -> BatchFit:
    """Return the largest micro-batch whose peak is within some bytes, and how it makes up the effective batch.

    A pure function of its arguments. `advise`: where none fits, look for what would make it fit.

    Raises:
        UsageError: the effective batch cannot be divided among the devices.
    """

    def fits(sequences: int, accumulation: int) -> bool:
        one = dataclasses.replace(setup, batch_size=sequences, accumulation=accumulation)
        return predict_memory(profile, plan, one, facts).total_bytes <= usable_bytes

    largest = micro = _largest(lambda sequences: fits(sequences, setup.accumulation), _MOST)
    accumulation = 1
    if effective_batch is not None:
        share = _share(effective_batch, setup.devices)
        micro = min(share, largest)
        if micro < share and setup.trains:  # gradients of earlier passes are held through the next
            micro = _largest(lambda sequences: fits(sequences, max(2, setup.accumulation)), largest)
        micro = next((count for count in range(micro, 0, -1) if share % count == 0), 0)
        accumulation = share // micro if micro else min(2, share)
    shown = dataclasses.replace(setup, batch_size=max(micro, 1), accumulation=max(accumulation, setup.accumulation))
    breakdown = predict_memory(profile, plan, shown, facts)
    return BatchFit(
        usable_bytes=usable_bytes,
        largest_micro_batch=largest,
        micro_batch=micro,
        accumulation=accumulation,
        effective_batch=micro * accumulation * setup.devices,
        breakdown=breakdown,
        over_bytes=0 if micro else breakdown.total_bytes - usable_bytes,
        remedies=() if micro or not advise else remedies_for(profile, plan, shown, facts, usable_bytes),
    )


def remedies_for(
    profile: ModelProfile, plan: Plan, setup: Setup, facts: ModelFacts | None, usable_bytes: int
) -> tuple[Remedy, ...]:
    """Return single changes with the peaks they give, then the first combination that fits, if any does."""

    def tried(name: str, changed: Setup) -> Remedy:
        total = predict_memory(profile, plan, changed, facts).total_bytes
        return Remedy(name=name, total_bytes=total, fits=total <= usable_bytes)

    single = [tried(name, changed) for name, changed in _changes(setup)]
    for devices in _DEVICES:
        single.append(
            tried(
                f"weights and states over {devices * setup.devices} devices", _sharded(setup, devices * setup.devices)
            )
        )
        if single[-1].fits:
            break
    if any(remedy.fits for remedy in single):
        return tuple(single)
    names, together = [], setup
    for name, changed in _compatible(setup):
        names.append(name)
        together = changed(together)
        both = tried(" and ".join(names), together)
        if both.fits and len(names) > 1:
            return (*single, both)
    return tuple(single)


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield single changes, those that alter the training least first."""
    if setup.trains:
        if setup.checkpointing is not Checkpointing.FULL:
            yield "full checkpointing", dataclasses.replace(setup, checkpointing=Checkpointing.FULL)
        if setup.loss is not Loss.FUSED:
            yield "fused cross-entropy", dataclasses.replace(setup, loss=Loss.FUSED)
        if setup.optimizer in (Optimizer.ADAMW, Optimizer.ADAMW_FOREACH):
            yield "8-bit AdamW", dataclasses.replace(setup, optimizer=Optimizer.ADAMW_8BIT)
            sr = dataclasses.replace(setup, optimizer=Optimizer.ADAMW_BF16_SR, policy=StatePolicy.BF16)
            yield "bf16 weights and states with stochastic rounding", sr
        for method in (TrainMethod.LORA, TrainMethod.QLORA):
            if setup.method is TrainMethod.FULL or (setup.method is TrainMethod.LORA and method is TrainMethod.QLORA):
                yield method.value, dataclasses.replace(setup, method=method)
    elif setup.policy is StatePolicy.FP32:
        yield "weights stored in bf16", dataclasses.replace(setup, policy=StatePolicy.BF16)


def _compatible(setup: Setup) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """Yield changes that add up, in the order they are tried together."""
    if not setup.trains:
        yield "weights stored in bf16", lambda s: dataclasses.replace(s, policy=StatePolicy.BF16)
    else:
        yield "full checkpointing", lambda s: dataclasses.replace(s, checkpointing=Checkpointing.FULL)
        yield "fused cross-entropy", lambda s: dataclasses.replace(s, loss=Loss.FUSED)
        yield "qlora", lambda s: dataclasses.replace(s, method=TrainMethod.QLORA)
    for count in _DEVICES:
        yield f"{count * setup.devices} devices", partial(_sharded, devices=count * setup.devices)


def _sharded(setup: Setup, devices: int) -> Setup:
    return dataclasses.replace(setup, sharding=Sharding.ZERO3, devices=devices)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count up to `most` that fits, 0 where 1 does not; more never fits where less does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _share(effective_batch: int, devices: int) -> int:
    if effective_batch < 1 or effective_batch % devices:
        raise UsageError(
            f"an effective batch of {effective_batch} cannot be divided among {devices} devices; take a multiple"
        )
    return effective_batch // devices


def _memory_of(device: str | DeviceProfile | int) -> tuple[int, str]:
    """Return a device's memory in bytes and its kind."""
    if isinstance(device, int):
        if device < 1:
            raise UsageError(f"a device's memory must be 1 byte or more, got {device}")
        return device, "cuda"
    profile = device if isinstance(device, DeviceProfile) else find_device(device)
    if profile.memory_bytes is None:
        raise UsageError(f"the memory of {profile.name} is not known; give it in bytes")
    return profile.memory_bytes, profile.kind
