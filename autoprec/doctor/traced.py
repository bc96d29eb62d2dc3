"""Checks of a traced workload: what overflowed, what is near it, and what FP16 would do to the gradients."""

from __future__ import annotations

from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check
from autoprec.formats import FP16, Format
from autoprec.quantities import number
from autoprec.records import Severity

#: a unit whose largest value is over this part of FP16's range may overflow on other batches (as the search's veto)
_PART = 1 / 8
#: share of gradient values lost without a loss scale from which it is worth a word (Micikevicius et al. 2018 saw 5 %)
_FLUSHED = 0.01


def _asked(case: Case, choice: str) -> bool:
    return choice in {str(f) for f in (*case.run.amp, *case.run.stored)}


@check(
    "AP040", "A unit overflows", Severity.ERROR,
    advice="""Compute this unit in FP32 or BF16 and leave the others as they are: `autoprec search` or a plan's
    `replace` does it; where FP32 itself is not finite, the weights or the batch are at fault.""",
    paste="plan = plan.replace({unit: 'fp32'}); autoprec.apply(model, plan)",
    sources="unslothai/unsloth-zoo#600 huggingface/transformers#14189",
)  # fmt: skip
def overflow(case: Case) -> Iterator[Evidence]:
    """Measured by --trace: the first unit with a value that is not finite, in the format that the settings ask for (an
    error), or in FP16 where they ask for none (a warning: it would); in FP32, whatever they ask."""
    trace = case.trace
    if trace is None:
        return
    if trace.non_finite_in_fp32:
        yield Evidence(f"in fp32 already: {trace.non_finite_in_fp32}", "the traced steps")
    if trace.first_non_finite:
        asked = _asked(case, trace.format)
        what = "not finite" if asked else f"not finite in {trace.format}, which nothing asks for"
        yield Evidence(
            f"unit '{trace.first_non_finite}' is the first whose values are {what}",
            "the traced steps",
            None if asked else Severity.WARNING,
        )


@check(
    "AP041", "Activations come near FP16's largest value", Severity.NOTE,
    advice="""Other batches have larger values: keep these units in FP32 or BF16 when the rest is FP16.""",
    paste="plan = plan.replace({unit: 'fp32'})",
    sources="huggingface/transformers#14189",
)  # fmt: skip
def near_overflow(case: Case) -> Iterator[Evidence]:
    """Measured by --trace: units whose largest value is over an eighth of 65504. A warning where FP16 is asked for."""
    trace = case.trace
    rows = [u for u in trace.units if u.largest_activation > FP16.max * _PART] if trace else []
    for row in sorted(rows, key=lambda u: -u.largest_activation)[:3]:
        yield Evidence(
            f"unit '{row.unit}' reaches {number(row.largest_activation, 4)}",
            "the traced steps",
            Severity.WARNING if _asked(case, Format.FP16) else None,
        )


@check(
    "AP042", "Gradients lie under FP16's range", Severity.NOTE,
    advice="""They become 0 without a loss scale. A GradScaler finds one; starting at the suggested scale saves the
    first skipped steps. BF16 needs none.""",
    paste='torch.amp.GradScaler("cuda", init_scale=suggested)',
    sources="https://arxiv.org/abs/1710.03740",
)  # fmt: skip
def small_gradients(case: Case) -> Iterator[Evidence]:
    """Measured by --trace: the share of non-zero gradients that FP16 rounds to 0, without a scale and at the one
    that keeps the largest gradient below 65504 with room. A warning where FP16 is asked for without a scaler."""
    trace = case.trace
    if trace is None or trace.gradient_flushed_share is None or trace.loss_scale is None:
        return
    if trace.gradient_flushed_share > _FLUSHED:
        run = case.run
        own = Format.FP16 in run.amp and run.scaler is None and "autocast" in run.amp[Format.FP16].text
        scaled = trace.flushed_share_scaled or 0.0
        yield Evidence(
            f"{100 * trace.gradient_flushed_share:.1f} % of the gradients' values round to 0 in fp16, "
            f"{100 * scaled:.2g} % at a loss "
            f"scale of {trace.loss_scale:g}", "the traced steps", Severity.WARNING if own else None,
        )  # fmt: skip
