"""Settings that tutorials still show and libraries have dropped or renamed; the rows of docs/retired.md, one code
each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autoprec.doctor.case import Case, Evidence, check
from autoprec.doctor.scripts import Call
from autoprec.records import Severity

__all__ = ["RETIRED", "Retired"]

_TRAINER_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer"
_AMP_DOCS = "https://docs.pytorch.org/docs/stable/amp.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A retired setting: how it is told in settings, calls and logs, and what to write instead."""

    code: str
    title: str
    severity: Severity
    instead: str
    paste: str
    source: str
    names: tuple[str, ...] = ()  #: settings
    calls: Callable[[Call], bool] | None = None
    both: tuple[str, ...] = ()  #: settings of which one is no trouble, and all are
    log: str = ""  #: what a program says of it, as a pattern
    when: Callable[[object], bool] = lambda value: value is not None  #: of a setting's value


def _apex(level: str) -> Callable[[Call], bool]:
    def found(call: Call) -> bool:
        return (
            call.last == "initialize" and "deepspeed" not in call.name and str(call.keywords.get("opt_level")) == level
        )

    return found


def _cuda_amp(*names: str) -> Callable[[Call], bool]:
    full = {
        f"{prefix}.{name}"
        for name in names
        for prefix in ("torch.cuda.amp", "cuda.amp", "torch.cuda.amp.autocast_mode")
    }
    return lambda call: call.name in full


