"""Checks of CPUs and of MPS, and this machine's own CPU by its instructions."""

from __future__ import annotations

from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, patterns, said
from autoprec.doctor.hardware import asked_format
from autoprec.formats import Format
from autoprec.probe.host import cpu_memory_bytes
from autoprec.records import DeviceProfile, FormatSupport, Origin, Severity, Support
from autoprec.runtime.cpu import UNITS, cpu_instructions

__all__ = ["host_profile"]

_MPS = patterns(
    r"(?:trying to )?convert b?float16 to the mps backend|convert (?:bfloat16|.{0,12}float8\w*) to the mps",
    r"bfloat16 (?:is )?not supported (?:on|by) (?:the )?mps|mps bfloat16 is only supported",
    r"in mps autocast, but the target dtype is not supported",
    r"mps autocast only supports",
    r"unsupported autocast device_type ['\"]?mps",
    r"(?:fp16|bf16) mixed precision requires a gpu \(not ['\"]?mps",
    r"(?:undefined type|unsupported type|does not support) .{0,20}bfloat16.{0,60}mps|mps.{0,60}(?:does(?: "
    r"not|n't)|no) support .{0,20}b(?:f|float)16",
)
_CPU_SLOW = patterns(
    r"mkldnn_(?:bf16|reduced)\w* path needs the cpu support",
    r"bf16.{0,60}(?:cpu|avx512)\w*.{0,60}(?:slow|not (?:natively )?supported|no native|lacks|without|emulat)",
    r"(?:cpu|processor).{0,60}(?:does not|doesn'?t) (?:natively )?support (?:avx512_?bf16|amx|bf16|bfloat16"
    r"|fp16|float16)",
)


@check(
    "AP011", "This CPU has no units for BF16 or FP16", Severity.WARNING,
    advice="""Without AVX512-BF16 or AMX a CPU emulates BF16, and FP16 is slow on most: two to hundreds of times
    slower than FP32. Use FP32 there.""",
    paste="model = model.float()  # and no autocast on this CPU",
    sources="pytorch/pytorch#86270 pytorch/pytorch#118499 pytorch/pytorch#111456 pytorch/pytorch#146508 "
            "pytorch/pytorch#86550",
)  # fmt: skip
def slow_cpu(case: Case) -> Iterator[Evidence]:
    """BF16 or FP16 asked of a CPU (--device cpu, or use_cpu in the settings) that does not have it natively;
    oneDNN's own complaint in a log; with --trace, a step that was measured slower than in FP32."""
    yield from said(case, _CPU_SLOW)
    device = case.device if case.device is not None and case.device.kind == "cpu" else None
    if case.run.on_cpu is not None and case.device is None:
        device = host_profile()
    if device is not None:
        for choice in (Format.BF16, Format.FP16):
            asked = asked_format(case, choice)
            # the Trainer's fp16 does nothing on a CPU (AP036)
            if asked and device.supports(choice) is not Support.NATIVE and not asked[0].startswith("fp16="):
                yield Evidence(f"{asked[0]}, and {choice} on {device.name} is {device.supports(choice)}", asked[1])
    trace = case.trace
    if (
        trace
        and trace.device == "cpu"
        and trace.step_ms
        and trace.fp32_step_ms
        and trace.step_ms > 1.3 * trace.fp32_step_ms
    ):
        yield Evidence(
            f"a step took {trace.step_ms:.0f} ms in {trace.format} and {trace.fp32_step_ms:.0f} ms in fp32 "
            f"(measured, a few steps)",
            f"the {trace.device} here", Severity.NOTE if trace.format not in {str(f) for f in case.run.amp} else None,
        )  # fmt: skip


def host_profile() -> DeviceProfile:
    """Return this machine's CPU by its instructions, without measuring anything."""
    flags = cpu_instructions()
    low = Support.NATIVE if {*UNITS[Format.BF16], "bf16"} & set(flags) else Support.EMULATED
    half = Support.NATIVE if {*UNITS[Format.FP16], "asimdhp"} & set(flags) else Support.EMULATED
    reason = f"instructions: {', '.join(flags) or 'unknown'}"
    none = FormatSupport(Support.ABSENT, reason)
    return DeviceProfile(
        name="this CPU",
        kind="cpu",
        origin=Origin.MEASURED,
        tf32=none,
        formats={
            Format.FP32: FormatSupport(Support.NATIVE, reason),
            Format.BF16: FormatSupport(low, reason),
            Format.FP16: FormatSupport(half, reason),
            Format.FP8: none,
        },
        memory_bytes=cpu_memory_bytes(),
        instructions=flags,
    )


@check(
    "AP024", "MPS does not take this format", Severity.ERROR,
    advice="""BF16 on MPS needs macOS 14 and a recent torch; FP64 never runs there. Use FP16 or FP32, and no autocast
    with an older torch.""",
    paste="model.to(torch.float32).to('mps')",
    sources="pytorch/pytorch#104191 pytorch/pytorch#78168 pytorch/pytorch#139386 pytorch/pytorch#141864",
)  # fmt: skip
def mps_types(case: Case) -> Iterator[Evidence]:
    """ "Trying to convert BFloat16 to the MPS backend", "MPS Autocast only supports dtype of torch.float16" and the
    like; told beforehand, as a note, from BF16 asked of --device mps."""
    yield from said(case, _MPS)
    if case.device is not None and case.device.kind == "mps" and (asked := asked_format(case, Format.BF16)):
        yield Evidence(f"{asked[0]} on MPS: needs macOS 14", asked[1], Severity.NOTE)
