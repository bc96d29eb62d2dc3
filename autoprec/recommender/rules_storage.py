"""Rules on what is stored: master weights, stochastic rounding, optimizer states, logits, and too little memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprec.formats import Format
from autoprec.predict.setup import TrainMethod
from autoprec.recommender.rule import Case, Level, Rule, Topic
from autoprec.records import Architecture

__all__ = ["STORAGE_RULES"]

_GB = 1e9
#: logits, in training held in 16 bits and again in fp32, are worth a word from here on
_LOGITS_BYTES = 1 << 30
#: of Adam's two FP32 moments, in bytes a parameter; in 8 bits they take 2
_MOMENTS, _MOMENTS_8BIT = 8, 2


def _torch_name(choice: Format) -> str:
    return {Format.FP32: "float32", Format.BF16: "bfloat16", Format.FP16: "float16"}[choice]


def _frozen(case: Case) -> str:
    """Return what a frozen base is loaded in: 16 bits where no unit computes in FP32, and never on a CPU."""
    wide = Format.FP32 in case.plan.formats or case.device.kind == "cpu"
    return _torch_name(Format.FP32 if wide else case.plan.ambient)


def _logits_bytes(case: Case) -> int:
    return case.tokens * case.logits * (2 + 4 if case.trains else 2)


def _alternative(case: Case, begin: str) -> Mapping[str, Any] | None:
    found: list[Mapping[str, Any]] = [a for a in case.memory["alternatives"] if a["policy"].startswith(begin)]
    return found[0] if found else None


def _stochastic(case: Case) -> str:
    pure = _alternative(case, "bf16 throughout")
    size = f" ({pure['total_bytes'] / _GB:.1f} GB here)" if pure else ""
    return (
        f"bf16 weights without master copies lose every update below 0.4 % of a weight; if memory asks for them{size}, "
        "round stochastically: autoprec.runtime.optimizers.stochastic_adamw, or MasterWeights around any optimizer"
    )


def _eight_bit(case: Case) -> str:
    saved = (_MOMENTS - _MOMENTS_8BIT) * int(case.memory["trained_parameters"])
    return (
        f"optim='adamw_bnb_8bit' holds Adam's moments in 2 bytes a parameter instead of 8, {saved / _GB:.1f} GB less; "
        "embeddings keep 32-bit states"
    )


def _does_not_fit(case: Case) -> str:
    total, has = case.memory["total_bytes"] / _GB, case.memory["device_bytes"] / _GB
    fitting = [r["name"] for r in case.memory["remedies"] if r["fits"]]
    way = f"what would fit: {', '.join(fitting)}" if fitting else "no change known here makes it fit"
    return f"one sequence takes {total:.1f} GB and {case.plan.device.name} has {has:.1f} GB: {way}"


def _logits(case: Case) -> str:
    size = f"logits take {_logits_bytes(case) / _GB:.1f} GB in 16"
    if case.trains:
        return size + " and 32 bits: a fused or chunked cross-entropy avoids that (use_liger_kernel=True)"
    return size + " bits: pass logits_to_keep=1 where only the last token's are wanted"


STORAGE_RULES = (
    Rule(
        code="R17",
        topic=Topic.STORAGE,
        level=Level.MUST,
        applies=lambda c: c.trains_all,
        says="load with dtype='float32': transformers 5 keeps a bf16 checkpoint in bf16, and training it so has no "
        "master weights",
        source="huggingface/trl#4770; huggingface/transformers#42883",
    ),
    Rule(
        code="R17b",
        topic=Topic.STORAGE,
        level=Level.NOTE,
        applies=lambda c: c.trains_all and c.plan.ambient is Format.BF16,
        says=_stochastic,
        source="pytorch/ao#1124; arXiv:2502.20566; meta-pytorch/torchtune#2254",
    ),
    Rule(
        code="R18",
        topic=Topic.MEMORY,
        level=Level.SHOULD,
        applies=lambda c: c.trains_all and c.cuda and c.tight,
        says=_eight_bit,
        source="Dettmers et al., 8-bit optimizers (arXiv:2110.02861)",
    ),
    Rule(
        code="R19",
        topic=Topic.MEMORY,
        level=Level.NOTE,
        applies=lambda c: c.has(Format.FP8),
        says="fp8 does not lower memory: weights stay stored wide, and each use makes a cast of them",
        source="Transformer Engine docs; torchao (Llama3-8B on H100: 47.65 and 47.77 GB)",
    ),
    Rule(
        code="R20",
        topic=Topic.MEMORY,
        level=Level.SHOULD,
        applies=lambda c: c.low and _logits_bytes(c) > _LOGITS_BYTES,
        says=_logits,
        source="huggingface/transformers#33902, #30860; linkedin/Liger-Kernel",
    ),
    Rule(
        code="R28",
        topic=Topic.SCALING,
        level=Level.NOTE,
        applies=lambda c: c.trains and c.plan.ambient is Format.BF16 and c.plan.grad_scaler is None,
        says="bf16 has fp32's range, so no loss scaling",
        source="huggingface/accelerate#1036",
    ),
    Rule(
        code="R29",
        topic=Topic.EVALUATION,
        level=Level.MUST,
        applies=lambda c: c.trains and c.low,
        says="bf16_full_eval and fp16_full_eval are off: they cast the whole model and would undo the plan; evaluation "
        "runs in the plan's formats",
        source="transformers Trainer.evaluation_loop (model.to)",
    ),
    Rule(
        code="R30",
        topic=Topic.STORAGE,
        level=Level.MUST,
        applies=lambda c: c.method is TrainMethod.QLORA,
        says=lambda c: (
            "qlora: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype='{_torch_name(c.plan.ambient)}'), adapters in fp32"
        ),
        source="Dettmers et al., QLoRA (arXiv:2305.14314); huggingface/peft docs",
    ),
    Rule(
        code="R31",
        topic=Topic.STORAGE,
        level=Level.MUST,
        applies=lambda c: c.method is TrainMethod.LORA,
        says=lambda c: f"lora: load the frozen base with dtype='{_frozen(c)}', keep the adapters in fp32",
        source="Hu et al., LoRA (arXiv:2106.09685); huggingface/peft#175",
    ),
    Rule(
        code="R32",
        topic=Topic.MEMORY,
        level=Level.STOPS,
        applies=lambda c: not c.micro_batch,
        says=_does_not_fit,
        source="the memory model of this package (docs/memory.md)",
    ),
    Rule(
        code="R33",
        topic=Topic.STORAGE,
        level=Level.SHOULD,
        applies=lambda c: not c.trains and c.low and c.plan.stream is Format.FP32,
        says=lambda c: (
            f"weights stay stored in fp32 under this plan; Plan.cast(model, '{c.plan.ambient}') halves them for "
            "inference, at the drop of a narrow residual stream: measure both with autoprec search --mode infer"
        ),
        source="the memory model of this package (docs/memory.md)",
    ),
    Rule(
        code="R34",
        topic=Topic.MEMORY,
        level=Level.NOTE,
        applies=lambda c: (
            not c.trains and c.low and bool(c.model and c.model.architecture is not Architecture.ENCODER) and c.cuda
        ),
        says=lambda c: f"the cache of keys and values is kept in {c.plan.ambient}, and counted above",
        source="transformers DynamicCache",
    ),
    Rule(
        code="R46",
        topic=Topic.MEMORY,
        level=Level.STOPS,
        applies=lambda c: bool(c.model and c.model.max_positions and c.model.max_positions < c.seq_len),
        says=lambda c: (
            f"the model takes at most {c.model.max_positions if c.model else 0} tokens a sequence, and {c.seq_len} "
            "were asked for: give --seq-len"
        ),
        source="the model's configuration",
    ),
)
