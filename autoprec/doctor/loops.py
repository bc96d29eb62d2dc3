"""Checks of training loops and arguments that contradict themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, said
from autoprec.formats import Format
from autoprec.records import Severity

_BOTH = re.compile(
    r"at most one of fp16 and bf16|(?:fp16 and bf16|bf16 and fp16) (?:cannot|can not|can't) (?:both )?be"
    r"|cannot.{0,20}both fp16 and bf16",
    re.IGNORECASE,
)
_BCE = re.compile(r"binary_cross_entropy and torch\.nn\.BCELoss are unsafe to autocast", re.IGNORECASE)
_NO_GPU_FP16 = re.compile(
    r"fp16 mixed precision (?:training with amp or apex|requires a gpu)(?!.{0,12}mps)", re.IGNORECASE
)
_CLIP = ("clip_grad_norm_", "clip_grad_value_", "clip_grad_norm")


@check(
    "AP031", "FP16 and BF16 are asked at once", Severity.ERROR,
    advice="Choose one: BF16 where it is native, else FP16.",
    paste="TrainingArguments(..., bf16=True, fp16=False)",
    sources="https://huggingface.co/docs/transformers/main_classes/trainer",
)  # fmt: skip
def both_formats(case: Case) -> Iterator[Evidence]:
    """ "At most one of fp16 and bf16 can be True", or both switched on in one file."""
    yield from said(case, [_BOTH])
    for file in case.run.files:
        on = {c: next((s for s in file.get(c, f"{c}.enabled") if s.on), None) for c in ("fp16", "bf16")}
        if (half := on["fp16"]) and (brain := on["bf16"]) and file.script is None:
            yield Evidence(f"{half.name}={half.value} and {brain.name}={brain.value}", half.place)
        for call in file.script.calls if file.script is not None else ():
            if call.keywords.get("fp16") is True and call.keywords.get("bf16") is True:
                yield Evidence(f"{call.name}(fp16=True, bf16=True)", f"{file.path}:{call.line}")


@check(
    "AP032", "FP16 gradients without a loss scale", Severity.WARNING,
    advice="""Gradients under 6e-8 become 0 in FP16. Scale the loss: scaler.scale(loss).backward(),
    scaler.step(optimizer), scaler.update(). BF16 needs none.""",
    paste='scaler = torch.amp.GradScaler("cuda")',
    sources="https://docs.pytorch.org/docs/stable/notes/amp_examples.html",
)  # fmt: skip
def no_scaler(case: Case) -> Iterator[Evidence]:
    """A loop of one's own (a `.backward()`) under autocast in FP16 and no GradScaler anywhere; with --trace in FP16, a
    warning where more than a tenth of the gradient is lost without one."""
    run = case.run
    asked = run.amp.get(Format.FP16)
    own = [
        (c, p)
        for c, p in run.calls("backward")
        if c.receiver not in ("accelerator", "self.accelerator", "fabric", "scaler", "engine", "model_engine")
    ]
    scaled = run.scaler is not None or any(True for _ in run.calls("scale"))
    if asked and own and "autocast" in asked.text and not scaled and run.masters is None and not _helped(case):
        yield Evidence(f"{asked.text}, then {own[0][0].receiver or 'loss'}.backward() as it is", own[0][1])


def _helped(case: Case) -> bool:
    return case.run.imports("accelerate", "lightning", "pytorch_lightning", "fairscale", "apex")


@check(
    "AP033", "Gradients are clipped while they are scaled", Severity.WARNING,
    advice="""The norm is that of gradients times the loss scale, so clipping takes nearly all of them away. Call
    scaler.unscale_(optimizer) before it.""",
    paste="scaler.unscale_(optimizer)  # before clip_grad_norm_",
    sources="https://docs.pytorch.org/docs/stable/notes/amp_examples.html",
)  # fmt: skip
def clipped_scaled(case: Case) -> Iterator[Evidence]:
    """`clip_grad_norm_` in a script that scales its loss and never calls `unscale_`."""
    scaled = any("scale" in c.name for c, _ in case.run.calls("scale"))
    if not scaled or case.run.scaler is None or any(True for _ in case.run.calls("unscale_")) or _helped(case):
        return
    for call, place in case.run.calls(*_CLIP):
        yield Evidence(f"{call.name}() and no unscale_ before it", place)
        return


@check(
    "AP034", "The backward pass runs under autocast", Severity.WARNING,
    advice="""Autocast is for the forward pass and the loss; the backward takes the formats of the forward by itself.
    Move .backward() out of the block.""",
    paste="with torch.autocast(...): loss = model(**batch).loss\nloss.backward()",
    sources="pytorch/pytorch#120376",
)  # fmt: skip
def backward_inside(case: Case) -> Iterator[Evidence]:
    """`.backward()` inside a `with torch.autocast(...)` block of a script."""
    for call, place in case.run.calls("backward"):
        around = [
            outer for outer in call.inside if outer.last == "autocast" and outer.keywords.get("enabled") is not False
        ]
        if around:
            yield Evidence(f"{call.name}() inside {around[-1].name}()", place)


@check(
    "AP035", "Binary cross entropy under autocast", Severity.ERROR,
    advice="Hand the loss logits instead of probabilities: binary_cross_entropy_with_logits is safe in FP16.",
    paste="torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)",
    sources="https://docs.pytorch.org/docs/stable/amp.html",
)  # fmt: skip
def bce(case: Case) -> Iterator[Evidence]:
    """torch's refusal in a log, or `BCELoss` and `binary_cross_entropy` called inside an autocast block."""
    yield from said(case, [_BCE])
    for call, place in case.run.calls("binary_cross_entropy"):
        if any(outer.last == "autocast" for outer in call.inside):
            yield Evidence(f"{call.name}() inside autocast", place)


