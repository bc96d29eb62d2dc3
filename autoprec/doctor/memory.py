"""Checks of memory that mixed precision does not save, and of logits that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, said
from autoprec.doctor.logs import Said
from autoprec.formats import Format
from autoprec.records import Severity

_OOM = [
    re.compile(
        r"(?:cuda|hip|xpu|mps backend|gpu)[^\n]{0,12} out of memory(?!\s+(?:errors?|events?|count"
        r"|retr))",
        re.IGNORECASE,
    ),
    re.compile(r"OutOfMemoryError\b(?!\(RuntimeError\))"),
    re.compile(r"DefaultCPUAllocator: (?:can't|not enough)|CUBLAS_STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY"),
]
_RETRIED = re.compile(r"retry|trying again|reduc\w+ (?:the )?batch|halv|decreas\w+ batch|falling back", re.IGNORECASE)
_AT_LOSS = re.compile(
    r"logits\.(?:float|to\(|contiguous|clone)|upcast.{0,20}logits|logits? ?=|shift_logits|cross_?entropy"
    r"|ForCausalLMLoss|fixed_cross"
    r"|log_softmax|logsumexp|loss_function|loss_fct|lm_head|compute_lm_head|selective_log_softmax|convert_to_fp32|_convert_to_fp32",
    re.IGNORECASE,
)
_GB = 1e9
#: share of a device's memory from which logits are worth a warning and not a note
_LARGE = 0.25
#: below this nobody minds (the threshold at which `recommend` speaks of it)
_NOTED = 1 << 30


def _at_loss(message: Said) -> bool:
    return bool(_AT_LOSS.search(message.frames(12)))


def _lasting(message: Said) -> bool:
    return not _RETRIED.search(message.text)


@check(
    "AP012", "Mixed precision does not lower the memory", Severity.ERROR,
    advice="""Autocast keeps FP32 weights, gradients and Adam states (16 bytes a parameter) and saves activations
    only. What lowers memory: 8-bit optimizer states, gradient checkpointing, a smaller micro-batch with
    accumulation, LoRA, ZeRO or FSDP; for inference, weights loaded in BF16.""",
    paste='TrainingArguments(..., optim="adamw_bnb_8bit", gradient_accumulation_steps=8, gradient_checkpointing=True)',
    sources="pytorch/pytorch#61173 Lightning-AI/pytorch-lightning#3382 lucidrains/stylegan2-pytorch#143 "
            "pytorch/tutorials#1267",
)  # fmt: skip
def memory_stays(case: Case) -> Iterator[Evidence]:
    """Out of memory in a log, anywhere but at the loss (AP013). For a model whose size is known, the breakdown in
    bytes a parameter: a note, and a warning where it is more than the --device has. A script that runs inference
    under autocast with weights loaded in FP32."""
    yield from said(case, _OOM, only=lambda m: _lasting(m) and not _at_loss(m), most=1)
    run, checkpoint = case.run, case.checkpoint
    low = run.amp.get(Format.BF16) or run.amp.get(Format.FP16)
    if checkpoint and checkpoint.parameters and low and run.trains and not run.adapters:
        full = not {Format.BF16, Format.FP16} & set(run.stored)
        each, parts = (16, "weights 4, gradients 4, Adam 8") if full else (8, "weights 2, gradients 2, Adam 4")
        total = each * checkpoint.parameters
        has = case.device.memory_bytes if case.device else None
        over = bool(has and total > has and not run.masters)
        more = f"; {case.device.name} has {has / _GB:.1f} GB" if case.device and has else ""
        yield Evidence(
            f"{low.text}: {each} bytes a parameter ({parts}) x {checkpoint.parameters:,} = {total / _GB:.1f} GB "
            f"before activations{more}",
            low.place, Severity.WARNING if over else Severity.NOTE,
        )  # fmt: skip
    if low and not run.trains and Format.FP32 in run.stored and "autocast" in low.text:
        placed = run.stored[Format.FP32]
        yield Evidence(
            f"{placed.text} is kept in FP32 and run under {low.text}: twice the bytes of {low.text}",
            placed.place,
            Severity.WARNING,
        )


@check(
    "AP013", "The logits take the memory", Severity.ERROR,
    advice="""Batch x length x vocabulary in 16 bits and again in FP32 is the largest tensor of the step. Use a fused or
    chunked cross entropy (Liger), logits_to_keep, or a smaller micro-batch with accumulation.""",
    paste="TrainingArguments(..., use_liger_kernel=True)",
    sources="huggingface/transformers#30860 huggingface/transformers#33902 huggingface/transformers#38452 "
            "modelscope/ms-swift#6966 NVIDIA-NeMo/Automodel#3907",
)  # fmt: skip
def logits(case: Case) -> Iterator[Evidence]:
    """Out of memory in a traceback that ends at `logits.float()`, the output head or the cross entropy. Told
    beforehand, as a note, from batch, length and vocabulary; as a warning where that is a quarter of the --device's
    memory."""
    yield from said(case, _OOM, only=lambda m: _lasting(m) and _at_loss(m), most=1)
    facts = case.checkpoint.facts if case.checkpoint else None
    run = case.run
    if facts is None or not facts.vocab or any(s.on for s in run.get("use_liger_kernel", "liger_kernel")):
        return
    batch = (
        run.number("per_device_train_batch_size", "train_micro_batch_size_per_gpu", "micro_batch_size", "batch_size")
        or 8
    )
    length = run.number(
        "max_seq_length", "max_length", "seq_len", "block_size", "cutoff_len", "sequence_len", "model_max_length"
    )
    if not run.trains or length is None:
        return
    size = batch * length * facts.vocab * (2 + 4)
    has = case.device.memory_bytes if case.device else None
    if size > _NOTED:
        text = f"{batch:g} x {length:g} tokens x {facts.vocab} words x 6 bytes = {size / _GB:.1f} GB of logits"
        large = bool(has and size > _LARGE * has)
        yield Evidence(text, run.files[0].path if run.files else "", Severity.WARNING if large else Severity.NOTE)
