"""Rules of practice: which format a unit should take on a device, and why, before anything is measured.

Each rule names its source in a comment. They are what people who train large models report; what they cannot know is
this model and this data, which is what a search measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoprec.formats import Format, Fp8Recipe
from autoprec.quantities import DropLimit
from autoprec.records import DeviceProfile, Mode, Role, Support

__all__ = [
    "FP16_OVERFLOW",
    "Choice",
    "Situation",
    "base_choice",
    "family_overflow",
    "fp8_recipe",
    "overflows_fp16",
    "tf32_choice",
]

#: peak of FP16 over BF16 from which inference takes FP16 (MI100: 184.6 and 92.3 TFLOP/s; elsewhere they are alike)
_FP16_GAIN = 1.5
#: TF32 below this ratio of peaks is not worth its 13 bits
_TF32_GAIN = 1.2

#: families trained in BF16 whose activations leave FP16's range, by a part of the class name, with the roles to
#: keep in FP32; none named: the whole model
#: T5: huggingface/transformers#5651, #9295; Gemma 3: unslothai/unsloth-zoo#600; Qwen2: QwenLM/Qwen3#761,
#: huggingface/transformers#33294; DeepSeek-V2: deepseek-ai/DeepSeek-V2#93
FP16_OVERFLOW: dict[str, tuple[Role, ...]] = {
    "T5": (Role.FFN,),
    "Gemma3": (Role.FFN,),
    "Gemma4": (Role.FFN,),
    "Qwen2": (),
    "DeepseekV2": (),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A format with the reason for it."""

    format: Format
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a rule may look at beside the unit."""

    device: DeviceProfile
    mode: Mode
    tokens: int
    class_name: str
    max_drop: DropLimit
    four_bit: bool = False  #: the weights are held in 4 bits (QLoRA)


def base_choice(here: Situation) -> Choice:
    """Return the format for ordinary matmuls: bf16 where native, else fp16 where native and scalable, else fp32."""
    device = here.device
    if here.max_drop.value == 0:
        return Choice(Format.FP32, "a drop of 0 is allowed, which leaves fp32")
    bf16, fp16 = device.formats.get(Format.BF16), device.formats.get(Format.FP16)
    if bf16 is not None and bf16.support is Support.NATIVE:
        if here.mode is Mode.INFER and fp16 is not None and fp16.support is Support.NATIVE:
            ratio = device.peak_tflops.get("fp16", 0.0) / device.peak_tflops.get("bf16", float("inf"))
            if ratio > _FP16_GAIN and not any(part in here.class_name for part in FP16_OVERFLOW):
                return Choice(Format.FP16, f"fp16 is native on {device.name}, at {ratio:.1f}x the rate of bf16")
        return Choice(Format.BF16, f"bf16 is native on {device.name}: {bf16.reason}")
    # emulated bf16 raises no error and is slow: pytorch/pytorch#148322, #124996
    word = "only emulated" if device.supports(Format.BF16) is Support.EMULATED else "absent"
    no_bf16 = f"bf16 is {word} on {device.name}" + (f" ({bf16.reason})" if bf16 else "")
    if fp16 is not None and fp16.support is Support.NATIVE:
        # the Trainer makes a gradient scaler on CUDA and XPU only; elsewhere fp16=True silently trains in fp32
        if hazard := family_overflow(None, here.class_name):
            return Choice(Format.FP32, f"{hazard}; {no_bf16}")
        if here.mode is Mode.INFER or device.kind in ("cuda", "xpu"):
            return Choice(Format.FP16, f"fp16 is native on {device.name} ({fp16.reason}); {no_bf16}")
        return Choice(Format.FP32, f"{no_bf16}, and fp16 training has no gradient scaler on {device.kind}")
    no_fp16 = f"; fp16 is {device.supports(Format.FP16)} ({fp16.reason})" if fp16 else ""
    return Choice(Format.FP32, no_bf16 + no_fp16)


def tf32_choice(here: Situation) -> tuple[bool, str]:
    """Return whether FP32 matmuls should run in TF32, and why."""
    device = here.device
    if device.tf32.support is not Support.NATIVE:
        return False, f"tf32 off: {device.tf32.reason}"
    if here.max_drop.value == 0:
        return False, "tf32 off: a drop of 0 is allowed, and TF32 keeps 10 of fp32's 23 bits"
    peaks = device.peak_tflops
    if "tf32" in peaks and "fp32" in peaks and peaks["tf32"] < _TF32_GAIN * peaks["fp32"]:
        return False, (
            f"tf32 off: on {device.name} its peak is that of fp32 ({peaks['tf32']:g} and {peaks['fp32']:g} TFLOP/s), "
            "so it would lose bits and gain nothing"
        )
    gain = f" ({peaks['tf32']:g} against {peaks['fp32']:g} TFLOP/s)" if {"tf32", "fp32"} <= set(peaks) else ""
    return True, f"tf32 on for what stays in fp32: {device.tf32.reason}{gain}"


def fp8_recipe(device: DeviceProfile) -> Fp8Recipe | None:
    """Return the FP8 recipe to use: tensorwise where it runs, being the faster (torchao: 1.25x against 1.10x)."""
    if Fp8Recipe.TENSORWISE in device.fp8_recipes:
        return Fp8Recipe.TENSORWISE
    return device.fp8_recipes[0] if device.fp8_recipes else None


def overflows_fp16(class_name: str) -> bool:
    """Say whether a class belongs to a family known to leave FP16's range somewhere."""
    return any(part in class_name for part in FP16_OVERFLOW)


def family_overflow(role: Role | None, class_name: str) -> str:
    """Return the warning for a family known to leave FP16's range in units of a role (None: anywhere), or ''."""
    for part, roles in FP16_OVERFLOW.items():
        if part in class_name and (role in roles if role else not roles):
            return f"{class_name} was trained in bf16, and its family is known to exceed fp16's 65504 here: fp32"
    return ""
