"""Checks of tensors of different formats that meet, and of operators that lack a kernel for one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, patterns, said
from autoprec.doctor.logs import Said
from autoprec.formats import Format
from autoprec.records import Severity

_FLOATS = (
    r"(?:c10::|torch\.|torch\.cuda\.|at::)*(?:Half|BFloat16|Float|Double|float|double|half|bfloat16|float16|float32"
    r"|float64)(?:Tensor)?"
)
_SCALAR = re.compile(rf"expected scalar type ({_FLOATS}) but (?:found|got) ({_FLOATS})", re.IGNORECASE)
_OTHER_SCALAR = patterns(
    rf"input type \({_FLOATS}\) and (?:weight|bias) type \({_FLOATS}\) should be the same",
    rf"expected (?:object|tensor).{{0,60}}(?:scalar )?type .?{_FLOATS}.{{0,40}}but got .{{0,40}}{_FLOATS}",
    r"expected tensor for argument .{0,80}to have the same type as tensor for argument",
    r"expected attn_mask dtype to be bool or",
    r"expected query, key,? and value to have the same dtype",
    rf"expected (?:all tensors|dtype) .{{0,30}}{_FLOATS}.{{0,40}} got (?:dtype )?{_FLOATS}",
    r"index put requires the source and destination dtypes match",
    r"scatter\w*\(\): expected self\.dtype to be equal to src\.dtype",
    r"(?:query|key|value|tensors?) .{0,40}must have (?:the )?same dtype",
)
_MATS = patterns(
    r"(?:failed running call_function .{0,120})?mat1 and mat2 must have the same dtype",
    r"(?:expected )?(?:m1|self|a|mat1) and (?:m2|mat2|b)\s+(?:to|must) have the same dtype",
    r"expected both (?:inputs|vectors|matrices) to have (?:the )?same dtype",
)
_MIXED_NORM = re.compile(r"mixed dtype \(CPU\): expect (?:parameter|input)", re.IGNORECASE)
_NORM = re.compile(r"layer_?norm|rms_?norm|group_?norm|batch_?norm|\bnorm\(|_norm\b", re.IGNORECASE)
#: no operator has so long a name; without an end each sign of a line would be tried against all behind it
_KERNEL = re.compile(
    r"[\"'`]?(?P<op>\w[\w:<>. ]{0,119}?)[\"'`]? not implemented for [\"'`]*(?:torch\.)?"
    r"(?P<type>Half|BFloat16|Float8_\w+)",
    re.IGNORECASE,
)
_FLATTEN = patterns(
    r"must flatten tensors with (?:the )?(?:uniform|same) dtype",
    r"fsdp expects uniform original parameter dtype",
    r"(?:fsdp|fully_shard|fully sharded).{0,60}(?:uniform|same) (?:param\w* )?dtype",
)
_FLASH_ERROR = patterns(
    r"flash ?attention(?: 2(?:\.0)?)? only supports? (?:fp16|bf16)",
    r"flash ?attn\w* (?:only supports?|requires?) (?:fp16|bf16|float16|half)",
)
_FLASH_WARNING = patterns(
    r"flash attention 2(?:\.0)? only supports? torch\.float16 and torch\.bfloat16",
    r"expected query, key and value to all be of dtype: \{(?:Half|BFloat16)",
)
_AUTOCAST = re.compile(r"\b(?:bf16|fp16)\W{1,4}true|mixed_precision\W{1,4}(?:bf16|fp16)|amp\w* enabled")


def _in_norm(message: Said) -> bool:
    return bool(_NORM.search(message.frames(4)))


def _bf16(message: Said) -> bool:
    return "bfloat16" in message.text.lower()


def _says_norm(message: Said) -> bool:
    """Tell a norm's complaint: by the traceback's innermost lines; without one, by its usual pair of types."""
    if message.context:
        return _in_norm(message)
    return _bf16(message) or bool(_NORM.search(message.text))


@check(
    "AP014", "An operator was given FP16 or BF16 beside FP32", Severity.ERROR,
    advice="""Parts of the model are stored in different formats and run without autocast: adapters or a new head in
    FP32 on a base in FP16, or an input that was not cast. Run the forward pass under autocast, or cast the input to the
    weight's dtype.""",
    paste="with torch.autocast(device_type, dtype=torch.bfloat16): outputs = model(**batch)",
    sources="huggingface/peft#175 huggingface/peft#88 huggingface/transformers#1326 "
            "bitsandbytes-foundation/bitsandbytes#415 ShivamShrirao/diffusers#39",
)  # fmt: skip
def scalar_types(case: Case) -> Iterator[Evidence]:
    """ "expected scalar type Half but found Float" and its kin of convolutions, attention and index operators."""
    yield from said(case, [_SCALAR], only=lambda m: not _says_norm(m))
    yield from said(case, _OTHER_SCALAR)


