"""Rules R1 to R16: what stays wide in FP8, what never goes narrow, and the range of FP16."""

from __future__ import annotations

from autoprec.formats import Format, Fp8Recipe
from autoprec.predict.setup import TrainMethod
from autoprec.recommender.advice import overflows_fp16
from autoprec.recommender.rule import Case, Level, Rule, Topic
from autoprec.records import Architecture, Role, Support

__all__ = ["FORMAT_RULES"]

#: integers that bf16 holds exactly end here (8 significant bits)
_BF16_INTEGERS = 256
#: width of a head from which Gemma's attention overflowed without a soft cap
_WIDE_HEAD = 256


def _fp8_trains(case: Case) -> bool:
    return case.trains and case.has(Format.FP8)


def _ends(case: Case) -> str:
    ends = [name for name, fact in case.facts.items() if fact.edge]
    narrow = [name for name in ends if case.plan.unit(name).format is Format.FP8]
    if narrow:
        return (
            f"long fp8 runs keep the first and last block in bf16, and this plan has {len(narrow)} of their units in "
            f"fp8 ({narrow[0]}): watch their loss first"
        )
    return f"first and last block stay in {case.plan.ambient} ({len(ends)} units), as long fp8 runs have them"


def _range(case: Case) -> str:
    if case.has(Format.FP16):
        return (
            f"{case.class_name} was trained in bf16 and its family leaves fp16's range (65504) in some layers: those "
            "are in fp32 here; measure the others (autoprec probe), and take fp32 where |x| exceeds 8188"
        )
    return (
        f"not fp16: {case.class_name} was trained in bf16 and its family is known for activations above 65504; an fp16 "
        "run would end in NaN"
    )


def _loading_fp16(case: Case) -> str:
    base = "the frozen base may be 16 or 4 bits, " if case.method is not TrainMethod.FULL else ""
    return f"{base}trainable weights must be fp32, or the scaler stops with 'Attempting to unscale FP16 gradients'"


