"""How long a matmul or a step takes on a device that need not be here: from its peaks, by kernels, with an interval.

A step is the sum of its kernels on the device, or of what the host needs to launch them, whichever is longer, phase by
phase (forward, backward, optimizer). Not modelled: data loading, communication, power and heat of a particular board,
and libraries much older or newer than those the coefficients were fitted on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoprec.catalog import find_device
from autoprec.errors import DeviceError, UsageError
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.predict.card import TF32, Card, card_of
from autoprec.predict.coefficients import Coefficients, coefficients
from autoprec.predict.describing import describe
from autoprec.predict.kernels import Kind, Phase
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.predict.pricing import Priced, Pricer
from autoprec.predict.setup import Checkpointing, Setup, choice_of
from autoprec.predict.shape import Shape
from autoprec.predict.work import rest_kernels, unit_kernels
from autoprec.predict.workparts import Work
from autoprec.records import DeviceProfile, Estimate, Mode, ModelFacts, ModelProfile, Origin

__all__ = ["StepTime", "gemm_ms", "predict_step", "priced_units", "step_ms", "step_time"]

#: share of a card's memory from which steps were seen to slow down (NeuSight's GPT-2 large on MI210 and MI250, whose
#: forward took three times as long at 4 sequences, with 64 GB nearly full)
_ROOM = 0.9
_CROWDED = "the step needs"
#: an operation of an eager step took 30 to 65 µs on the slowest host seen (a virtual one of an H200,
#: profiles/measured/h200-sxm-141gb.json), 12 where most were timed
_SLOWEST_HOST = 5.0
#: 1.96 times the root mean square of the log errors of an H200's steps in 16 bits and FP8 with its launch probed, 0.205
#: (benchmarks/bench_cards.py); an H100 took GPT-2's forward 1.4 times as long in BF16 as in FP16
_STEADY_HOST = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The predicted time of a step, by phase and by what it is spent on, and what to know about it."""

    device: str
    step_ms: Estimate
    phases_ms: Mapping[Phase, float]
    #: of the device's own time; the host's is not divided
    kinds_ms: Mapping[Kind, float]
    #: of it, products and fused attention by the format of their operands
    products_ms: Mapping[str, float]
    #: of the device's own time, forward and backward
    units_ms: Mapping[str, float]
    #: phases in which the host takes longer than the device
    host_bound: tuple[Phase, ...]
    #: rates in TFLOP/s by format, with where each is from
    rates: Mapping[str, str]
    #: what widens the interval
    doubts: tuple[str, ...]


