"""Claims about quality, plans per layer, and tools that tutorials use."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from claims import (
    TIMES,
    Finding,
    Found,
    Verdict,
    baseline,
    claim,
    forecast,
    percent,
    ratio,
    recorded,
    result_source,
    uniform,
)
from record import ROOT
from scipy import stats

from autoprec.plan import Plan
from autoprec.quantities import number
from autoprec.records import Origin, Role

__all__: list[str] = []

# quality


def compared(name: str) -> Mapping[str, Any] | None:
    """Return the row of one plan of the recorded comparison on a labelled task."""
    data = recorded("compare-minilm")
    rows = data["figures"]["comparison"]["plans"] if data else []
    return next((row for row in rows if row["name"] == name), None)


@claim("quality", "FP16 loses 0.2–0.4 % against FP32")
def _fp16_loss() -> Found:
    here = baseline("uniform bf16")
    findings = [
        Finding(
            "where nothing overflows or underflows FP16 rounds 8 times finer than BF16: 3 more bits of fraction",
            "by definition",
            "`autoprec/formats.py`",
        ),
        Finding(
            f"SmolLM2-135M under BF16: a drop of {percent(here['drop_percent'])} of its loss",
            Origin.MEASURED,
            result_source("search-smollm2-infer"),
        ),
    ]
    fp16 = compared("fp16")
    if fp16 is None or fp16["drop"] is None:
        text = "no comparison with FP16 is recorded yet: `python benchmarks/bench_compare.py`"
        return Verdict.UNKNOWN, [*findings, Finding(text, "-", "-")]
    drop, change = fp16["drop"], fp16["task_metric_change"]
    text = (
        f"MiniLM's spam classifier under FP16: a drop of {number(drop['value'], 1)} % of its loss "
        f"({number(drop['ci95'][0], 1)}–{number(drop['ci95'][1], 1)}), accuracy changed by {change['value']:.2g} points"
    )
    findings.append(Finding(text, drop["origin"], result_source("compare-minilm")))
    return (Verdict.NOT if drop["ci95"][1] < 0.2 else Verdict.PART), findings


@claim("quality", "GPT-2 on MRPC: FP32 88.2, FP16 88.0, BF16 88.2; 5 of 100 FP16 runs fail")
def _mrpc() -> Found:
    # GLUE's MRPC has 408 examples for validation (its data card; Wang et al. 2018)
    examples, accuracy = 408, 0.882
    half = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / examples)
    few = 100 * float(stats.binomtest(0, 8).proportion_ci().high)
    around = stats.binomtest(5, 100).proportion_ci()
    findings = [
        Finding(
            f"0.2 points of MRPC's {examples} examples are {0.002 * examples:.1f} of one answer, and 88.2 is "
            f"known to ±{half:.1f}: "
            "such a table cannot tell these formats apart",
            "by arithmetic",
            "binomial, 95 %",
        ),
        Finding(
            f"5 of 100 stands for {100 * around.low:.1f} to {100 * around.high:.1f} %; of 8 runs without a "
            "failure no more than "
            f"{few:.0f} % is known",
            "by arithmetic",
            "Clopper and Pearson, 95 %",
        ),
    ]
    data, fp16 = recorded("compare-minilm"), compared("fp16")
    if data is not None and fp16 is not None and fp16["trained"] is not None:
        training, ran = data["figures"]["comparison"]["training"], fp16["trained"]
        text = (
            f"MiniLM's spam classifier trained for {training['steps']} steps over {training['seeds']} seeds: "
            f"{ran['failed']} of "
            f"{ran['runs']} FP16 runs failed; [compare.md](compare.md) has its table"
        )
        findings.append(Finding(text, ran["failed_share"]["origin"], result_source("compare-minilm")))
    return Verdict.UNKNOWN, findings


@claim(
    "per layer",
    "Embeddings FP32, attention FP16, FFN FP8, lm_head FP32: 99.9 % of the quality at 3.2 ×, against BF16's 99.8 "
    "% at 2.5 ×",
)
def _mixed() -> Found:
    lines = []
    faster = []
    for compiled in (False, True):
        given = forecast("h100-sxm-80gb", "openai-community/gpt2-large", 8, 1024, compiled=compiled)
        wanted = {Role.EMBEDDING: "fp32", Role.ATTENTION: "fp16", Role.FFN: "fp8", Role.LM_HEAD: "fp32"}
        formats = {unit.name: wanted[unit.role] for unit in given.profile.units if unit.role in wanted}
        mixed = Plan.assign(given.profile, formats, ambient="fp16", device=given.device, mode=given.mode, tf32=True)
        own, plain = given.of(mixed).speedup, uniform(given, "bf16").speedup
        faster.append(own.value > plain.value)
        lines.append(f"{'compiled' if compiled else 'eager'} {ratio(own)}, BF16 {ratio(plain)}")
    mixed_drop, bf16_drop = _demo_drops()
    scale = baseline("uniform bf16")["drop"] / (0.01 * baseline("uniform bf16")["drop_percent"])
    ffns, smol = _smollm2_drops()
    findings = [
        Finding(
            f"GPT-2 large, 8 × 1024 tokens, H100, its FP32 in TF32, over FP32 without: {'; '.join(lines)}",
            Origin.PREDICTED,
            TIMES,
        ),
        Finding(
            f"the demo GPT, attention in BF16: {number(mixed_drop, 2)} nats, uniform BF16 {number(bf16_drop, 2)}",
            Origin.EMULATED,
            "`benchmarks/truths/exhaustive-demo.npz`, all 19,683 assignments",
        ),
        Finding(
            f"SmolLM2-135M, FFNs in FP8 and attention in BF16, sum of single units: {ffns:.2g} nats, about "
            f"{percent(100 * ffns / scale)} of its loss; uniform BF16 {smol:.2g} nats",
            Origin.EMULATED,
            "`benchmarks/truths/smollm2.json`, `benchmarks/results/search-smollm2-infer.json`",
        ),
    ]
    better = mixed_drop <= bf16_drop and ffns <= smol
    return (
        Verdict.HOLDS if better and all(faster) else Verdict.PART if better or any(faster) else Verdict.NOT
    ), findings


def _demo_drops() -> tuple[float, float]:
    """Return drops of the tutorial's assignment and of uniform BF16 among all assignments of the demo model."""
    data = np.load(ROOT / "benchmarks" / "truths" / "exhaustive-demo.npz")
    about = json.loads(str(data["about"]))
    wanted = {"attention": "bf16", "ffn": "fp8", "lm_head": "fp32"}

    def drop(formats: list[str]) -> float:
        index = functools.reduce(
            lambda so_far, f: len(about["formats"]) * so_far + about["formats"].index(f), formats, 0
        )
        return float(data["drops"][index])

    return drop([wanted[role] for role in about["roles"]]), drop(["bf16"] * len(about["roles"]))