FORMAT_RULES = (
    Rule(
        code="R1",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=_fp8_trains,
        says="fp8 is for the matmuls of blocks: embeddings, output head, routers, norms and the products inside "
        "attention stay in 16 or 32 bits, master weights and weight gradients in fp32",
        source="DeepSeek-V3, section 3.3.1 (arXiv:2412.19437)",
    ),
    Rule(
        code="R2",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: _fp8_trains(c) and c.plan.fp8_recipe is Fp8Recipe.TENSORWISE,
        says=_ends,
        source="Nemotron-H (arXiv:2504.03624); Megatron-LM --first-last-layers-bf16",
    ),
    Rule(
        code="R3",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.trains and c.device.compute_capability in ((10, 0), (10, 3)),
        says="this device also multiplies in 4 bits (NVFP4), which no plan uses: such training keeps the first 2 and "
        "the last 8 blocks in bf16, rounds gradients stochastically, and is offered by Transformer Engine",
        source="arXiv:2509.25149; Transformer Engine, NVFP4",
    ),
    Rule(
        code="R4",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.experts and c.native(Format.FP8),
        says="in a mixture of experts fp8 pays in the routed experts; output layer, router gate and the small k and v "
        "projections stay in 16 bits",
        source="torchtitan docs, mxfp8.md; ModelOpt base_disabled_layers",
    ),
    Rule(
        code="R5",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=lambda c: c.trains and c.gated and c.has(Format.FP8, Role.FFN),
        says="in long runs a gated FFN grows outliers before its down projection: watch it, "
        "PrecisionCallback(plan, watch_every=50) widens a unit that leaves its range",
        source="Fishman et al., 2 trillion tokens in FP8 (arXiv:2409.12517)",
    ),
    Rule(
        code="R6",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.has(Format.FP8) and c.plan.fp8_recipe is Fp8Recipe.TENSORWISE,
        says="one outlier sets the scale of a whole tensor: where autoprec probe shows an fp8 drop far above its "
        "neighbours', recipe 'rowwise' holds it, at less speed",
        source="torchao float8 documentation; karpathy/nanochat dev/LOG.md, 2026-02-02",
    ),
    Rule(
        code="R7",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=lambda c: c.experts and c.low,
        says="the router's gate and softmax stay in fp32: it decides discretely, so rounding changes which expert runs",
        source="torchtitan models/common/moe.py; Switch Transformers (arXiv:2101.03961)",
    ),
    Rule(
        code="R8",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=lambda c: c.rotates and c.low and c.seq_len > _BF16_INTEGERS,
        says=lambda c: (
            f"never cast the model whole (model.to or .half): rotary angles need fp32, as bf16 holds no integer above "
            f"256 exactly and positions go to {c.seq_len}"
        ),
        source="huggingface/transformers#29285; NVIDIA/TransformerEngine#1245",
    ),
    Rule(
        code="R9",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.trains and c.low and c.logits > 0,
        says="logits are widened to fp32 before the loss: summed in bf16 a loss has steps of 0.25 at 36",
        source="Modalities/modalities#464; torchtitan loss.py",
    ),
    Rule(
        code="R10",
        topic=Topic.STORAGE,
        level=Level.NOTE,
        applies=lambda c: c.trains_all and c.plan.ambient is Format.BF16,
        says="norm weights start at 1.0 and move by less than bf16's step (0.4 %): stored in bf16 they stay 1.0",
        source="vllm-project/speculators#765",
    ),
    Rule(
        code="R11",
        topic=Topic.FORMATS,
        level=Level.SHOULD,
        applies=lambda c: (
            c.class_name.startswith("Gemma")
            and c.plan.ambient is Format.BF16
            and bool(c.model and c.model.head_dim >= _WIDE_HEAD)
        ),
        says="Gemma's heads are 256 wide: an implementation that writes their scores in bf16 gave NaN at step 1; keep "
        "attn_implementation='sdpa', or 'eager', whose softmax is fp32",
        source="AI-Hypercomputer/maxtext#4136",
    ),
    Rule(
        code="R12",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: c.low and c.cuda,
        says="norms, softmax and losses stay in fp32, as torch.autocast runs them on CUDA; only the forward is under "
        "the plan, never the backward",
        source="PyTorch docs, torch.amp; pytorch/pytorch#120376",
    ),
    Rule(
        code="R13",
        topic=Topic.FORMATS,
        level=Level.MUST,
        applies=lambda c: not c.native(Format.BF16) and c.native(Format.FP16) and overflows_fp16(c.class_name),
        says=_range,
        source="huggingface/transformers#5651, #14189; QwenLM/Qwen3#761, #868; unslothai/unsloth-zoo#600",
    ),
    Rule(
        code="R14",
        topic=Topic.SCALING,
        level=Level.MUST,
        applies=lambda c: c.plan.grad_scaler is not None,
        says="fp16 gradients underflow without loss scaling: GradScaler from 65536, doubled after 2000 good steps, "
        "halved on overflow; clip after unscaling; a scale below 1 for long means the forward overflows",
        source="torch.amp.GradScaler; Micikevicius et al. (arXiv:1710.03740)",
    ),
    Rule(
        code="R15",
        topic=Topic.SCALING,
        level=Level.MUST,
        applies=lambda c: c.plan.grad_scaler is not None,
        says=_loading_fp16,
        source="bitsandbytes-foundation/bitsandbytes#945; haotian-liu/LLaVA#363",
    ),
    Rule(
        code="R16",
        topic=Topic.FORMATS,
        level=Level.NOTE,
        applies=lambda c: (
            c.trains
            and c.plan.ambient is Format.BF16
            and c.device.supports(Format.FP16) is Support.NATIVE
            and bool(c.model and c.model.architecture is Architecture.DECODER)
        ),
        says="for reinforcement learning with a separate engine for rollouts consider fp16: its finer steps remove the "
        "mismatch between training and inference",
        source="arXiv:2510.26788",
    ),
)
