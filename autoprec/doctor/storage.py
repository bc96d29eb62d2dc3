"""Checks of what weights and buffers are stored in: pure BF16, silent BF16, positions in BF16, spoiled weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from autoprec.doctor.case import Case, Evidence, check
from autoprec.doctor.stores import Placed
from autoprec.formats import BF16, Format
from autoprec.records import Severity

__all__ = ["lost_share"]

#: what the Trainer takes where the arguments do not say
_LEARNING_RATE = 5e-5
#: from here on most of what the optimizer does is lost, which is broken and not merely worse
_MOST = 0.5
_ROPE = re.compile(
    r"rope|llama|mistral|mixtral|qwen|gemma|phi|neox|gptj|falcon|olmo|smollm|deepseek|cohere|starcoder2", re.IGNORECASE
)
_INV_FREQ = re.compile(r"inv_freq|rotary.*(?:cos|sin|freq)|freqs_cis|rope.*freq", re.IGNORECASE)


def lost_share(histogram: Any, learning_rate: float) -> float:
    """Return the share of BF16 weights that an update of the size of the learning rate leaves as they are.

    Adam's first updates have about that size. Rounding to nearest drops what is under half of a weight's last place,
    2^(e - 8) for an exponent of e.
    """
    total = float(histogram[1:255].sum())
    if total == 0 or learning_rate <= 0:
        return 0.0
    last = math.floor(math.log2(learning_rate) + BF16.mantissa_bits + 1)  # e with 2^(e - 8) <= learning rate
    return float(histogram[max(1, last + 1 + 127) : 255].sum()) / total


def _keeps(case: Case) -> bool:
    """Say whether small updates are kept somewhere, or nothing large is trained."""
    run = case.run
    return (
        run.adapters
        or run.masters is not None
        or run.rounding is not None
        or bool(case.checkpoint and case.checkpoint.adapter)
    )


def _lost(case: Case) -> tuple[str, Severity | None]:
    """Return what of the checkpoint's weights an update would not move, and how bad that is."""
    rate = case.run.number("learning_rate", "lr", "optimizer.params.lr") or _LEARNING_RATE
    counts = case.checkpoint.scan.histogram.get("bf16") if case.checkpoint and case.checkpoint.tensors else None
    if counts is None:
        return "", None
    share = lost_share(counts, rate)
    return (
        f"; at a learning rate of {rate:g}, {100 * share:.0f} % of the weights would stay as they are (an update "
        f"under half "
        "of their last place)"
    ), Severity.ERROR if share > _MOST else None


@check(
    "AP021", "Training in pure BF16 loses small updates", Severity.WARNING,
    advice="""Weights stored in BF16 without FP32 copies keep 8 bits: an update under 1/512 of a weight is rounded
    away, and norm weights stay at 1. Load in FP32 and train under bf16=True, or take an optimizer with stochastic
    rounding or Kahan summation.""",
    paste="from_pretrained(name, dtype=torch.float32)  # and TrainingArguments(..., bf16=True)",
    sources="vllm-project/speculators#765 meta-pytorch/torchtune#2254 Nerogar/OneTrainer#996 hp-l33/AiM#10 "
            "pytorch/ao#1124",
)  # fmt: skip
def pure_bf16(case: Case) -> Iterator[Evidence]:
    """A script or configuration that stores what it trains in BF16 (dtype=torch.bfloat16, `.to(torch.bfloat16)`,
    pure_bf16, precision "bf16-true") and neither adapters, DeepSpeed, FSDP nor a rounding optimizer beside it; a
    checkpoint whose optimizer moments are BF16; a BF16 checkpoint that was trained and whose norm weights are all
    exactly 1."""
    run = case.run
    stored = run.stored.get(Format.BF16)
    other = Format.FP32 in run.stored or Format.FP16 in run.amp
    if stored and run.trains and not _keeps(case) and not other:
        text, worse = _lost(case)
        yield Evidence(f"{stored.text}, trained as it is{text}", stored.place, worse)
    checkpoint = case.checkpoint
    if checkpoint is None or checkpoint.stored != "bf16":
        return
    moments = checkpoint.optimizer_formats
    if moments.get("bfloat16", 0) > moments.get("float32", 0):
        text, worse = _lost(case)
        yield Evidence(
            f"the optimizer's moments are bf16, so no FP32 weights stood behind them{text}",
            f"{checkpoint.folder}/optimizer.pt",
            worse,
        )
    scan = checkpoint.scan
    if scan.norms > 1 and len(scan.norms_at_one) == scan.norms and not checkpoint.adapter:
        trained = bool(checkpoint.trainer_state.get("global_step")) or bool(moments)
        if trained or not scan.fresh:
            yield Evidence(
                f"all {scan.norms} norm weights are exactly 1.0 in bf16, {scan.norms_at_one[0]} first: no update "
                f"reached them",
                str(checkpoint.folder), None if trained else Severity.NOTE,
            )  # fmt: skip


