"""Checks of FP16's range and its loss scale: unscaling, overflow, scales that fall to nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from autoprec.doctor.case import Case, Evidence, check, said
from autoprec.doctor.series import Point, Series, read_series
from autoprec.formats import Format
from autoprec.records import Severity

__all__ = ["fp16_hazard"]

_UNSCALE = re.compile(r"attempting to unscale fp16 grad", re.IGNORECASE)
_UNSCALE_BF16 = re.compile(
    r"_amp_\w*(?:non_?finite|unscale)\w*[\"'`]*\s+not implemented for\s+[\"'`]*(?:torch\.)?BFloat16", re.IGNORECASE
)
_SCALE_LOW = re.compile(
    r"current loss scale already at minimum|minimum loss scale reached|loss scale(?:r)? (?:has )?reached (?:its "
    r"|the )?min|loss scale (?:is|has been) (?:already )?at (?:its )?minimum"
    r"|cannot decrease (?:the )?(?:loss )?scale any ?more|loss scale.{0,20}(?:below|under|less than) (?:the )?min",
    re.IGNORECASE,
)
_NAN_SAID = re.compile(
    r"\b(?:found|got|detected|encountered|produced|returned)\b.{0,24}\bnan\b.{0,60}\b(?:loss|gradient|grad"
    r"|logits|local gradient|activation|output|forward)"
    r"|\bnan(?:s)? (?:or inf(?:inity)?s? )?(?:values? )?(?:found|detected|encountered|in) (?:the )?(?:\w+ "
    r")?(?:loss|gradient|grad|logits|output)"
    r"|function '\w+' returned nan values|loss (?:exploded|diverged|is not finite|is non-?finite)|non-?finite loss"
    r"|(?:loss is|losses are) (?:nan|inf)\b|gradient norm is (?:nan|inf)|total norm .{0,60}non-?finite"
    r"|rerun.{0,20}nan in"
    r"|gradients? (?:are|is|was|were) (?:nan|inf)|nan or inf found in|\bnan (?:loss|gradient)\w* (?:at|in|on"
    r"|encountered|detected|found)",
    re.IGNORECASE,
)

_REWARDED = re.compile(r"reward|\bkl\b|advantage|completion_length", re.IGNORECASE)
_NONE_FOUND = re.compile(
    r"\b(?:0|no|zero|any|without)\s+(?:\w+\s+)?(?:nan|inf|non-?finite)|\b(?:if|when|whether|unless)\b.{0,40}(?:nan|inf|finite)",
    re.IGNORECASE,
)

#: families trained in BF16 whose activations pass 65504, as words of a type, class or name: those of
#: recommender/advice.py, which knows classes alone, and more. T5:
#: huggingface/transformers#5651, #9295; Gemma 3, 3n, 4: unslothai/unsloth-zoo#600; Qwen2: QwenLM/Qwen3#761, #826;
#: DeepSeek-V2: deepseek-ai/DeepSeek-V2#93; GLM-4: zai-org/GLM-4#760
_HAZARDS = re.compile(
    r"\b(?:m|um|by|flan[-_]?|long-?)?t5(?:-|\b|_|for|v1|model)|flan-t5|gemma-?_?[234]|gemma3n|paligemma|qwen-?_?(?:1\.5|2|2\.5)\b|qwen2"
    r"|deepseek[-_]?v2|glm-?4|ul2\b",
    re.IGNORECASE,
)


def fp16_hazard(family: str) -> str | None:
    """Return the word of a family known to leave FP16's range, if one is in a text of names."""
    match = _HAZARDS.search(family)
    return match[0] if match else None