@check(
    "AP015", "A matmul was given two formats", Severity.ERROR,
    advice="""A head, adapter or projector holds FP32 weights and is fed BF16 or FP16 (or the reverse) outside autocast:
    cast it to the model's dtype, or run under autocast. Half against BFloat16 comes from two autocast regions with
    different types around one weight: pass cache_enabled=False.""",
    paste="model.lm_head.to(model.dtype)  # or: hidden = hidden.to(layer.weight.dtype)",
    sources="hpcaitech/ColossalAI#6169 hiyouga/LlamaFactory#2022 shibing624/MedicalGPT#456 "
            "unslothai/unsloth#3723 InternLM/xtuner#772",
)  # fmt: skip
def matmul_types(case: Case) -> Iterator[Evidence]:
    """ "mat1 and mat2 must have the same dtype, but got Float and BFloat16", in the words of all versions of torch."""
    yield from said(case, _MATS)


@check(
    "AP016", "A norm was given a format other than its weights'", Severity.ERROR,
    advice="""Norm weights are FP32 and their input is BF16 (or the reverse), outside autocast. Run under autocast,
    which computes norms in FP32, or cast in the norm: `norm(x.to(norm.weight.dtype)).to(x.dtype)`.""",
    paste="with torch.autocast(device_type, dtype=torch.bfloat16): outputs = model(**batch)",
    sources="unslothai/unsloth#5313 intel/llm-on-ray#223 mlfoundations/open_clip#916 huggingface/lerobot#2146",
)  # fmt: skip
def norm_types(case: Case) -> Iterator[Evidence]:
    """A layer, RMS or group norm that raises "expected scalar type BFloat16 but found Float", or on CPU "mixed dtype
    (CPU): expect parameter to have scalar type of Float"."""
    yield from said(case, [_SCALAR], only=_says_norm)
    yield from said(case, [_MIXED_NORM])


@check(
    "AP017", "An operator has no kernel for this format here", Severity.ERROR,
    advice="""FP16 on a CPU with an older torch, most often because the model never reached the GPU: move it there,
    or use FP32 or BF16 on the CPU. For an operator on a GPU, compute that one in FP32 (a nested
    autocast(enabled=False) and .float()), or take a newer torch.""",
    paste='model.to("cuda")  # or on CPU: model.float()',
    sources="pytorch/pytorch#52291 AutoGPTQ/AutoGPTQ#101 AUTOMATIC1111/stable-diffusion-webui#1349 "
            "hiyouga/ChatGLM-Efficient-Tuning#37",
)  # fmt: skip
def no_kernel(case: Case) -> Iterator[Evidence]:
    """ "LayerNormKernelImpl" or "addmm_impl_cpu_" (or any other) "not implemented for 'Half'", BFloat16 or an FP8 type;
    the gradient scaler's own kernel is AP002."""
    yield from said(case, [_KERNEL], only=lambda m: "_amp_" not in m.text)