def gemm_ms(
    device: str | DeviceProfile,
    m: int,
    n: int,
    k: int,
    format: Format | str,  # noqa: A002 (the word of the interface)
    batch: int = 1,
) -> Estimate:
    """Predict the time of `batch` matrix products [m, k] @ [k, n] on a device, in milliseconds, kernel alone.

    Args:
        device: a name of the catalogue or of a device that was probed, or a `DeviceProfile`.
        format: of the operands: fp32, tf32, bf16, fp16 or fp8 (scaled already; the result has 16 bits).

    Returns:
        Origin predicted, with a 95 % interval: wider where the card's peak in the format was never measured, for
        products smaller than a GFLOP, and outside the fitted range.

    Raises:
        DeviceError: no device is called so, it does not multiply in the format, or its figures contradict each other.
        UsageError: a size below 1, or no such format.
    """
    for name, value in (("m", m), ("n", n), ("k", k), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    key = _format_key(format)
    numbers = coefficients()
    profile = device if isinstance(device, DeviceProfile) else find_device(device)
    card = card_of(profile, numbers)
    seconds = Pricer(card).matmul(m, n, k, key, batch=batch)
    gflop = 2e-9 * m * n * k * batch
    size = "large" if gflop >= 1 else "small"
    vendor = profile.hardware.vendor if profile.hardware else ""
    width = numbers.spread.gemm[f"{vendor}-{size}"]
    outside = not numbers.fitted_gflop[0] <= gflop <= numbers.fitted_gflop[1]
    return _estimate(seconds * 1e3, width, card, {key}, numbers, outside)


def step_ms(
    model_or_id: Any,
    device: str | DeviceProfile,
    plan_or_format: Plan | Format | str = Format.BF16,
    batch_size: int = 8,
    seq_len: int = 512,
    mode: Mode | str = "train",
    optimizer: str | None = "adamw",
    compile: bool = False,  # noqa: A002 (the word of the interface)
    attention: str = "sdpa",
    **choices: Any,
) -> Estimate:
    """Predict the time of one step on a device that need not be here, in milliseconds.

    Args:
        model_or_id: a `ModelProfile`, an `nn.Module`, or a name, of which the configuration is read and nothing else.
        device: a name of the catalogue or of a device that was probed, or a `DeviceProfile`.
        plan_or_format: a plan, or a format for `Plan.uniform`; `tf32` is FP32 with the switch on.
        batch_size: sequences a micro-batch.
        seq_len: tokens a sequence; of an image, its patches and class token.
        mode: train (forward, backward, optimizer step) or infer (forward).
        optimizer: as in `memory_bytes`; None: no optimizer step.
        compile: kernels between matmuls are fused, as `torch.compile` does.
        attention: sdpa, eager or flash.
        choices: further ones of `memory_bytes`.

    Returns:
        Origin predicted, with a 95 % interval. `step_time` gives the same with its parts.

    Raises:
        UsageError: a count below 1, or a choice that does not exist.
        ModelError: the model cannot be found or read.
        PlanError: no such format, or a plan of another model.
        DeviceError: as in `gemm_ms`.
    """
    return step_time(
        model_or_id, device, plan_or_format, batch_size, seq_len, mode, optimizer, compile, attention, **choices
    ).step_ms


def step_time(
    model_or_id: Any,
    device: str | DeviceProfile,
    plan_or_format: Plan | Format | str = Format.BF16,
    batch_size: int = 8,
    seq_len: int = 512,
    mode: Mode | str = "train",
    optimizer: str | None = "adamw",
    compile: bool = False,  # noqa: A002
    attention: str = "sdpa",
    **choices: Any,
) -> StepTime:
    """Return the time of a step in ms with its parts: where it goes, and what of it is sure.

    Args:
        model_or_id: as in `step_ms`, as are all others.
        device: a catalogued name, or a profile.
        plan_or_format: a plan, or the format of every unit.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        mode: with the backward and the optimizer's step, or the forward alone.
        optimizer: None leaves its step out.
        compile: by `torch.compile`, with pointwise work fused.
        attention: the kernel.
        **choices: as in `memory_bytes`.

    Raises:
        UsageError, ModelError, PlanError, DeviceError: as in `step_ms`.
    """
    profile, facts = describe(model_or_id)
    known = device if isinstance(device, DeviceProfile) else find_device(device)
    plan = _plan_of(profile, plan_or_format, known, choice_of(Mode, mode, "mode"))
    setup = setup_of(plan, batch_size, seq_len, mode, optimizer, attention=attention, **choices)
    return predict_step(profile, plan, known, setup, facts, compiled=compile)


def predict_step(
    profile: ModelProfile,
    plan: Plan,
    device: DeviceProfile,
    setup: Setup,
    facts: ModelFacts | None = None,
    *,
    compiled: bool = False,
    numbers: Coefficients | None = None,
    accumulates: bool = False,
    with_loss: bool = True,
    delayed_scaling: bool = False,
    crowding: bool = True,
) -> StepTime:
    """Predict a step; a pure function of its arguments.

    Args:
        numbers: coefficients other than those of the package.
        accumulates: gradients are added to those of the step before.
        with_loss: the cross-entropy over the vocabulary is counted.
        delayed_scaling: FP8 takes the scales of the step before, as TransformerEngine does by default.
        crowding: say so, and widen the interval, where the step nearly fills the memory, whose peak is predicted.
    """
    table = numbers or coefficients()
    card = card_of(device, table)
    pricer = Pricer(card, compiled=compiled)
    shape = Shape(profile, plan, setup, facts)
    work = Work(
        shape=shape, recipe=_recipe(plan), delayed=delayed_scaling, accumulates=accumulates, with_loss=with_loss
    )
    total, units = Priced(), {}
    for unit_name, priced in priced_units(work, pricer):
        total.add(priced)
        units[unit_name] = 1e3 * sum(priced.device.values())
    total.add(pricer.price(rest_kernels(work)))
    phases = pricer.step_seconds(total)
    host = tuple(phase for phase, seconds in phases.items() if seconds > 1.2 * total.device[phase])
    used = {work.operands(unit.name) for unit in profile.units if shape.linears(unit)}
    vendor = device.hardware.vendor if device.hardware else ""
    crowded = _crowded(profile, plan, device, setup, facts) if crowding else None
    doubts = (*_doubts(card, used, setup, table, crowded), *_host_doubts(card, host))
    low, high = table.fitted_tokens
    outside = not low <= setup.tokens <= high or any(doubt.startswith(_CROWDED) for doubt in doubts)
    estimate = _estimate(
        1e3 * sum(phases.values()), _spread(table, vendor, used, setup, compiled), card, used, table, outside
    )
    # nobody knows what host it will be where no launch was measured
    quick, slow = (1 / _STEADY_HOST, _STEADY_HOST) if card.eager_seconds is not None else (1.0, _SLOWEST_HOST)
    low_ms, high_ms = (1e3 * sum(pricer.step_seconds(total, slower=by).values()) for by in (quick, slow))
    estimate = dataclasses.replace(estimate, low=min(estimate.low, low_ms), high=max(estimate.high, high_ms))
    return StepTime(
        device=device.name,
        step_ms=estimate,
        phases_ms={phase: 1e3 * seconds for phase, seconds in phases.items()},
        kinds_ms={kind: 1e3 * seconds for kind, seconds in total.kinds.items()},
        products_ms={operands: 1e3 * seconds for operands, seconds in total.products.items()},
        units_ms=units,
        host_bound=host,
        rates={k: f"{card.rate(k).flops / 1e12:.4g} TFLOP/s: {card.rate(k).source}" for k in sorted(used)},
        doubts=doubts,
    )


def priced_units(work: Work, pricer: Pricer) -> Iterator[tuple[str, Priced]]:
    """Yield the price of each unit, equal ones worked out once."""
    shape, known = work.shape, {}
    again = shape.setup.checkpointing if shape.setup.trains else Checkpointing.NONE
    for unit in shape.profile.units:
        key = shape.likeness(unit)
        if key not in known:
            kernels = list(unit_kernels(work, unit))
            known[key] = pricer.price(kernels)
            if again is not Checkpointing.NONE and shape.place(unit).block is not None:
                known[key].add(pricer.again(kernels, matmuls=again is Checkpointing.FULL))
        yield unit.name, known[key]


def _plan_of(profile: ModelProfile, given: Plan | Format | str, device: DeviceProfile, mode: Mode) -> Plan:
    if isinstance(given, Plan):
        return given
    if str(given).lower() == TF32:
        return Plan.uniform(profile, Format.FP32, mode=mode, tf32=True)
    return Plan.uniform(profile, given, mode=mode, device=device)


def _recipe(plan: Plan) -> Fp8Recipe | None:
    return None if plan.fp8_recipe is None else Fp8Recipe(plan.fp8_recipe)


def _format_key(choice: Format | str) -> str:
    key = str(choice).strip().lower()
    known = (*(str(f) for f in Format), TF32)
    if key not in known:
        raise UsageError(f"'{choice}' is no format; choose one of {', '.join(known)}")
    return key


def _spread(numbers: Coefficients, vendor: str, used: set[str], setup: Setup, compiled: bool) -> float:
    """Return the half-width of a step's interval: FP32 in eager mode was checked on most cards."""
    spread = numbers.spread.step
    if "fp8" in used:
        kind = "fp8"
    elif used <= {"fp32"} and not compiled:
        kind = "fp32"
    else:
        kind = "low"
    return spread[f"{vendor}-{kind}"]


def _estimate(value: float, width: float, card: Card, used: set[str], numbers: Coefficients, outside: bool) -> Estimate:
    if any(not card.rate(key).measured for key in used):
        width = math.hypot(width, numbers.spread.unmeasured)
    if card.low_power:
        width = math.hypot(width, numbers.spread.low_power)
    if outside:
        width *= numbers.spread.outside
    if not math.isfinite(value) or value <= 0:
        raise DeviceError(f"no time can be predicted for {card.name}: its figures give {value:g} ms")
    return Estimate(value, value * math.exp(-width), value * math.exp(width), Origin.PREDICTED)


def _crowded(
    profile: ModelProfile, plan: Plan, device: DeviceProfile, setup: Setup, facts: ModelFacts | None
) -> str | None:
    """Return what to say of a step that nearly fills the card's memory, None where there is room."""
    if device.memory_bytes is None:
        return None
    held = predict_memory(profile, plan, setup, facts).total_bytes
    if held <= _ROOM * device.memory_bytes:
        return None
    has, needs = device.memory_bytes / 1e9, held / 1e9
    full = held > device.memory_bytes
    slow = "it does not fit" if full else "an allocator that frees and asks again can halve its speed"
    return f"{_CROWDED} about {needs:.1f} of the {has:.0f} GB of {device.name}: {slow}"


def _host_doubts(card: Card, host: tuple[Phase, ...]) -> Iterator[str]:
    """Yield what to say of a step that waits for its launches."""
    if host and card.eager_seconds is None:
        yield (
            f"launching takes longer than computing ({', '.join(host)}), and that depends on the host, which was not "
            f"measured: {1e6 * card.family.eager_seconds:.0f} µs an operation are assumed, and up to {_SLOWEST_HOST:g} "
            "times as many were seen"
        )


def _doubts(card: Card, used: set[str], setup: Setup, numbers: Coefficients, crowded: str | None) -> Iterator[str]:
    """Yield what makes a prediction less certain than most."""
    yield from card.doubts
    if crowded:
        yield crowded
    for key in sorted(used):
        if not card.rate(key).measured:
            yield f"what {card.name} reaches in {key} was not measured: {card.rate(key).source}"
    low, high = numbers.fitted_tokens
    if not low <= setup.tokens <= high:
        yield f"{setup.tokens} tokens a step are outside what was fitted ({low} to {high}): the interval is wider"