@check(
    "AP001", "Trained weights are FP16 under a gradient scaler", Severity.ERROR,
    advice="""A GradScaler unscales FP32 gradients only. Load what is trained in FP32 (a frozen base may stay FP16 or
    4-bit, adapters are FP32), or train in BF16 without a scaler where the device has it.""",
    paste="model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # with fp16=True",
    sources="bitsandbytes-foundation/bitsandbytes#945 haotian-liu/LLaVA#363 Facico/Chinese-Vicuna#168",
)  # fmt: skip
def unscale_fp16(case: Case) -> Iterator[Evidence]:
    """`scaler.unscale_` refuses FP16 gradients. Seen in a log, or told beforehand from FP16 weights (a dtype,
    `.half()`, the checkpoint's own where no dtype is given) that are trained with `fp16=True` or a GradScaler."""
    yield from said(case, [_UNSCALE])
    run = case.run
    asked = run.amp.get(Format.FP16) or run.scaler
    if asked is None or run.adapters or run.masters or not (run.trains or run.scaler):
        return
    if placed := run.stored.get(Format.FP16):
        yield Evidence(f"{placed.text} together with {asked.text}", placed.place)
    elif (
        case.checkpoint
        and case.checkpoint.stored == "fp16"
        and Format.FP32 not in run.stored
        and not case.checkpoint.adapter
    ):
        sure = None if run.untyped_loads else Severity.WARNING
        yield Evidence(
            f"the weights of {case.checkpoint.name} are fp16, and {asked.text}: transformers 5 keeps a "
            f"checkpoint's format",
            asked.place, sure,
        )  # fmt: skip


@check(
    "AP002", "BF16 gradients under an FP16 scaler", Severity.ERROR,
    advice="""The weights are BF16 (transformers 5 keeps a checkpoint's format) while fp16=True scales for FP16. Use
    bf16=True, which needs no scaler, or load with dtype=torch.float32.""",
    paste='TrainingArguments(..., bf16=True)  # and from_pretrained(name, dtype=torch.float32)',
    sources="pytorch/pytorch#127176 huggingface/trl#4901 InternLM/xtuner#960 QwenLM/Qwen-VL#372",
)  # fmt: skip
def unscale_bf16(case: Case) -> Iterator[Evidence]:
    """`_amp_foreach_non_finite_check_and_unscale` has no kernel for BF16 on CUDA. Seen in a log, or told beforehand
    from BF16 weights that are trained with `fp16=True`."""
    yield from said(case, [_UNSCALE_BF16])
    run = case.run
    asked = run.amp.get(Format.FP16)
    if asked is None or run.adapters or run.masters or not run.trains:
        return
    if placed := run.stored.get(Format.BF16):
        yield Evidence(f"{placed.text} together with {asked.text}", placed.place)
    elif case.checkpoint and case.checkpoint.stored == "bf16" and not {Format.FP32, Format.FP16} & set(run.stored):
        sure = None if run.untyped_loads else Severity.WARNING
        yield Evidence(
            f"the weights of {case.checkpoint.name} are bf16, and {asked.text}: transformers 5 keeps a "
            f"checkpoint's format",
            asked.place, sure,
        )  # fmt: skip


@check(
    "AP003", "The loss or the gradient stops being a number", Severity.ERROR,
    advice="""In FP16 a value over 65504 became infinite: use BF16, or keep the units that overflow in FP32
    (`autoprec doctor MODEL --trace` names the first one; in most families it is the FFN's last matmul and the
    residual). In BF16 or FP32 lower the learning rate, clip the gradient, and look at the batch before.""",
    paste="autoprec doctor MODEL --trace",
    sources="QwenLM/Qwen3#670 jzhang38/TinyLlama#32 declare-lab/flan-alpaca#19 huggingface/transformers#14189 "
            "huggingface/transformers#5651",
)  # fmt: skip
def not_finite(case: Case) -> Iterator[Evidence]:
    """NaN or infinite losses in a log or a `trainer_state.json`; a loss that is exactly 0 while its gradient is NaN (a
    Trainer shows 0 for what it filters); gradient norms that stay NaN. Single skipped steps while a scaler finds its
    scale are how FP16 works, and not reported. Told beforehand where FP16 meets a family trained in BF16 that is known
    to pass 65504."""
    for log in case.logs:
        for point, why in _not_finite(log.series):
            if why.endswith("exactly 0") and _REWARDED.search(log.lines[point.line]):
                continue  # a policy gradient's loss starts at 0
            yield Evidence(f"{why}: {log.lines[point.line].strip()[:160]}", log.place(point.line))
    if not any(True for log in case.logs for _ in _not_finite(log.series)):
        yield from said(case, [_NAN_SAID], only=lambda m: not _NONE_FOUND.search(m.text), most=2)
    if case.checkpoint is not None:
        history = case.checkpoint.trainer_state.get("log_history") or ()
        lines = [(i, str(row)) for i, row in enumerate(history)]
        for point, why in _not_finite(read_series(lines)):
            yield Evidence(f"{why}: {lines[point.line][1][:160]}", f"{case.checkpoint.folder}/trainer_state.json")
    hazard = fp16_hazard(case.family)
    half = case.run.amp.get(Format.FP16) or case.run.stored.get(Format.FP16)
    if hazard and half:
        yield Evidence(
            f"'{hazard}' was trained in bf16 and is known to pass 65504, and {half.text}", half.place, Severity.WARNING
        )


