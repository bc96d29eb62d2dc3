"""What to know beside the formats: loss scaling, loading, attention, shapes, memory. A sentence each, with causes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.setup import TrainMethod
from autoprec.recommender.features import UnitFacts
from autoprec.records import DeviceProfile, Mode, Role

__all__ = ["around_the_plan"]

_GB = 1e9
#: logits held in 16 bits and again in fp32 are worth a word from here on
_LOGITS_BYTES = 1 << 30


def around_the_plan(
    plan: Plan,
    facts: Mapping[str, UnitFacts],
    device: DeviceProfile,
    memory: Mapping[str, Any],
    method: TrainMethod,
    tokens: int,
    checkpointing: bool,
) -> tuple[str, ...]:
    """Return the sentences that go with a plan, most important first."""
    return (
        *_precision(plan),
        *_loading(plan, method),
        *_attention(plan, device),
        *_shapes(plan, facts),
        *_memory(plan, facts, memory, tokens, checkpointing),
    )


def _precision(plan: Plan) -> Iterator[str]:
    if plan.grad_scaler is not None:
        # torch.amp.GradScaler's defaults; gradients are unscaled before clipping by the Trainer under fp16=True
        yield (
            "fp16 gradients underflow without loss scaling: GradScaler from 65536, doubled after 2000 good steps, "
            "halved on overflow; clip after unscaling, and trainable weights must be fp32"
        )
    elif plan.mode is Mode.TRAIN and plan.ambient is Format.BF16:
        yield "bf16 has fp32's range, so no loss scaling"
    if plan.ambient is not Format.FP32 and plan.device.kind == "cuda":
        yield "norms, softmax and losses stay in fp32, as torch.autocast runs them on CUDA"
    counted = Counter(unit.format for unit in plan.units)
    if fp8 := counted[Format.FP8]:
        yield (
            f"fp8 ({plan.fp8_recipe}) in {fp8} of {len(plan.units)} units; compile the model, because unfused casts "
            "cost more than fp8 saves; it does not lower memory (TransformerEngine and torchao say so of theirs)"
        )
    if plan.mode is Mode.TRAIN and plan.ambient is not Format.FP32:
        yield "bf16_full_eval and fp16_full_eval are off: they cast the whole model and would undo the plan"


def _loading(plan: Plan, method: TrainMethod) -> Iterator[str]:
    if method is TrainMethod.QLORA:
        yield (
            "qlora: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype='{_torch_name(plan.ambient)}'), adapters in fp32"
        )
    elif method is TrainMethod.LORA:
        yield f"lora: load the frozen base with dtype='{_torch_name(plan.ambient)}', keep the adapters in fp32"
    elif plan.mode is Mode.TRAIN:
        # transformers 5 loads in the checkpoint's dtype: huggingface/trl#4770, huggingface/transformers#42883
        yield "load with dtype='float32': transformers 5 keeps a bf16 checkpoint in bf16, which loses small updates"


def _attention(plan: Plan, device: DeviceProfile) -> Iterator[str]:
    if plan.device.kind != "cuda" or plan.ambient is Format.FP32 or device.compute_capability is None:
        return
    if device.compute_capability >= (8, 0):
        yield f"attention runs in {plan.ambient}, where FlashAttention kernels exist: keep attn_implementation='sdpa'"
    else:
        yield (
            "FlashAttention 2 needs capability 8.0 "
            f"(this is {'.'.join(map(str, device.compute_capability))}): SDPA takes its memory-efficient kernel"
        )


def _shapes(plan: Plan, facts: Mapping[str, UnitFacts]) -> Iterator[str]:
    """Name dimensions that keep 16-bit tensor cores from their rate: they work on 16 bytes, so 8 elements."""
    if plan.device.kind != "cuda" or plan.ambient is Format.FP32:
        return
    odd = [
        (leaf.module, size)
        for name, fact in facts.items()
        if plan.unit(name).format is not Format.FP32
        for leaf in fact.gemms
        for size in (leaf.inputs, leaf.outputs)
        if size % 8
    ]
    if odd:
        module, size = odd[0]
        yield (
            f"{len(odd)} dimensions do not divide by 8, which slows tensor cores; first {module} with {size}: "
            f"pad it to {-(-size // 8) * 8}"
        )


def _memory(
    plan: Plan, facts: Mapping[str, UnitFacts], memory: Mapping[str, Any], tokens: int, checkpointing: bool
) -> Iterator[str]:
    total, micro = memory["total_bytes"], memory["micro_batch"]
    if not micro:
        has, fitting = memory["device_bytes"] / _GB, [r["name"] for r in memory["remedies"] if r["fits"]]
        way = f"what would fit: {', '.join(fitting)}" if fitting else "no change known here makes it fit"
        yield f"one sequence takes {total / _GB:.1f} GB and {plan.device.name} has {has:.1f} GB: {way}"
    elif checkpointing:
        # about a third more compute for a fraction of the activations
        yield (
            "the batch does not fit with all activations kept: recompute them, for about a third more compute "
            f"({total / _GB:.1f} GB then)"
        )
    if micro and memory["accumulation"] > 1:
        yield (
            f"{micro} sequences at once and {memory['accumulation']} times accumulated give the batch that was asked: "
            "not all of it fits at once"
        )
    outputs = [leaf.outputs for f in facts.values() if f.unit.role is Role.LM_HEAD for leaf in f.gemms]
    logits = tokens * max(outputs, default=0) * (2 + 4)
    if plan.mode is Mode.TRAIN and logits > _LOGITS_BYTES:
        yield f"logits take {logits / _GB:.1f} GB in 16 and 32 bits: a fused or chunked cross-entropy avoids that"


def _torch_name(choice: Format) -> str:
    return {Format.FP32: "float32", Format.BF16: "bfloat16", Format.FP16: "float16"}[choice]
