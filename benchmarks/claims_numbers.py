"""Claims about formats, loss scaling, weights and memory."""

from __future__ import annotations

from claims import (
    MODEL,
    Finding,
    Found,
    Verdict,
    claim,
    needed,
    result_source,
)

from autoprec import predict
from autoprec.formats import TF32, Format, Fp8Family, layout
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.plan import GradScalerSettings, Plan
from autoprec.records import Origin

__all__: list[str] = []

# numbers


@claim("formats", "FP32 is 1-8-23, TF32 1-8-10, BF16 1-8-7, FP16 1-5-10; FP8 has E4M3 up to ±448 and E5M2 up to ±57344")
def _formats() -> Found:
    def bits(choice: Format) -> str:
        shape = layout(choice, gradient=False, family=Fp8Family.OCP)
        return f"1-{shape.exponent_bits}-{shape.mantissa_bits}"

    found = {str(choice): bits(choice) for choice in (Format.FP32, Format.BF16, Format.FP16)}
    found["tf32"] = f"1-{TF32.exponent_bits}-{TF32.mantissa_bits}"
    ends = [layout(Format.FP8, gradient=gradient, family=Fp8Family.OCP).max for gradient in (False, True)]
    right = list(found.values()) == ["1-8-23", "1-8-7", "1-5-10", "1-8-10"] and ends == [448.0, 57344.0]
    text = ", ".join(f"{choice} {shape}" for choice, shape in found.items())
    text += f", FP8 to ±{ends[0]:g} and ±{ends[1]:g}; MI300's FP8 ends at ±240, which the tutorials leave out"
    source = "`autoprec/formats.py`, held equal to `torch.finfo` by tests/test_formats.py"
    return Verdict.HOLDS if right else Verdict.NOT, [Finding(text, "by definition", source)]


@claim(
    "loss scaling",
    "Loss scaling starts at 2^16, doubles after 2000 good steps, halves on overflow; FP16 needs it, BF16 does not",
)
def _scaler() -> Found:
    settings, profile = GradScalerSettings(), catalogued_profile(MODEL)
    given = {choice: Plan.uniform(profile, choice).grad_scaler for choice in ("fp16", "bf16")}
    right = (settings.init_scale, settings.growth_interval) == (2.0**16, 2000) and given["bf16"] is None
    text = (
        f"plans with FP16 carry {settings.init_scale:g}, × {settings.growth_factor:g} after "
        f"{settings.growth_interval}, "
        f"× {settings.backoff_factor:g}, plans without it none; without a scale 89 % and 98 % of the gradients' "
        "sum in the "
        "worst units of two models lies under FP16's normal range, with it at most 0.06 %"
    )
    source = "`Plan.uniform`; measured: [training.md](training.md), a tripwire"
    return Verdict.HOLDS if right else Verdict.NOT, [Finding(text, Origin.MEASURED, source)]


@claim("weights", "BF16 needs no master weights")
def _masters() -> Found:
    half = 2.0 ** -(layout(Format.BF16, gradient=False).mantissa_bits + 1)
    findings = [
        Finding(
            f"weights stored in BF16 lose updates under {100 * half / 2:.2g} to {100 * half:.2g} % of their size "
            "(half a "
            "step); at a learning rate of 1e-4 AdamW moves a weight by about 1e-4, so that weights over "
            f"{2e-4 / half:.2f} never move",
            "by definition",
            "`autoprec/formats.py`",
        ),
        Finding(
            "norm weights still exactly 1.0 after training in pure BF16; 10–15 % better when mended",
            Origin.RECORDED,
            "vllm-project/speculators#765; also meta-pytorch/torchtune#2254, arXiv:2010.06192",
        ),
        Finding(
            "true of BF16 as a compute format: under autocast the weights are stored in FP32 and are their own "
            "master copies. "
            "`apply` refuses to train weights stored in BF16 without copies or stochastic rounding",
            "by definition",
            "[training.md](training.md)",
        ),
    ]
    return Verdict.PART, findings


# memory


@claim("memory", "A model of 8 B parameters takes 128 GB in FP32 and 96 GB mixed")
def _eight_billion() -> Found:
    profile = catalogued_profile("meta-llama/Llama-3.1-8B")
    by_policy = {
        policy: predict.memory_bytes(profile, choice, 1, 2048, policy=policy, facts=catalogued_facts(profile.model_id))
        for policy, choice in (("fp32", "fp32"), ("mixed", "bf16"), ("mixed-master", "bf16"))
    }
    counts = {policy: found.simple_bytes / found.parameters for policy, found in by_policy.items()}
    totals = ", ".join(f"{policy} {found.total_bytes / 1e9:.0f} GB" for policy, found in by_policy.items())
    right = (round(8 * counts["fp32"]), round(8 * counts["mixed"])) == (128, 96)
    findings = [
        Finding(
            f"by the count of parameters, gradients and Adam states {8 * counts['fp32']:.0f} GB and "
            f"{8 * counts['mixed']:.0f} GB",
            "by arithmetic",
            "`autoprec.predict.memory_bytes(…).simple_bytes`",
        ),
        Finding(
            f"Llama 3.1 8B, 1 × 2048 tokens, activations, logits and casts too: {totals}; the 96 GB leave out "
            "FP32 master "
            "copies, and autocast's 16-bit copies come on top of FP32 weights",
            Origin.PREDICTED,
            "[memory.md](memory.md)",
        ),
    ]
    return (Verdict.PART if right else Verdict.NOT), findings


@claim("memory", "Mixed precision saves more than 30 % of memory")
def _saving() -> Found:
    saved = {}
    for label, model, batch, length in (
        ("GPT-2, 8 × 512 tokens", MODEL, 8, 512),
        ("GPT-2 large, 1 × 512", "openai-community/gpt2-large", 1, 512),
        ("GPT-2 large, 8 × 1024", "openai-community/gpt2-large", 8, 1024),
        ("Llama 3.1 8B, 1 × 2048", "meta-llama/Llama-3.1-8B", 1, 2048),
    ):
        profile, facts = catalogued_profile(model), catalogued_facts(model)
        wide, low = (
            predict.memory_bytes(profile, choice, batch, length, facts=facts).total_bytes for choice in ("fp32", "bf16")
        )
        saved[label] = 100 * (1 - low / wide)
    rows = {
        r["case"]: r["measured_bytes"]
        for r in needed("memory")["figures"]["training"]["rows"]
        if r["model"] == "smollm2"
    }
    here = 100 * (1 - rows["bf16 plan"] / rows["fp32"])
    findings = [
        Finding(
            f"under BF16 autocast: {', '.join(f'{k} {v:.0f} %' for k, v in saved.items())}; it grows with the share of "
            "activations, and is below zero where weights rule, because autocast keeps 16-bit copies beside them",
            Origin.PREDICTED,
            "[memory.md](memory.md)",
        ),
        Finding(f"SmolLM2-135M's training step: {here:.1f} %", Origin.MEASURED, result_source("memory")),
    ]
    over = [value > 30 for value in (*saved.values(), here)]
    return (Verdict.HOLDS if all(over) else Verdict.PART if any(over) else Verdict.NOT), findings