def _smollm2_drops() -> tuple[float, float]:
    """Return the sum of single drops of FFNs in FP8 and attention in BF16, and the joint drop of uniform BF16."""
    single = json.loads((ROOT / "benchmarks" / "truths" / "smollm2.json").read_text())["single"]
    parts = [
        float(np.mean(drops))
        for name, drops in single.items()
        if (name.startswith("fp8") and name.endswith("ffn")) or (name.startswith("bf16") and name.endswith("attention"))
    ]
    return sum(parts), baseline("uniform bf16")["drop"]


# tools


@claim("tools", "Apex O1 and O2 are the way to mixed precision")
def _apex() -> Found:
    text = (
        "Apex's amp is removed from Lightning, Transformers and DeepSpeed; `torch.autocast` and a scaler, or a plan, "
        "replace it"
    )
    return Verdict.NOT, [
        Finding(text, Origin.RECORDED, "[retired.md](retired.md), checked against the installed versions")
    ]


@claim("tools", "Evaluate in BF16, by `bf16_full_eval=True`")
def _full_eval() -> Found:
    cast, plain = baseline("cast bf16"), baseline("uniform bf16")
    text = (
        f"it casts the whole model, a plan's FP32 units too, so no plan sets it; SmolLM2-135M cast to BF16 drops "
        f"{percent(cast['drop_percent'])} of its loss, under autocast {percent(plain['drop_percent'])}"
    )
    return Verdict.PART, [Finding(text, Origin.MEASURED, result_source("search-smollm2-infer"))]
