"""Checks of what a GPU cannot do, or does without speed: BF16 before Ampere, TF32, FP8 and its recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.catalog import catalogue_match
from autoprec.doctor.case import Case, Evidence, check, patterns, said
from autoprec.doctor.logs import Log
from autoprec.formats import Format, Fp8Recipe
from autoprec.records import Severity, Support

__all__ = ["asked_format"]

_NO_BF16 = patterns(
    r"your setup doesn'?t support bf16",
    r"--?tf32 requires ampere",
    r"bf16 mixed precision requires (?:pytorch|a gpu|a supported)",
    r"current cuda device does not support bfloat16",
    r"bfloat16 is only supported on gpus with compute capability",
    r"bf(?:loat)?16 (?:precision )?(?:was )?(?:requested|is not supported|not supported|is not available"
    r"|unsupported)"
    r"(?! on mps)(?!.{0,20}\bmps\b)",
    r"(?:gpu|device|hardware|card|setup) (?:does not|doesn'?t) support (?:torch\.)?b(?:f"
    r"|float)16(?!.{0,80}falling back)",
)
_NO_FP8 = patterns(
    r"(?:torch\.)?_scaled_mm`? is only supported on",
    r"fp8.{0,40}(?:is |are )?only supported on (?:gpus?|devices?|cuda).{0,40}(?:8\.9|9\.0|sm_?89|sm_?90)",
    r"(?:compute )?capability (?:of )?8\.9 or higher (?:is )?required",
    r"(?:the current device has [^.]{0,80})?insufficient for fp8",
    r"fp8e4nv (?:data type is )?not supported",
    r"float8.{0,60}(?:only supported|only works|requires?).{0,30}(?:>=? ?8\.9|sm_?89|sm_?90|9\.0)",
    r"fp8.{0,60}requires? .{0,40}compute capability",
    r"(?:fp8|float8) (?:is |are )?not supported (?:on|by|for) (?:this|the|your)",
    r"pertensor quantization only works for cuda>=8\.9",
)
_ROWWISE = patterns(
    r"per-?_?row (?:quantization|scaling|granularity).{0,40}(?:only works|only supported|requires|not supported)",
    r"row-?wise (?:scaling|scaled|quantization|fp8).{0,60}(?:not (?:currently )?supported|only (?:supported"
    r"|available|works)|requires)",
    r"use_rowwise == false",
    r"f8f8bf16_rowwise",
    r"only bf16 high precision output types are supported for row-?wise",
    r"for row-?wise scaling",
)
_CUBLAS = re.compile(r"CUBLAS_STATUS_(?:NOT_SUPPORTED|INVALID_VALUE).{0,200}cublasLtMatmul", re.IGNORECASE)
_FP8_NEAR = re.compile(r"_scaled_mm|float8|fp8|row_?wise|per_?row", re.IGNORECASE)
#: GPU names in logs, in the words of nvidia-smi and torch
_GPU = re.compile(
    r"(?:tesla |nvidia |quadro |geforce |a?m?d? ?instinct )+[a-z0-9][\w -]{1,40}|\b(?:t4|v100|p100|p40|k80|a100"
    r"|h100|h200|b200|l4|l40s|a10g?)\b(?:-\w+)*",
    re.IGNORECASE,
)
_OLD = re.compile(r"\b(?:t4|v100|p100|p40|p4|k80|m60|m40|titan (?:v|xp|rtx)|(?:rtx |geforce )?20[678]0(?: ti)?"
                  r"|gtx ?1[06]\d0|quadro rtx [4568]000|rtx 20\d0)\b",
                  re.IGNORECASE)  # fmt: skip
_BF16_ON = re.compile(
    r"\bbf16\b[\"']?(?:\s*[:=]\s*|\s+)[\"']?true|mixed[_ ]precision[\"']?\s*[:=]\s*[\"']?bf16|precision\W{1,6}bf16"
    r"|--bf16\b(?! false)"
    r"|dtype\W{1,3}(?:torch\.)?bfloat16|bfloat16 automatic mixed precision|using bf(?:loat)?16|in "
    r"bf(?:loat)?16\b", re.IGNORECASE)  # fmt: skip


def asked_format(case: Case, choice: Format) -> tuple[str, str] | None:
    """Return how a format is asked for and where, to compute or to store in; None where it is not."""
    placed = case.run.amp.get(choice) or case.run.stored.get(choice)
    return (placed.text, placed.place) if placed else None


@check(
    "AP006", "BF16 is only emulated on this device", Severity.WARNING,
    advice="""Before compute capability 8.0 BF16 is shifted to FP32 and back, without tensor cores: no error, and slower
    than FP32. `torch.cuda.is_bf16_supported()` says True all the same. Use FP16 with a GradScaler, or FP32.""",
    paste="torch.cuda.is_bf16_supported(including_emulation=False)",
    sources="pytorch/pytorch#148322 pytorch/pytorch#124996 MakazhanAlpamys/Soup#387 MakazhanAlpamys/Soup#385 "
            "huggingface/candle#3607",
)  # fmt: skip
def emulated_bf16(case: Case) -> Iterator[Evidence]:
    """BF16 asked on a device that emulates it (--device, or a T4, V100 or RTX 20 named in the log beside BF16); a
    script that decides by `is_bf16_supported()`, which counts emulation as support."""
    device = case.device
    old = device is not None and device.kind == "cuda" and device.supports(Format.BF16) is not Support.NATIVE
    if old and device and (asked := asked_format(case, Format.BF16)):
        yield Evidence(f"{asked[0]}, and bf16 on {device.name} is {device.supports(Format.BF16)}", asked[1])
    for call, place in case.run.calls("is_bf16_supported", "is_torch_bf16_gpu_available"):
        if call.keywords.get("including_emulation") is not False:
            yield Evidence(f"{call.name}() says True on a T4 or V100 too", place, None if old else Severity.NOTE)
    for log in case.logs:
        yield from _old_gpu(log)


def _old_gpu(log: Log) -> Iterator[Evidence]:
    asked = next((i for i, line in log.distinct if _BF16_ON.search(line)), None)
    if asked is None:
        return
    for _, line in log.distinct:
        match = _GPU.search(line)
        name = match[0] if match else None
        old = _OLD.search(name) if name else None
        if (
            name
            and old
            and not re.search(
                r"falling back|fallback|instead|cast(?:ing)? .{0,20}to (?:torch\.)?float16", line, re.IGNORECASE
            )
        ):
            known = catalogue_match(name) or catalogue_match(f"Tesla {old[0]}")
            if known is None or known.profile.supports(Format.BF16) is not Support.NATIVE:
                yield Evidence(f"{line.strip()[:120]}; and {log.lines[asked].strip()[:120]}", log.place(asked))
                return


@check(
    "AP007", "This set-up refuses BF16 or TF32", Severity.ERROR,
    advice="""No CUDA build of torch, no GPU, or one before Ampere. Use FP16 with a GradScaler and tf32=False there;
    with no GPU at all, use_cpu=True; with an Ampere GPU that is not seen, install the CUDA build of torch.""",
    paste="TrainingArguments(..., fp16=True, bf16=False, tf32=False)",
    sources="tatsu-lab/stanford_alpaca#133 lm-sys/FastChat#399 lm-sys/FastChat#1191 OptimalScale/LMFlow#88 "
            "databrickslabs/dolly#11",
)  # fmt: skip
def refused_bf16(case: Case) -> Iterator[Evidence]:
    """ "Your setup doesn't support bf16/gpu", "--tf32 requires Ampere" and what accelerate, torch, torchtune and
    vLLM say instead; told beforehand from tf32 on a device without it, and from bf16 on a CPU without use_cpu."""
    yield from said(case, _NO_BF16)
    device = case.device
    if device is None:
        return
    for s in case.run.get("tf32"):
        if s.on and device.tf32.support is not Support.NATIVE:
            yield Evidence(f"tf32={s.value}, and {device.name} has no TF32 ({device.tf32.reason})", s.place)
    if device.kind == "cpu" and case.run.on_cpu is None:
        for s in case.run.get("bf16"):
            if s.on and not any(True for _ in case.run.get("zero_optimization", "mixed_precision")):
                yield Evidence(f"bf16={s.value} on a CPU without use_cpu=True", s.place)


@check(
    "AP008", "This device has no FP8", Severity.ERROR,
    advice="""FP8 matmuls need compute capability 8.9 (L4, L40S, RTX 40) or 9.0 (H100), or AMD MI300 and later. Use
    BF16 on this device; accelerate falls back to FP16 silently.""",
    paste="mixed_precision: bf16",
    sources="Comfy-Org/ComfyUI#5036 kijai/ComfyUI-HunyuanVideoWrapper#98 pytorch/pytorch#118703 pytorch/pytorch#164251",
)  # fmt: skip
def no_fp8(case: Case) -> Iterator[Evidence]:
    """ "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9" and the words of
    Transformer Engine, torchao, accelerate, transformers and Triton; told beforehand from FP8 asked of such a
    --device."""
    yield from said(case, _NO_FP8, only=lambda m: not any(p.search(m.text) for p in _ROWWISE))
    device, asked = case.device, asked_format(case, Format.FP8)
    if device is not None and device.supports(Format.FP8) is not Support.NATIVE and asked:
        yield Evidence(f"{asked[0]}, and {device.name} has no FP8", asked[1])


@check(
    "AP009", "Rowwise FP8 has no kernel on this device", Severity.ERROR,
    advice="""Rowwise kernels came for H100 first, for L4 and RTX 40 with torch 2.7, and fail on RTX 50 with some
    releases. Use the tensorwise recipe, or a newer torch; `autoprec probe` tries both on the device.""",
    paste='Float8LinearConfig.from_recipe_name("tensorwise")',
    sources="pytorch/pytorch#130359 pytorch/pytorch#192707 pytorch/ao#2566 NVIDIA/TensorRT-LLM#2229",
)  # fmt: skip
def no_rowwise(case: Case) -> Iterator[Evidence]:
    """torchao's and torch's refusals of rowwise scaling, and CUBLAS_STATUS_NOT_SUPPORTED below a scaled matmul; told
    beforehand where rowwise is asked of a --device for which only tensorwise is known to run."""
    yield from said(case, _ROWWISE)
    yield from said(case, [_CUBLAS], only=lambda m: bool(_FP8_NEAR.search(m.text + "\n" + m.frames(30))))
    recipes = case.run.get("recipe_name", "fp8_recipe", "fp8_recipe_name", "float8.recipe_name", "recipe")
    asked = next((s for s in recipes if "row" in str(s.value).lower()), None)
    text, place = (f"{asked.name}={asked.value}", asked.place) if asked else ("", "")
    for call, where in case.run.calls("from_recipe_name", "PerRow", "Float8LinearConfig"):
        if call.last == "PerRow" or "row" in f"{call.args}{dict(call.keywords)}".lower():
            text, place = f"{call.name}({', '.join(map(repr, call.args))})", where
    if text and (device := case.device) and device.kind == "cuda" and device.supports(Format.FP8) is Support.NATIVE:
        if Fp8Recipe.ROWWISE not in device.fp8_recipes:
            known = f"on {device.name} only {', '.join(device.fp8_recipes)} is known to run with every torch"
            yield Evidence(f"{text}, and {known}", place, Severity.WARNING)
