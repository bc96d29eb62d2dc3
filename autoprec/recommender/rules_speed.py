"""Rules on speed: when FP8 pays, what a compiler, shapes and kernels do, and what a device only seems to do."""

from __future__ import annotations

from autoprec.formats import Format
from autoprec.recommender.rule import Case, Level, Rule, Topic
from autoprec.records import Role, Support

__all__ = ["SPEED_RULES"]

#: a compiler's predicted gain that is worth a cold start
_COMPILE_GAIN = 1.05
#: ratio of peaks from which TF32 is worth a word
_TF32_GAIN = 1.2
#: capability from which FlashAttention 2 runs
_FLASH = (8, 0)


def _no_fp8_for_shape(case: Case) -> bool:
    return case.native(Format.FP8) and case.low and bool(_odd(case))


def _odd(case: Case) -> list[tuple[str, int]]:
    blocks = {name for name, f in case.facts.items() if f.unit.role in (Role.ATTENTION, Role.FFN)}
    modules = {leaf.module for name in blocks for leaf in case.facts[name].gemms}
    return [(module, size) for module, size in case.odd_sizes(16) if module in modules]


def _padding(case: Case) -> str:
    module, size = _odd(case)[0]
    return (
        f"{len(_odd(case))} sizes do not divide by 16, which fp8's matmuls refuse; first {module} with {size}: "
        f"padded to {-(-size // 16) * 16} it could take fp8"
    )


def _eights(case: Case) -> str:
    odd = case.odd_sizes(8, Format.BF16, Format.FP16, Format.FP8)
    module, size = odd[0]
    return (
        f"a size that does not divide by 8 slows tensor cores ({len(odd)} here): {module} has {size}, pad it to "
        f"{-(-size // 8) * 8}"
    )


def _compile_gain(case: Case) -> float:
    eager, compiled = case.step_ms(), case.step_ms(compiled=True)
    return eager / compiled if eager and compiled else 1.0


def _compiling(case: Case) -> str:
    eager, compiled = case.step_ms(), case.step_ms(compiled=True)
    bound = "the host launches kernels more slowly than the device runs them: " if case.expected["host_bound"] else ""
    return f"{bound}torch_compile=True, {eager:.0f} ms a step to {compiled:.0f} predicted, after minutes of compiling"


def _borders(case: Case) -> int:
    formats = [u.format for u in case.plan.units if u.role in (Role.ATTENTION, Role.FFN)]
    return sum(a is not b for a, b in zip(formats, formats[1:], strict=False))


def _tf32_would_pay(case: Case) -> bool:
    """On GeForce cards TF32 has FP32's own peak."""
    peaks = case.device.peak_tflops
    gain = peaks.get("tf32", 0.0) / peaks["fp32"] if peaks.get("fp32") else 0.0
    return not case.low and case.device.tf32.support is Support.NATIVE and gain > _TF32_GAIN


def _attention_narrow(case: Case) -> bool:
    capability = case.device.compute_capability
    return case.cuda and case.low and capability is not None


SPEED_RULES = (
    Rule(
        code="R21",
        topic=Topic.SPEED,
        level=Level.SHOULD,
        applies=_no_fp8_for_shape,
        says=_padding,
        source="torch._scaled_mm; torchao _auto_filter_for_recipe",
    ),
    Rule(
        code="R22",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: c.native(Format.FP8) and c.low and not c.has(Format.FP8),
        says=lambda c: (
            f"no fp8 at {c.tokens} tokens a step and these shapes: measured on H100, a linear layer of 2048 to 1024 "
            "with 1024 tokens is slower in fp8 (0.80x), one of 8192 to 16384 with 4096 faster (1.39x)"
        ),
        source="torchao float8 microbenchmarks; NVIDIA/TransformerEngine#445",
    ),
    Rule(
        code="R23",
        topic=Topic.SPEED,
        level=Level.MUST,
        applies=lambda c: c.has(Format.FP8),
        says=lambda c: (
            f"fp8 ({c.plan.fp8_recipe}) needs a compiled model: unfused casts cost more than fp8 saves (0.23x of "
            "bf16's speed was measured)"
        ),
        source="karpathy/nanochat dev/LOG.md, 2026-02-02",
    ),
    Rule(
        code="R24",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: c.trains and c.has(Format.FP8),
        says="published gains of whole training steps in fp8 over bf16: 1.10x to 1.28x for 8B models on 8 H100, 1.5x "
        "for 70B on 128",
        source="torchao and torchtitan docs; PyTorch dev-discuss 2359",
    ),
    Rule(
        code="R26",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: _borders(c) > 2,
        says=lambda c: (
            f"{_borders(c)} borders between blocks' formats: casts were seen to take a fifth of the time, and are "
            "counted in the step predicted"
        ),
        source="Campo (ATC'22)",
    ),
    Rule(
        code="R27",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=_tf32_would_pay,
        says="where any drop is allowed, tf32=True is the step with the least risk for a model in fp32: its range "
        "stays, products keep 10 of 23 bits",
        source="PyTorch docs, set_float32_matmul_precision",
    ),
    Rule(
        code="R35",
        topic=Topic.SPEED,
        level=Level.SHOULD,
        applies=lambda c: c.cuda and c.low and bool(c.odd_sizes(8, Format.BF16, Format.FP16, Format.FP8)),
        says=_eights,
        source="NVIDIA, matrix multiplication guide; arXiv:2401.14489",
    ),
    Rule(
        code="R36",
        topic=Topic.SPEED,
        level=Level.SHOULD,
        applies=lambda c: not c.has(Format.FP8) and _compile_gain(c) >= _COMPILE_GAIN,
        says=_compiling,
        source="the time model of this package (docs/predictions.md); torchtitan measured 1.16x",
    ),
    Rule(
        code="R37",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: _attention_narrow(c) and (c.device.compute_capability or (0, 0)) >= _FLASH,
        says=lambda c: (
            f"attention runs in {c.plan.ambient}, where FlashAttention kernels exist: keep attn_implementation='sdpa'"
        ),
        source="Dao-AILab/flash-attention#622 (fp16 and bf16 only)",
    ),
    Rule(
        code="R38",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: _attention_narrow(c) and (c.device.compute_capability or (9, 0)) < _FLASH,
        says=lambda c: (
            "FlashAttention 2 needs capability 8.0 "
            f"(this is {'.'.join(map(str, c.device.compute_capability or ()))}): SDPA takes its memory-efficient kernel"
        ),
        source="Dao-AILab/flash-attention README",
    ),
    Rule(
        code="R44",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.cuda and c.device.supports(Format.BF16) is Support.EMULATED,
        says="torch.cuda.is_bf16_supported() says True here, which includes emulation; ask with "
        "including_emulation=False: emulated bf16 raises nothing and is slower than fp32",
        source="pytorch/pytorch#148322, #124996; MakazhanAlpamys/Soup#387",
    ),
    Rule(
        code="R45",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=lambda c: c.device.kind == "cpu" and not c.native(Format.BF16),
        says="no 16-bit format on a CPU without AVX512-BF16 or AMX: bf16 was seen 2 to 500 times slower there",
        source="pytorch/pytorch#86270, #118499, #146508",
    ),
)