RETIRED = (
    Retired(
        code="AP101", title="Apex amp, opt_level O1", severity=Severity.WARNING, calls=_apex("O1"),
        log=r"opt_level\W{1,12}O1\b", names=("opt_level", "amp_level", "apex_opt_level"), when=lambda v: str(v) == "O1",
        instead="Deprecated since 2020. torch.autocast does the same.",
        paste='with torch.autocast("cuda", dtype=torch.float16): ...', source="NVIDIA/apex#818",
    ),
    Retired(
        code="AP102", title="Apex amp, opt_level O2", severity=Severity.WARNING, calls=_apex("O2"),
        log=r"opt_level\W{1,12}O2\b", names=("opt_level", "amp_level", "apex_opt_level"), when=lambda v: str(v) == "O2",
        instead="Deprecated since 2020. O2 kept FP32 norms and master weights: keep FP32 weights, torch.autocast "
                "in FP16 and a GradScaler.",
        paste='scaler = torch.amp.GradScaler("cuda")  # weights in FP32, forward under '
              'torch.autocast', source="NVIDIA/apex#818",
    ),
    Retired(
        code="AP103", title="Apex amp, opt_level O3", severity=Severity.WARNING, calls=_apex("O3"),
        log=r"opt_level\W{1,12}O3\b", names=("opt_level", "amp_level", "apex_opt_level"), when=lambda v: str(v) == "O3",
        instead="Deprecated since 2020. O3 is model.half().", paste="model = model.half()", source="NVIDIA/apex#818",
    ),
    Retired(
        code="AP104", title="torch.cuda.amp.autocast", severity=Severity.NOTE, calls=_cuda_amp("autocast"),
        log=r"torch\.cuda\.amp\.autocast\(args\.{3}\)`? is deprecated",
        instead="Deprecated since PyTorch 2.4; always say the dtype.",
        paste='torch.autocast("cuda", dtype=torch.bfloat16)', source=_AMP_DOCS,
    ),
    Retired(
        code="AP105", title="torch.cuda.amp.GradScaler", severity=Severity.NOTE,
        calls=_cuda_amp("GradScaler"),
        log=r"torch\.cuda\.amp\.GradScaler\(args\.{3}\)`? is deprecated",
        instead="Deprecated since PyTorch 2.4; BF16 needs none.", paste='torch.amp.GradScaler("cuda")',
        source=_AMP_DOCS,
    ),
    Retired(
        code="AP106", title="torch.cuda.amp.custom_fwd and custom_bwd", severity=Severity.NOTE,
        calls=_cuda_amp("custom_fwd", "custom_bwd"),
        log=r"torch\.cuda\.amp\.custom_[fb]wd\(args\.{3}\)`? is deprecated",
        instead="Deprecated since PyTorch 2.4.", paste='torch.amp.custom_fwd(device_type="cuda")', source=_AMP_DOCS,
    ),
    Retired(
        code="AP107", title="fp16_backend and half_precision_backend", severity=Severity.ERROR,
        names=("fp16_backend", "half_precision_backend"),
        log=r"unexpected keyword argument '(?:fp16_backend|half_precision_backend)'",
        instead="Removed: a TypeError in transformers 5. Leave it out; autocast is all there is.",
        paste="TrainingArguments(..., fp16=True)", source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP108", title="fp16_opt_level", severity=Severity.ERROR, names=("fp16_opt_level",),
        log=r"unexpected keyword argument 'fp16_opt_level'",
        instead="Removed with Apex: a TypeError in transformers 5. fp16=True is autocast with a GradScaler.",
        paste="TrainingArguments(..., fp16=True)", source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP109", title="evaluation_strategy", severity=Severity.ERROR, names=("evaluation_strategy",),
        log=r"unexpected keyword argument 'evaluation_strategy'",
        instead="Removed in transformers 5: a TypeError.", paste='TrainingArguments(..., '
        'eval_strategy="steps")', source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP110", title="no_cuda", severity=Severity.ERROR, names=("no_cuda", "use_mps_device"),
        log=r"unexpected keyword argument '(?:no_cuda|use_mps_device)'",
        instead="Removed in transformers 5: a TypeError.", paste="TrainingArguments(..., "
        "use_cpu=True)", source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP111", title="gradient_checkpointing", severity=Severity.NOTE, names=("gradient_checkpointing",),
        when=lambda v: v is True, log=r"`?gradient_checkpointing`? is deprecated",
        instead="A deprecated alias in transformers 5.", paste="TrainingArguments(..., "
        "activation_checkpointing=True)", source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP112", title="torchdynamo", severity=Severity.ERROR, names=("torchdynamo",),
        log=r"unexpected keyword argument 'torchdynamo'",
        instead="Removed in transformers 5: a TypeError.", paste="TrainingArguments(..., "
        "torch_compile=True)", source=_TRAINER_DOCS,
    ),
    Retired(
        code="AP113", title="torch_dtype of from_pretrained", severity=Severity.NOTE, log=r"`?torch_dtype`? is "
        r"deprecated! use `?dtype`?",
        calls=lambda call: call.last in ("from_pretrained", "from_config") and "torch_dtype" in call.keywords,
        instead="Still read, the old name. Without either, weights come in the checkpoint's own format.",
        paste="from_pretrained(name, dtype=torch.float32)", source="huggingface/transformers#42883",
    ),
    Retired(
        code="AP114", title="DeepSpeed's amp section", severity=Severity.ERROR, names=("amp.enabled",), when=lambda
        v: v is True, log=r"deepspeed.{0,60}\bamp\b.{0,40}(?:removed|no longer supported)",
        instead="Refused: Apex is gone from DeepSpeed.", paste='"torch_autocast": {"enabled": true, "dtype": '
        '"bfloat16"}',
        source="https://www.deepspeed.ai/docs/config-json/",
    ),
    Retired(
        code="AP115", title="fp8_autocast of Transformer Engine", severity=Severity.NOTE,
        calls=lambda call: call.last == "fp8_autocast", log=r"fp8_autocast.{0,20}deprecated",
        instead="Deprecated in Transformer Engine 2.", paste="te.autocast(recipe=recipe)",
        source="https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html",
    ),
    Retired(
        code="AP116", title="DisableFP8Layer and DisableFP8GEMM", severity=Severity.NOTE,
        names=("disablefp8layer", "disablefp8gemm", "disablefp8layer.enabled", "disablefp8gemm.enabled"),
        log=r"DisableFP8(?:Layer|GEMM).{0,40}deprecated",
        instead="Deprecated aliases of Transformer Engine's debug features.", paste="DisableQuantizationLayer: "
        "{enabled: True}",
        source="https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/debug.html",
    ),
    Retired(
        code="AP117", title="enabled_precisions of torch_tensorrt", severity=Severity.WARNING,
        calls=lambda call: "enabled_precisions" in call.keywords,
        instead="Read no more on the Dynamo path: the exported program's own types decide.",
        paste="autoprec export plan.json --to tensorrt", source="https://docs.pytorch.org/TensorRT/",
    ),
    Retired(
        code="AP118", title="allow_tf32 beside fp32_precision", severity=Severity.ERROR,
        both=("allow_tf32", "fp32_precision"),
        log=r"mix of (?:the )?legacy and new APIs? to set (?:the )?TF32",
        instead="Reading one after setting the other raises. Use one interface, fp32_precision from PyTorch 2.9 on.",
        paste='torch.backends.cuda.matmul.fp32_precision = "tf32"', source="https://docs.pytorch.org/docs/stable/notes/cuda.html",
    ),
    Retired(
        code="AP119", title="custom_register_path of ms-swift", severity=Severity.NOTE, names=("custom_register_path",),
        instead="An alias kept from 3.x.", paste="--external_plugins plugin.py", source="https://swift.readthedocs.io/en/latest/",
    ),
)  # fmt: skip


def _finder(row: Retired) -> Callable[[Case], Iterator[Evidence]]:
    pattern = re.compile(row.log, re.IGNORECASE) if row.log else None

    def find(case: Case) -> Iterator[Evidence]:
        for s in case.run.get(*row.names):
            if row.when(s.value):
                yield Evidence(f"{s.name}={s.value}", s.place)
        together = [case.run.first(name) for name in row.both]
        if together and all(together) and (last := together[-1]):
            yield Evidence(" and ".join(row.both), last.place)
        for file in case.run.files:
            for call in file.script.calls if file.script is not None and row.calls else ():
                if row.calls is not None and row.calls(call):
                    yield Evidence(f"{call.name}()", f"{file.path}:{call.line}")
        for log in case.logs if pattern else ():
            found = next((i for i, line in log.distinct if pattern and pattern.search(line)), None)
            if found is not None:
                yield Evidence(log.lines[found].strip()[:200], log.place(found))

    find.__doc__ = row.instead
    return find


for _row in RETIRED:
    check(
        _row.code, f"Retired: {_row.title}", _row.severity, advice=_row.instead, paste=_row.paste, sources=_row.source
    )(_finder(_row))
