"""Published steps as predictions take them: which model, plan and setup a row means, or why it cannot be one."""

from __future__ import annotations

import dataclasses
from typing import Any

from timing_tables import DEVICES

from autoprec.catalog import find_device
from autoprec.formats import Fp8Recipe
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.plan import Plan
from autoprec.predict.coefficients import Coefficients, coefficients
from autoprec.predict.memory import setup_of
from autoprec.predict.skeleton import skeleton_profile
from autoprec.predict.steptime import StepTime, predict_step
from autoprec.records import Architecture, DeviceProfile, GemmRate, LeafKind, ModelFacts, ModelProfile, Role

__all__ = ["NOT_COMPARED", "SPEEDUPS", "both_steps", "predict_row", "reason_out", "speedup"]

#: hidden, layers, heads of models that the catalogue lacks: NeuSight's own and MPT's public configurations
_DECODERS = {
    "gpt3_27": (2560, 32, 32, 50257, "GPT2LMHeadModel"),
    "gpt3_xl": (3072, 24, 24, 50257, "GPT2LMHeadModel"),
    "mpt-125m": (768, 12, 12, 50368, "MptForCausalLM"),
    "mpt-350m": (1024, 24, 16, 50368, "MptForCausalLM"),
    "mpt-760m": (1536, 24, 12, 50368, "MptForCausalLM"),
    "mpt-1b": (2048, 24, 16, 50368, "MptForCausalLM"),
    "mpt-7b": (4096, 32, 32, 50368, "MptForCausalLM"),
    "mpt-30b": (7168, 48, 56, 50368, "MptForCausalLM"),
}
_BERTS = {
    "bert_large": "bert-large-uncased", "bert_base_squad": "bert-base-uncased", "bert_large_pretrain":
    "bert-large-uncased", "gpt2_large": "gpt2-large",
}  # fmt: skip
#: single layers in FP16: class and whether it decodes
_LAYERS = {"bert-large layer": "BertForMaskedLM", "gpt2-medium block": "GPT2LMHeadModel"}
_FORMATS = {"fp32": "fp32", "tf32": "tf32", "fp16_amp": "fp16", "bf16_amp": "bf16", "bf16_pure": "bf16"}


def reason_out(row: Any) -> str | None:
    """Return why a row is not predicted; None where it is."""
    if row["table"] == "layer":
        return None if row["model"] in _LAYERS else "T5's relative positions: a bias that no row says how it was made"
    if row["model"] not in _DECODERS and row["model"] not in _BERTS:
        return "its model's sizes or its step are not stated well enough"
    if row["table"] == "format" and row["dtype"] not in _FORMATS:
        return "FP8 steps are compared as speedups"
    if row["model"] == "bert_large_pretrain" and row["seq"] == 512:
        return "its padding is skipped: the arithmetic of whole sequences would exceed the card's best matmul"
    if row["model"] == "bert_large_pretrain" and row["table"] == "format":
        return None
    return None if row["table"] == "fp32" or row["phase"] == "train" else "no training step"


def predict_row(row: Any, numbers: Coefficients | None = None) -> tuple[float, float, StepTime]:
    """Return (predicted ms, published ms, the prediction) of a row."""
    if row["table"] == "fp32":
        return _eager(row, numbers)
    if row["table"] == "layer":
        return _single(row, numbers)
    profile, facts = _model(row["model"], head=row["model"] != "bert_base_squad")
    device, key = find_device(row["device"]), _FORMATS[row["dtype"]]
    bert = row["model"].startswith("bert")
    policy = None
    if bert and key == "fp16":  # apex O2: FP16 throughout over FP32 master weights
        plan, policy = Plan.cast(profile, "fp16", device=device), "mixed-master"
    elif row["dtype"] == "bf16_pure":
        plan = Plan.cast(profile, "bf16", device=device)
    elif key == "tf32":
        plan = Plan.uniform(profile, "fp32", tf32=True)
    else:
        plan = Plan.uniform(profile, key, device=device)
    again = "act_ckpt=True" in str(row["conditions"])
    setup = setup_of(
        plan,
        int(row["micro_batch"]),
        int(row["seq"]),
        policy=policy,
        attention="eager" if bert else "flash",
        dropout=bert,
        checkpointing="full" if again else "none",
    )
    if not bert:
        numbers = _attending(numbers or coefficients(), older=True)
    found = predict_step(profile, plan, device, setup, facts, numbers=numbers)
    # states are sharded over the GPUs, and stepped once for all micro-batches
    steps = _accumulated(row) * int(row["ngpu"])
    optimizer = next((ms for phase, ms in found.phases_ms.items() if phase == "optimizer"), 0.0)
    predicted = found.step_ms.value - optimizer * (1 - 1 / steps)
    return predicted, 1e3 * setup.batch_size / float(row["samples_per_s_per_gpu"]), found


