"""Checks of speed that does not come: FP8 that is slower, odd dimensions, small batches, data that comes late."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, said
from autoprec.doctor.logs import Log
from autoprec.formats import Format
from autoprec.records import Severity, Support

_SLOWER = re.compile(
    r"(?:fp8|float8|transformer ?engine)[^.\n]{0,60}\b(?:is|was|are|runs?|being|much|even|got)?\s*slower "
    r"than[^.\n]{0,30}(?:bf16|fp16|bfloat16|float16|fp32|half)",
    re.IGNORECASE,
)
#: 'fp8: 2.07 ms', 'bf16 | 0.57 ms', 'fp16 step time 7.10 s', 'fp8 9200 tokens/s'. No figure is longer; each digit of a
#: long run would be tried as its end
_TIMED = re.compile(
    r"\b(?P<kind>fp8|float8|bf16|bfloat16|fp16|float16)\b[^\d\n]{0,40}?(?P<value>\d[\d,]{0,19}(?:\.\d{0,19})?)\s*(?P<unit>us|µs|ms|msec|s|sec|seconds"
    r"|tok(?:ens)?/s(?:ec)?|it/s|tps|samples/s|tflops|k tok/s)\b",
    re.IGNORECASE,
)
_RATES = ("tok", "it/s", "tps", "samples", "tflops", "k tok")
_WORKERS = re.compile(r"does not have many workers which may be a bottleneck", re.IGNORECASE)
_COMPILED = ("compile", "torch_compile", "dynamo_backend", "compile_model", "model_compile_enabled")
#: torch._scaled_mm takes multiples of 16; 16-bit tensor cores work on 16 bytes, which is 8 values
_FP8_STEP, _HALF_STEP = 16, 8
#: tokens a step under which launching kernels is what takes the time (R22 of the rules: batches of 8 to 32 short
#: examples ran at 0.5 to 0.9 of FP32's speed on an A100, huggingface/transformers#15026)
_FEW_TOKENS = 512
#: of a loop's time spent waiting, from which more workers pay
_WAITING = 0.1
#: of a step's matmul work that low precision should do (mission row 24)
_TENSOR_CORES = 0.8


@check(
    "AP010", "FP8 is slower than 16 bits here", Severity.WARNING,
    advice="""Casts cost more than small matmuls save. FP8 pays from about 4096 wide layers and thousands of tokens a
    step, and torchao's only under torch.compile (0.23 of BF16's speed without, in nanochat). Leave small layers in
    BF16: `autoprec recommend MODEL --device D` says which pay.""",
    paste="model = torch.compile(model)",
    sources="NVIDIA/TransformerEngine#445 pytorch/ao#572 meta-pytorch/float8_experimental#280 "
            "huggingface/accelerate#1647 "
    "modelscope/DiffSynth-Studio#1055 sgl-project/sglang#29002",
)  # fmt: skip
def slow_fp8(case: Case) -> Iterator[Evidence]:
    """A log that times FP8 and a 16-bit format side by side and shows FP8 behind, or says so; torchao's FP8 in a
    script or configuration without torch.compile; FP8 asked for a model whose matrices are mostly too small for it."""
    for log in case.logs:
        yield from _timed(log)
    asked = case.run.amp.get(Format.FP8)
    if asked is None:
        return
    backends = {str(s.value).lower() for s in case.run.get("backend", "fp8_config.backend", "precision")}
    engine = "fp8_autocast" in asked.text or any(b == "te" or "transformer" in b for b in backends)
    compiled = any(True for _ in case.run.calls("compile")) or any(
        s.on or (isinstance(s.value, str) and s.value.lower() not in ("no", "false", "none", ""))
        for s in case.run.get(*_COMPILED)
    )
    if not compiled and not engine:
        yield Evidence(f"{asked.text} and no torch.compile", asked.place)
    matrices = [shape for _, shape in case.checkpoint.matrices] if case.checkpoint else []
    work = sum(n * k for n, k in matrices)
    small = sum(n * k for n, k in matrices if (n <= 1024 and k <= 4096) or n % _FP8_STEP or k % _FP8_STEP)
    if work and small > work / 2:
        yield Evidence(
            f"{100 * small / work:.0f} % of the weights are in matrices too small or odd for FP8 (torchao's "
            f"tensorwise filter)",
            asked.place,
        )


def _timed(log: Log) -> Iterator[Evidence]:
    best: dict[tuple[str, bool], tuple[float, int]] = {}
    for index, line in enumerate(log.lines):
        for match in _TIMED.finditer(line):
            unit = match["unit"].lower()
            rate = unit.startswith(_RATES)
            factor = {"us": 1e-3, "µs": 1e-3, "s": 1e3, "sec": 1e3, "seconds": 1e3}.get(unit, 1.0)
            value = float(match["value"].replace(",", "")) * (1.0 if rate else factor)
            kind = "fp8" if match["kind"].lower() in ("fp8", "float8") else "16 bits"
            known = best.get((kind, rate))
            if known is None or (value > known[0]) == rate:
                best[kind, rate] = value, index
        if _SLOWER.search(line) and not re.search(r"\b(?:may|might|can|could|if|not) ", line, re.IGNORECASE):
            yield Evidence(line.strip()[:200], log.place(index))
            return
    for rate in (False, True):
        eight, half = best.get(("fp8", rate)), best.get(("16 bits", rate))
        if (
            eight
            and half
            and (eight[0] < half[0] if rate else eight[0] > half[0])
            and max(eight[0], half[0]) < 100 * min(eight[0], half[0])
        ):
            yield Evidence(
                f"{log.lines[eight[1]].strip()[:100]}; {log.lines[half[1]].strip()[:100]}", log.place(eight[1])
            )
            return


@check(
    "AP026", "Dimensions keep tensor cores from their rate", Severity.NOTE,
    advice="""16-bit tensor cores want multiples of 8 values (64 on A100 and later), FP8 multiples of 16, which it
    refuses otherwise. Pad the vocabulary or the width to the size shown.""",
    paste="model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)",
    sources="https://arxiv.org/abs/2401.14489",
)  # fmt: skip
def odd_dimensions(case: Case) -> Iterator[Evidence]:
    """Matrices of the model whose sides do not divide by 8, with the layer and the padded size; by 16 where FP8 is
    asked, and then a warning."""
    if case.checkpoint is None:
        return
    fp8 = case.run.amp.get(Format.FP8) is not None
    step = _FP8_STEP if fp8 else _HALF_STEP
    odd = [(name, size) for name, shape in case.checkpoint.matrices for size in shape if size % step and size > step]
    if odd:
        name, size = max(odd, key=lambda row: row[1])
        yield Evidence(
            f"{len({n for n, _ in odd})} matrices with a side that does not divide by {step}; {name} has {size}: "
            f"pad it to {-(-size // step) * step}",
            case.checkpoint.name, Severity.WARNING if fp8 else None,
        )  # fmt: skip


@check(
    "AP027", "The batch is too small to be compute-bound", Severity.NOTE,
    advice="""With a few hundred tokens a step launching kernels takes the time, and no format makes it faster. Raise
    the micro-batch, pack short examples, or compile with CUDA graphs.""",
    paste="TrainingArguments(..., per_device_train_batch_size=16, gradient_accumulation_steps=1)",
    sources="huggingface/transformers#15026",
)  # fmt: skip
def small_batch(case: Case) -> Iterator[Evidence]:
    """Fewer than 512 tokens a step, by batch and length in the settings, while mixed precision is asked."""
    run = case.run
    batch = run.number("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu")
    length = run.number("max_seq_length", "max_length", "seq_len", "block_size", "cutoff_len", "sequence_len")
    if batch and length and run.amp and batch * length < _FEW_TOKENS:
        yield Evidence(f"{batch:g} x {length:g} = {batch * length:g} tokens a step", run.files[0].path)


@check(
    "AP028", "The step waits for data", Severity.WARNING,
    advice="""The device is idle while the next batch is made. Give the loader workers and pinned memory, and
    tokenize before the training.""",
    paste="TrainingArguments(..., dataloader_num_workers=4, dataloader_pin_memory=True)",
    sources="https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
)  # fmt: skip
def late_data(case: Case) -> Iterator[Evidence]:
    """Measured by --trace where the workload reads from a DataLoader: more than a tenth of the time. Lightning's
    warning of few workers, and no workers in the settings, are notes."""
    trace = case.trace
    if trace is not None and trace.waiting_share is not None and trace.waiting_share > _WAITING:
        yield Evidence(
            f"{100 * trace.waiting_share:.0f} % of a loop's time is waiting for data ({trace.waiting_reason})",
            "the traced steps",
        )
    for found in said(case, [_WORKERS], most=1):
        yield Evidence(found.text, found.place, Severity.NOTE)
    for s in case.run.get("dataloader_num_workers"):
        if s.value == 0:
            yield Evidence(f"{s.name}=0: batches are made between steps", s.place, Severity.NOTE)


@check(
    "AP029", "Matmuls stay in FP32 though low precision is asked", Severity.WARNING,
    advice="""Tensor cores idle. Something casts to FP32 before a matmul: autocast(enabled=False), a .float() in the
    model, or a custom operator that autocast does not know.""",
    paste="autoprec verify plan.json MODEL  # audits each operator",
    sources="https://docs.pytorch.org/docs/stable/amp.html",
)  # fmt: skip
def wide_matmuls(case: Case) -> Iterator[Evidence]:
    """Measured by --trace: less than 80 % of a step's matmul calls ran in the format that was asked."""
    trace = case.trace
    if (
        trace is not None
        and trace.low_precision_share is not None
        and trace.low_precision_share < _TENSOR_CORES
        and trace.format != "fp32"
    ):
        yield Evidence(
            f"{100 * trace.low_precision_share:.0f} % of the matmul calls ran in {trace.format}", "the traced step"
        )


@check(
    "AP030", "TF32 is off on a device that has it", Severity.NOTE,
    advice="""An FP32 run on an Ampere or later data-centre card gains most from TF32, at no risk to range.""",
    paste="TrainingArguments(..., tf32=True)",
    sources="https://docs.pytorch.org/docs/stable/notes/cuda.html",
)  # fmt: skip
def tf32_off(case: Case) -> Iterator[Evidence]:
    """No mixed precision in the settings, and a --device whose TF32 peak is above its FP32 peak."""
    run, device = case.run, case.device
    if (
        device is None
        or device.tf32.support is not Support.NATIVE
        or run.amp
        or not run.trains
        or any(s.on for s in run.get("tf32"))
    ):
        return
    peaks = device.peak_tflops
    if peaks.get("tf32", 0) > 1.2 * peaks.get("fp32", 1) and not any(
        True for _ in run.calls("set_float32_matmul_precision")
    ):
        yield Evidence(
            f"{device.name}: {peaks['tf32']:g} TFLOP/s in TF32, {peaks['fp32']:g} in FP32", run.files[0].path
        )