@check(
    "AP036", "fp16=True does nothing on a CPU", Severity.WARNING,
    advice="""The Trainer makes neither autocast nor a scaler for FP16 on a CPU, and trains in FP32 without a word. Use
    bf16=True where the CPU has it, or say FP32.""",
    paste="TrainingArguments(..., use_cpu=True, bf16=True)",
    sources="https://huggingface.co/docs/transformers/main_classes/trainer",
)  # fmt: skip
def fp16_on_cpu(case: Case) -> Iterator[Evidence]:
    """fp16 beside use_cpu or --device cpu in training arguments, or the older refusal in a log."""
    yield from said(case, [_NO_GPU_FP16])
    on_cpu = case.run.on_cpu
    cpu = on_cpu.text if on_cpu else "--device cpu" if case.device is not None and case.device.kind == "cpu" else None
    for s in case.run.get("fp16"):
        if s.on and cpu and case.run.scaler is None:
            yield Evidence(f"{s.name}={s.value} and {cpu}", s.place)


@check(
    "AP037", "A gradient scaler with BF16", Severity.NOTE,
    advice="BF16 has FP32's range, so there is nothing to scale: leave the scaler out.",
    paste='with torch.autocast("cuda", dtype=torch.bfloat16): ...  # loss.backward(); optimizer.step()',
    sources="huggingface/accelerate#1036",
)  # fmt: skip
def needless_scaler(case: Case) -> Iterator[Evidence]:
    """A GradScaler in a script whose only autocast is BF16."""
    if case.run.scaler and set(case.run.amp) == {Format.BF16}:
        yield Evidence(f"{case.run.scaler.text} with {case.run.amp[Format.BF16].text}", case.run.scaler.place)


@check(
    "AP038", "Evaluation casts the whole model", Severity.NOTE,
    advice="""bf16_full_eval and fp16_full_eval store the whole model in 16 bits while it is evaluated: half the
    memory, and figures that are not those of the training's own precision. In FP16 the evaluation loss may be NaN.""",
    paste="TrainingArguments(..., bf16_full_eval=False)",
    sources="ageron/handson-mlp#36",
)  # fmt: skip
def full_eval(case: Case) -> Iterator[Evidence]:
    """bf16_full_eval or fp16_full_eval switched on."""
    for s in case.run.get("bf16_full_eval", "fp16_full_eval"):
        if s.on:
            hazard = s.name.startswith("fp16") and re.search(r"t5|gemma|qwen2", case.family)
            yield Evidence(f"{s.name}={s.value}", s.place, Severity.WARNING if hazard else None)