def _attending(numbers: Coefficients, *, older: bool = False) -> Coefficients:
    """Return the numbers with another attention kernel on NVIDIA cards before Blackwell.

    llm-foundry's tables were made with FlashAttention 1, 1.7 to 2.0 times as slow as 2 (by the paper on 2);
    TransformerEngine attends with cuDNN, whose shares are those of Blackwell.
    """
    family = numbers.families["nvidia"]
    if older:
        shares = {
            name: dataclasses.replace(s, forward=s.forward / 1.85, backward=s.backward / 1.85)
            for name, s in family.attention.items()
        }
    else:
        shares = dict.fromkeys(family.attention, family.attention["blackwell"])
    family = dataclasses.replace(family, attention=shares)
    return dataclasses.replace(numbers, families={**numbers.families, "nvidia": family})


def _accumulated(row: Any) -> int:
    text = str(row["conditions"])
    return int(text.split("grad_accum=")[1].split(",")[0]) if "grad_accum=" in text else 1


def _eager(row: Any, numbers: Coefficients | None) -> tuple[float, float, StepTime]:
    """NeuSight's steps: FP32, attention in plain operations, no loss, no optimizer, gradients never set to zero."""
    trains = row["mode"] == "train"
    profile, facts = _model(row["model"], head=trains or not row["model"].startswith("bert"))
    plan = Plan.uniform(profile, "fp32", mode="train" if trains else "infer")
    setup = setup_of(
        plan, int(row["batch"]), int(row["seq"]), plan.mode, None, attention="eager", dropout=trains, cache=None
    )
    found = predict_step(
        profile,
        plan,
        find_device(row["device"]),
        setup,
        facts,
        compiled=row["variant"] == "torch.compile",
        numbers=numbers,
        accumulates=trains,
        with_loss=False,
    )
    return found.step_ms.value, float(row["total_ms"]), found


def _single(row: Any, numbers: Coefficients | None) -> tuple[float, float, StepTime]:
    """mli's layers: `layer.half()`, attention in plain operations, the backward with dropout."""
    class_name = _LAYERS[row["model"]]
    facts = _facts(int(row["hidden"]), 1, int(row["heads"]), 8, decodes="gpt2" in row["model"])
    profile = _blocks_only(skeleton_profile(facts, class_name))
    trains = "bwd" in row["direction"]
    plan = Plan.cast(profile, "fp16", mode="train" if trains else "infer")
    setup = setup_of(
        plan, int(row["batch"]), int(row["seq"]), plan.mode, None, policy="bf16", attention="eager", dropout=trains,
        cache=None,
    )  # fmt: skip
    found = predict_step(profile, plan, find_device(row["device"]), setup, facts, numbers=numbers)
    return found.step_ms.value, float(row["total_ms"]), found


def _facts(hidden: int, layers: int, heads: int, vocabulary: int, *, decodes: bool = True) -> ModelFacts:
    return ModelFacts(
        model_id="", architecture=Architecture.DECODER if decodes else Architecture.ENCODER, hidden=hidden,
        layers=layers, heads=heads, kv_heads=heads, head_dim=hidden // heads, ffn=4 * hidden, gated=False,
        vocab=vocabulary, max_positions=2048, tied=decodes,
    )  # fmt: skip


def _blocks_only(profile: ModelProfile) -> ModelProfile:
    """Return a profile without what stands before and behind its blocks."""
    kept = [u for u in profile.units if u.role in (Role.ATTENTION, Role.FFN)]
    modules = {module for unit in kept for module in unit.modules}
    # tables stay listed: where positions are learned, queries and keys are not rotated
    leaves = tuple(leaf for leaf in profile.leaves if leaf.module in modules or leaf.kind is LeafKind.EMBEDDING)
    return dataclasses.replace(profile, units=tuple(kept), leaves=leaves, tied=())


def _model(name: str, *, head: bool) -> tuple[ModelProfile, ModelFacts]:
    if name in _DECODERS:
        hidden, layers, heads, vocabulary, class_name = _DECODERS[name]
        facts = _facts(hidden, layers, heads, vocabulary)
        return skeleton_profile(facts, class_name), facts
    profile, facts = catalogued_profile(_BERTS[name]), catalogued_facts(_BERTS[name])
    if head:
        return profile, facts
    # question answering and sequence classification have a few outputs in place of a vocabulary
    outside = (Role.LM_HEAD, Role.OTHER)
    gone = {module for unit in profile.units if unit.role in outside for module in unit.modules}
    return dataclasses.replace(
        profile,
        units=tuple(unit for unit in profile.units if unit.role not in outside),
        leaves=tuple(leaf for leaf in profile.leaves if leaf.module not in gone),
        tied=(),
    ), facts


# FP8 over BF16