@check(
    "AP022", "The checkpoint is BF16 and is trained without FP32 master weights, silently", Severity.WARNING,
    advice="""Since transformers 5 `from_pretrained` keeps the checkpoint's format, and bf16=True makes no FP32
    copies. Say dtype=torch.float32 when loading; or take an optimizer with stochastic rounding.""",
    paste="AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)",
    sources="huggingface/trl#4770 huggingface/sentence-transformers#3773 mosaicml/llm-foundry#1734 "
            "huggingface/transformers#42883 verl-project/verl#749",
)  # fmt: skip
def silent_bf16(case: Case) -> Iterator[Evidence]:
    """A model loaded without a dtype and trained with bf16=True. With the checkpoint at hand its format decides, and
    its weights say how many updates would be lost; without it, a note."""
    run, checkpoint = case.run, case.checkpoint
    if not run.trains or _keeps(case) or run.stored or Format.FP16 in run.amp:
        return
    place = run.amp.get(Format.BF16) or (run.untyped_loads[0] if run.untyped_loads else None)
    if place is None:
        return
    if checkpoint is not None and checkpoint.stored == "bf16":
        text, worse = _lost(case)
        loads = run.untyped_loads[0] if run.untyped_loads else place
        yield Evidence(f"{loads.text} gives the bf16 weights of {checkpoint.name}{text}", loads.place, worse)
    elif checkpoint is None and run.untyped_loads and Format.BF16 in run.amp:
        load = run.untyped_loads[0]
        yield Evidence(f"{load.text} without a dtype: bf16 if its checkpoint is", load.place, Severity.NOTE)


@check(
    "AP023", "Rotary positions are computed or stored in BF16 or FP16", Severity.WARNING,
    advice="""BF16 holds no whole number over 256 exactly, so angles at later positions are wrong. Keep inv_freq and the
    product with the positions in FP32: do not cast the whole model after it was made, or restore the buffers.""",
    paste="for name, b in model.named_buffers(): b.data = b.data.float() if 'inv_freq' in name else b.data",
    sources="huggingface/transformers#29285 NVIDIA/TransformerEngine#1245 vllm-project/vllm#863 "
            "huggingface/candle#3520 KellerJordan/modded-nanogpt#39",
)  # fmt: skip
def rotary(case: Case) -> Iterator[Evidence]:
    """A checkpoint with `inv_freq` or rotary tables in BF16 or FP16; `.to(torch.bfloat16)`, `.bfloat16()` or
    `.half()` on a whole model of a family with rotary positions (a note where the family is not known); DeepSpeed's
    bf16 and fp16, which cast buffers, as a note."""
    checkpoint = case.checkpoint
    for tensor in checkpoint.tensors if checkpoint else ():
        if _INV_FREQ.search(tensor.name) and tensor.format in ("bf16", "fp16"):
            yield Evidence(
                f"{tensor.name} is {tensor.format}", f"{checkpoint.name}/{tensor.file}" if checkpoint else ""
            )
            break
    rope = bool(_ROPE.search(case.family)) or bool(
        checkpoint and {"rope_theta", "rope_scaling", "rope_parameters"} & set(checkpoint.config)
    )
    for choice in (Format.BF16, Format.FP16):
        placed = case.run.stored.get(choice)
        if placed and re.search(r"\.(?:to|bfloat16|half)\(", placed.text) and not case.run.adapters:
            known = _loads_first(case, placed)
            if rope or known:
                yield Evidence(
                    f"{placed.text} casts the rotary buffers too",
                    placed.place,
                    None if rope and _long(case) else Severity.NOTE,
                )
    for s in case.run.get("bf16.enabled", "fp16.enabled"):
        if s.on and rope and not any(True for _ in case.run.get("keep_in_fp32_modules")):
            yield Evidence(
                f"{s.name}: DeepSpeed casts buffers as well; data_types.keep_in_fp32_modules keeps them",
                s.place,
                Severity.NOTE,
            )


def _loads_first(case: Case, placed: Placed) -> bool:
    return any(True for _ in case.run.calls("from_pretrained")) and ".to(" in placed.text


def _long(case: Case) -> bool:
    """Say whether positions beyond 256 are used; unknown counts as yes."""
    length = case.run.number(
        "max_seq_length", "max_length", "seq_len", "block_size", "cutoff_len", "sequence_len", "model_max_length"
    )
    facts = case.checkpoint.facts if case.checkpoint else None
    if length is None and facts is not None and facts.max_positions:
        length = float(facts.max_positions)
    return length is None or length > 256


@check(
    "AP025", "Weights hold NaN or infinity", Severity.ERROR,
    advice="""The checkpoint was written after a bad step, or converted to FP16 with values over 65504. Go back to an
    earlier one; convert with torch.bfloat16.""",
    paste="autoprec doctor path/to/the/checkpoint/before",
    sources="jzhang38/TinyLlama#32",
)  # fmt: skip
def spoiled(case: Case) -> Iterator[Evidence]:
    """The weights of a folder are read (blocks of them from 3 GB on) and looked through."""
    checkpoint = case.checkpoint
    if checkpoint is not None and checkpoint.tensors and (names := checkpoint.scan.spoiled):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Evidence(f"{', '.join(names[:3])}{more}", str(checkpoint.folder))