@check(
    "AP018", "FSDP was given parameters of several formats in one unit", Severity.ERROR,
    advice="""FSDP1 flattens a wrapped unit into one tensor. Store all its parameters in one dtype (cast the
    adapters, or load everything in FP32) and leave the computing to its MixedPrecision; or use FSDP2, which keeps
    parameters apart.""", paste="fsdp_config: {fsdp_version: 2}  # or: model = model.to(torch.float32) before wrapping",
    sources="huggingface/trl#1723 axolotl-ai-cloud/axolotl#1494 axolotl-ai-cloud/axolotl#1889 "
            "huggingface/peft#484 Lightning-AI/pytorch-lightning#20239",
)  # fmt: skip
def mixed_units(case: Case) -> Iterator[Evidence]:
    """ "Must flatten tensors with uniform dtype" (FSDP1) and "FSDP expects uniform original parameter dtype"
    (FSDP2); told beforehand where FSDP1 is asked for a checkpoint with weights in several formats."""
    yield from said(case, _FLATTEN)
    first = case.run.first("fsdp_version")
    fsdp = next((s for s in case.run.get("fsdp", "fsdp_config", "distributed_type", "use_fsdp")
                 if "fsdp" in f"{s.name}{s.value}".lower() and s.value not in (None, "", False, [], {}) and
                 (s.name != "distributed_type" or str(s.value).upper() == "FSDP")), None)  # fmt: skip
    if fsdp is None or case.checkpoint is None or (first is not None and first.value == 2):
        return
    formats = sorted(f for f in case.checkpoint.bytes_by_format if f in ("fp32", "bf16", "fp16"))
    if len(formats) > 1 and not case.run.stored:
        yield Evidence(
            f"{case.checkpoint.name} holds weights in {' and '.join(formats)}, and {fsdp.name} asks for FSDP",
            fsdp.place, Severity.WARNING,
        )  # fmt: skip


@check(
    "AP019", "FlashAttention was given FP32", Severity.ERROR,
    advice="""Its kernels take FP16 and BF16 only. Train under bf16=True, load with dtype=torch.bfloat16 for
    inference, or use attn_implementation="sdpa", which has a kernel for FP32. Norms that hand on FP32 (QK norms,
    PEFT's casts) need a cast back before the attention.""",
    paste='from_pretrained(name, attn_implementation="sdpa")  # or TrainingArguments(..., bf16=True)',
    sources="unslothai/unsloth#827 QwenLM/Qwen3#406 Dao-AILab/flash-attention#622 ali-vilab/UniAnimate-DiT#40",
)  # fmt: skip
def flash_fp32(case: Case) -> Iterator[Evidence]:
    """ "FlashAttention only support fp16 and bf16 data type" in a log; the warning that transformers gives at loading
    counts where nothing says autocast. Told beforehand where flash attention is asked with FP32 and no mixed
    precision."""
    yield from said(case, _FLASH_ERROR, only=lambda m: not _FLASH_WARNING[0].search(m.text))
    softened = bool(case.run.amp) or any(_AUTOCAST.search(log.folded) for log in case.logs)
    for found in said(case, _FLASH_WARNING):
        yield Evidence(found.text, found.place, Severity.NOTE if softened else Severity.WARNING)
    run = case.run
    for call, place in run.calls("from_pretrained", "from_config"):
        if not _flash(call.keywords.get("attn_implementation")):
            continue
        asked = str(call.keywords.get("dtype", call.keywords.get("torch_dtype")))
        if "float32" in asked and not run.amp:
            yield Evidence(f"attn_implementation={call.keywords['attn_implementation']!r} with {asked}", place)
    for s in run.get("attn_implementation", "flash_attention", "use_flash_attention_2", "flash_attn", "attn_impl"):
        if (
            (_flash(s.value) or s.on or str(s.value) == "fa2")
            and not run.amp
            and Format.FP32 in run.stored
            and not s.place.rpartition(":")[0].endswith(".py")
        ):
            yield Evidence(f"{s.name}={s.value} with {run.stored[Format.FP32].text} and no bf16 or fp16", s.place)


def _flash(value: object) -> bool:
    return "flash" in str(value).lower()