_LLAMA, _XL = "meta-llama/Meta-Llama-3-8B", "openai-community/gpt2-xl"
#: rows of speedups.csv that are transformers: what each measured, beside its device, recipe and length
SPEEDUPS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("llama3-8b", "H100-SXM", "fp8_tensorwise_f8allgather"): {"board": "meta", "sharded": True, "narrow_gather": True},
    ("llama3-8b", "H100-SXM", "fp8_rowwise"): {"recipe": "rowwise", "board": "meta", "sharded": True},
    ("llama3-8b", "MI300X", "fp8_tensorwise_f8allgather"): {"sharded": True, "narrow_gather": True},
    ("llama3-8b", "MI300X", "fp8_rowwise"): {"recipe": "rowwise", "sharded": True},
    ("llama3-8b(titan)", "H100-SXM", "fp8_compile"): {"board": "meta", "sharded": True, "eager_base": True},
    ("transformer_layer_h4096_ffn16384", "H100", "fp8"): {"layer": True, "engine": True},
    ("gpt2-xl-1.5b", "H100-SXM", "fp8_te"): {"model": _XL, "batch": 8, "length": 1024, "engine": True},
}
#: why the others are not compared
NOT_COMPARED = {
    "fp8_nocompile_triton": "a prototype's own cast kernels",
    "fp8_rowwise_gw_hp": "its weight gradients stay in BF16: not a recipe here",
    "nanochat": "the batch and the model's kernels (FlashAttention 3, a fused loss) are not stated with the row",
    "gpt2-xl-1.5b on MI300X": "the first TransformerEngine for ROCm, slower in FP8 than in BF16",
    "gpt_13b": "parallel over GPUs in ways that are not stated",
    "DiT": "the GPU is not named",
    "XLRON transformer": "JAX, BF16 against FP32",
}
#: GB/s a direction between the eight GPUs of a node, by the datasheets (NVLink 4; xGMI of MI300X), and the share of it
#: that collectives reach
_LINK_GB_PER_S, _LINK_SHARE = 450.0, 0.75


def speedup(row: Any, numbers: Coefficients | None = None) -> float | None:
    """Return the predicted speedup of FP8 over BF16 of a row of speedups.csv; None where it is not one of these."""
    pair = both_steps(row, numbers)
    return None if pair is None else pair[0] / pair[1]


def both_steps(row: Any, numbers: Coefficients | None = None) -> tuple[float, float] | None:
    """Return the predicted milliseconds of the steps in BF16 and in FP8 of a row of speedups.csv."""
    case = SPEEDUPS.get((row["model"], row["gpu"], row["mode"]))
    if case is None:
        return None
    device = _meta_h100() if case.get("board") else find_device(DEVICES[row["gpu"]])
    if case.get("layer"):
        (profile, facts), batch, length, kept = _layer(), 8, 2048, ["none"]
    else:
        name, said = case.get("model", _LLAMA), str(row["conditions"])
        profile, facts = catalogued_profile(name), catalogued_facts(name)
        batch, length = case.get("batch", 1), case.get("length", 4096 if "titan" in row["model"] else 8192)
        half = "every 2nd layer" in said
        kept = ["none", "full"] if half else ["full" if "full AC" in said else "selective" if "SAC" in said else "none"]
    engine = bool(case.get("engine"))
    if engine:
        numbers = _attending(numbers or coefficients())
    base = Plan.cast(profile, "bf16", device=device)
    blocks = {u.name: "fp8" for u in profile.units if u.role in (Role.ATTENTION, Role.FFN)}
    low = dataclasses.replace(base.replace(blocks), fp8_recipe=Fp8Recipe(case.get("recipe", "tensorwise")))
    slow = fast = 0.0
    for checkpointing in kept:
        setup = setup_of(
            base, batch, length, optimizer=None, policy="bf16", attention="flash", checkpointing=checkpointing
        )
        eager = bool(case.get("eager_base"))
        one = predict_step(profile, base, device, setup, facts, compiled=not eager, numbers=numbers)
        two = predict_step(profile, low, device, setup, facts, compiled=True, numbers=numbers, delayed_scaling=engine)
        slow, fast = slow + one.step_ms.value / len(kept), fast + two.step_ms.value / len(kept)
    if case.get("sharded"):
        slow += exchange_ms(profile.parameters, 2)
        fast += exchange_ms(profile.parameters, 1 if case.get("narrow_gather") else 2)
    return slow, fast


def exchange_ms(parameters: int, gathered_width: int) -> float:
    """Return what gathering weights twice and scattering FP32 gradients over a node takes, none of it hidden.

    Published steps of Llama 3 8B are longer than their kernels by about this much, whatever the length.
    """
    moved = 7 / 8 * parameters * (2 * gathered_width + 4)
    return 1e-6 * moved / (_LINK_GB_PER_S * _LINK_SHARE)


def _layer() -> tuple[ModelProfile, ModelFacts]:
    """Return one layer of TransformerEngine's example: 4096 wide, 32 heads, FFN of 16384."""
    facts = _facts(4096, 1, 32, 8)
    return _blocks_only(skeleton_profile(facts, "GPTNeoXForCausalLM")), facts


def _meta_h100() -> DeviceProfile:
    """Return the H100 of torchao's and torchtitan's tables: 96 GB of HBM2e at 2.4 TB/s, held at 500 W.

    Its matmuls at 500 W are published (pytorch/FBGEMM#2546): 585 TFLOP/s in BF16, 1125 in FP8.
    """
    profile = find_device("h100-sxm")
    rates = tuple(
        GemmRate(format=f, size=8192, tflops=v, tflops_low=v, tflops_high=v)
        for f, v in ((profile.ambient, 585.0), ("fp8", 1125.0))
    )
    return dataclasses.replace(profile, bandwidth_gb_per_s=2400.0, gemm_rates=rates)
