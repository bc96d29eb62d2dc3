"""Rules of practice: which format a unit should take on a device, and why, before anything is measured.

Each rule names its source in a comment. They are what people who train large models report; what they cannot know is
this model and this data, which is what a search measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoprec.formats import Format, Fp8Recipe
from autoprec.quantities import DropLimit
from autoprec.recommender.features import UnitFacts, bandwidth, fp8_seconds, gemm_seconds, rate_tflops
from autoprec.records import DeviceProfile, Leaf, Mode, Role, Support

__all__ = ["Choice", "Situation", "base_choice", "fp8_recipe", "overflows_fp16", "tf32_choice", "unit_choice"]

#: matmuls that torchao's filter finds too small for FP8 may do at most this share of a unit's work: the k and v
#: projections of grouped queries (a fifth of Llama's attention) do not keep q and o from it
_SMALL_SHARE = 0.2
#: below this, a gain is not told from the spread between GPUs of one kind (stas00/ml-engineering: 5 % and more),
#: and the roofline was seen to promise a tenth too much (nanochat's MLP: 1.31 predicted, 1.18 measured)
_LEAST_GAIN = 1.10
#: TF32 below this ratio of peaks is not worth its 13 bits
_TF32_GAIN = 1.2
#: published FP8 training stays within this of the BF16 loss (DeepSeek-V3, section 3.3)
_FP8_DROP = DropLimit(0.25, percent=True)
_FP8_DROP_NATS = 0.005

#: families trained in BF16 whose activations leave FP16's range, by a part of the class name, with the roles to
#: keep in FP32; none named: the whole model
#: T5: huggingface/transformers#5651, #9295; Gemma 3: unslothai/unsloth-zoo#600; Qwen2: QwenLM/Qwen3#761,
#: huggingface/transformers#33294; DeepSeek-V2: deepseek-ai/DeepSeek-V2#93
_FP16_OVERFLOW: dict[str, tuple[Role, ...]] = {
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
        return Choice(Format.BF16, f"bf16 is native on {device.name}: {bf16.reason}")
    # emulated bf16 raises no error and is slow: pytorch/pytorch#148322, #124996
    word = "only emulated" if device.supports(Format.BF16) is Support.EMULATED else "absent"
    no_bf16 = f"bf16 is {word} on {device.name}" + (f" ({bf16.reason})" if bf16 else "")
    if fp16 is not None and fp16.support is Support.NATIVE:
        # the Trainer makes a gradient scaler on CUDA and XPU only; elsewhere fp16=True silently trains in fp32
        if hazard := _overflows(None, here.class_name):
            return Choice(Format.FP32, f"{hazard}; {no_bf16}")
        if here.mode is Mode.INFER or device.kind in ("cuda", "xpu"):
            return Choice(Format.FP16, f"fp16 is native on {device.name} ({fp16.reason}); {no_bf16}")
        return Choice(Format.FP32, f"{no_bf16}, and fp16 training has no gradient scaler on {device.kind}")
    no_fp16 = f"; fp16 is {device.supports(Format.FP16)} ({fp16.reason})" if fp16 else ""
    return Choice(Format.FP32, no_bf16 + no_fp16)


def unit_choice(facts: UnitFacts, base: Choice, here: Situation) -> Choice:
    """Return the format of one unit and the reason; the first rule that applies decides."""
    role = facts.unit.role
    if role is Role.EMBEDDING:
        return Choice(
            Format.FP32, "a lookup has no matmul to speed up, and fp32 keeps the values the stream starts from"
        )
    if role is Role.ROUTER:
        # torchtitan models/common/moe.py; Switch Transformers: only the router in fp32
        return Choice(Format.FP32, "routers decide discretely: fp32 gates against unstable routing")
    if base.format is Format.FP32:
        return base
    if base.format is Format.FP16 and (hazard := _overflows(role, here.class_name)):
        return Choice(Format.FP32, hazard)
    if role not in (Role.ATTENTION, Role.FFN):
        return Choice(base.format, f"{base.reason}; {_outside(role)}")
    against, for_it = _fp8(facts, here)
    if for_it:
        return Choice(Format.FP8, for_it)
    return Choice(base.format, f"{base.reason}; {against}")


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
    return any(part in class_name for part in _FP16_OVERFLOW)


def _overflows(role: Role | None, class_name: str) -> str:
    """Return the warning for a family known to leave FP16's range in units of a role (None: anywhere), or ''."""
    for part, roles in _FP16_OVERFLOW.items():
        if part in class_name and (role in roles if role else not roles):
            return f"{class_name} was trained in bf16, and its family is known to exceed fp16's 65504 here: fp32"
    return ""