def _not_finite(series: Series) -> Iterator[tuple[Point, str]]:
    """Yield the first sign of a run that is lost, of losses and of gradients."""
    bad = next((p for p in series.losses if not math.isfinite(p.value)), None)
    if bad is not None:
        yield bad, f"{bad.name.strip()} is {bad.value}"
        return
    zero = _zeros(series.training(), series)
    if zero is not None:
        yield zero, "the loss is exactly 0"
        return
    lost = _lasting(series.norms)
    if lost is not None:
        yield lost, "the gradient norm stays NaN or infinite"


#: a loss above this that is 0 in the next line did not get there by learning
_SUDDEN = 0.5


def _zeros(losses: Sequence[Point], series: Series) -> Point | None:
    """Return the first loss of exactly 0 that a NaN must be behind; a healthy one gets there slowly, or with a
    gradient."""
    norms = series.norms_by_line()
    for point in losses:
        if point.value == 0.0 and not math.isfinite(norms.get(point.line, 0.0)):
            return point
    zeros = 0
    while zeros < len(losses) and losses[-1 - zeros].value == 0.0:
        zeros += 1
    if zeros < 2 or any(norms.get(p.line) for p in losses[-zeros:]):
        return None
    before = losses[-1 - zeros] if zeros < len(losses) else None
    return losses[-zeros] if before is None or before.value > _SUDDEN else None


def _lasting(norms: Sequence[Point], least: int = 4) -> Point | None:
    """Return where gradient norms stop being finite for good; FP16's first steps are often skipped."""
    tail = 0
    while tail < len(norms) and not math.isfinite(norms[-1 - tail].value):
        tail += 1
    return norms[-tail] if tail >= least else None


@check(
    "AP020", "The loss scale has fallen to its minimum", Severity.ERROR,
    advice="""The forward pass itself overflows in FP16, so no scale helps, and a smaller initial_scale_power only fails
    sooner: use BF16, or keep the overflowing layers in FP32.""",
    paste='"bf16": {"enabled": true}, "fp16": {"enabled": false}',
    sources="deepspeedai/DeepSpeedExamples#418 deepspeedai/DeepSpeedExamples#419 hiyouga/LlamaFactory#251 "
            "modelscope/ms-swift#4374",
)  # fmt: skip
def scale_at_minimum(case: Case) -> Iterator[Evidence]:
    """A dynamic loss scale halves at each overflow. A few halvings at the start are normal; a scale at 1 and below,
    or a message that it cannot fall any further, means that every step overflows. Also read from a checkpoint's
    `scaler.pt`."""
    yield from said(case, [_SCALE_LOW])
    for log in case.logs:
        scales = log.series.scales
        falling = len(scales) > 2 and scales[0].value > scales[-1].value
        if falling and 0 <= scales[-1].value <= 1.0:
            last = scales[-1]
            yield Evidence(f"the loss scale fell from {scales[0].value:g} to {last.value:g}", log.place(last.line))
    if case.checkpoint is not None and (scale := case.checkpoint.scaler_scale) is not None and scale <= 1.0:
        yield Evidence(f"the loss scale is {scale:g}", f"{case.checkpoint.folder}/scaler.pt")