def _outside(role: Role) -> str:
    if role is Role.LM_HEAD:
        # DeepSeek-V3 3.3.1, torchtitan (`output`), ModelOpt's base_disabled_layers
        return "never fp8 in the output head, where rounding goes straight into the logits"
    return f"fp8 is for the matmuls of blocks, and this unit is {role}"


def _fp8(facts: UnitFacts, here: Situation) -> tuple[str, str]:
    """Return (why not FP8, '') or ('', why FP8)."""
    device = here.device
    recipe = fp8_recipe(device)
    if device.supports(Format.FP8) is not Support.NATIVE or recipe is None:
        known = device.formats.get(Format.FP8)
        return f"fp8 is not native ({known.reason if known else 'not known here'})", ""
    if here.four_bit:
        return f"weights held in 4 bits are widened to {device.ambient} before their matmul, so fp8 does not apply", ""
    limit = _FP8_DROP.value if here.max_drop.percent else _FP8_DROP_NATS
    if here.max_drop.value < limit:
        return f"fp8 needs measuring for a limit of {here.max_drop}: published runs stay within {_FP8_DROP} only", ""
    if facts.block is None or facts.edge:
        # Nemotron-H keeps the first and last matmuls in BF16 (arXiv:2504.03624); Megatron: --first-last-layers-bf16
        return "no fp8 in the first and last block, as long FP8 runs have it", ""
    if not facts.gemms:
        return "no matmul here for fp8", ""
    if odd := _odd_dimension(facts, here):
        return odd, ""
    small = [leaf for leaf in facts.gemms if _too_small(leaf, recipe)]
    share = sum(leaf.inputs * leaf.outputs for leaf in small) / facts.parameters
    if share > _SMALL_SHARE:
        first = small[0]
        return f"too small for fp8: {_short(first)} is {first.inputs}x{first.outputs} (torchao's {recipe} limits)", ""
    gain = _gain(facts, here, recipe)
    if gain is None:
        return "fp8's gain cannot be told: no rate or bandwidth is known", ""
    if gain < _LEAST_GAIN:
        return f"fp8 would give {gain:.2f}x over bf16 at {here.tokens} tokens, casts counted: too little", ""
    return "", f"fp8 is native on {device.name}: {gain:.2f}x over bf16 predicted at {here.tokens} tokens, casts counted"


def _odd_dimension(facts: UnitFacts, here: Situation) -> str:
    """Return why torch._scaled_mm would refuse: every dimension it sums over or stores must divide by 16."""
    for leaf in facts.gemms:
        for size in (leaf.inputs, leaf.outputs):
            if size % 16:
                return (
                    f"fp8 needs dimensions that divide by 16: {_short(leaf)} has {size} (pad to {-(-size // 16) * 16})"
                )
    if here.mode is Mode.TRAIN and here.tokens % 16:
        return f"fp8 needs tokens a step that divide by 16 for weight gradients, and {here.tokens} do not"
    return ""


def _too_small(leaf: Leaf, recipe: Fp8Recipe) -> bool:
    """Say whether torchao's filter (`_auto_filter_for_recipe`, fitted on H100) leaves a layer out."""
    k, n = leaf.inputs, leaf.outputs
    if recipe is Fp8Recipe.TENSORWISE:
        return k <= 4096 and n <= 1024
    return n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048)


def _gain(facts: UnitFacts, here: Situation, recipe: Fp8Recipe) -> float | None:
    """Return how many times faster the unit's matmuls are in FP8 than in BF16, casts counted; None where unknown."""
    bf16, fp8 = rate_tflops(here.device, Format.BF16), rate_tflops(here.device, Format.FP8)
    moved = bandwidth(here.device)
    if bf16 is None or fp8 is None or moved is None:
        return None
    slow = sum(gemm_seconds(leaf, here.tokens, here.mode, bf16.value, moved, 2) for leaf in facts.gemms)
    fast = sum(sum(fp8_seconds(leaf, here.tokens, here.mode, fp8.value, moved, recipe)) for leaf in facts.gemms)
    return slow / fast


def _short(leaf: Leaf) -> str:
    """Return a leaf's own name, so that equal units of other blocks have the same reason."""
    return leaf.module.rpartition(".")[2]
