"""The rules of practice: each fires where it should and not where it should not, with its figures and its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from autoprec.probe.units import probe_units
from autoprec.recommender.recommender import Recommendation, recommend
from autoprec.recommender.rule import Level
from autoprec.recommender.rules import RULES
from autoprec.records import ModelProfile

#: situations by name: a model, a device, and how it is run
SITUATIONS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "8B in fp8": ("meta-llama/Llama-3.1-8B", "h100-sxm", {}),
    "8B lora": ("meta-llama/Llama-3.1-8B", "h100-sxm", {"method": "lora"}),
    "8B qlora": ("meta-llama/Llama-3.1-8B", "a100-sxm", {"method": "qlora"}),
    "8B inference": ("meta-llama/Llama-3.1-8B", "h100-sxm", {"mode": "infer"}),
    "7B on V100": ("Qwen/Qwen2.5-7B", "v100-sxm2-16gb", {}),
    "T5 on T4": ("google-t5/t5-base", "t4", {}),
    "Gemma": ("google/gemma-2b", "a100-sxm", {}),
    "experts": ("mistralai/Mixtral-8x7B-v0.1", "h100-sxm", {}),
    "small on T4": ("gpt2", "t4", {}),
    "small on T4, large batch": ("gpt2", "t4", {"batch_size": 64}),
    "small": ("gpt2", "a100-sxm", {}),
    "small on B200": ("gpt2", "b200", {}),
    "too long": ("gpt2", "a100-sxm", {"seq_len": 2048}),
    "exact": ("gpt2", "a100-sxm", {"max_drop": 0.0}),
    "exact on GeForce": ("gpt2", "rtx-3090", {"max_drop": 0.0}),
    "old CPU": ("gpt2", "cpu-avx2", {}),
    "odd widths": ("odd", "h100-sxm", {}),
    "full card": ("odd", "h100-sxm", {"batch_size": 128}),
}

#: rule: a situation in which it fires, one in which it does not
CASES = {
    "R1": ("8B in fp8", "small"),
    "R2": ("8B in fp8", "8B inference"),
    "R3": ("small on B200", "8B in fp8"),
    "R4": ("experts", "8B in fp8"),
    "R5": ("8B in fp8", "small"),
    "R6": ("8B inference", "8B qlora"),
    "R7": ("experts", "8B in fp8"),
    "R8": ("8B in fp8", "small"),
    "R9": ("small", "8B inference"),
    "R10": ("small", "small on T4"),
    "R11": ("Gemma", "8B qlora"),
    "R12": ("small", "old CPU"),
    "R13": ("T5 on T4", "small on T4"),
    "R14": ("small on T4", "small"),
    "R15": ("small on T4", "small"),
    "R16": ("small", "T5 on T4"),
    "R17": ("small", "8B lora"),
    "R17b": ("small", "8B lora"),
    "R18": ("8B in fp8", "small"),
    "R19": ("8B in fp8", "small"),
    "R20": ("small", "exact"),
    "R21": ("odd widths", "8B in fp8"),
    "R22": ("small on B200", "8B in fp8"),
    "R23": ("8B in fp8", "small"),
    "R24": ("8B in fp8", "8B inference"),
    "R25": ("full card", "odd widths"),
    "R26": ("T5 on T4", "small on T4"),
    "R27": ("exact", "exact on GeForce"),
    "R28": ("small", "small on T4"),
    "R29": ("small", "old CPU"),
    "R30": ("8B qlora", "8B lora"),
    "R31": ("8B lora", "8B qlora"),
    "R32": ("7B on V100", "small"),
    "R33": ("8B inference", "small"),
    "R34": ("8B inference", "small"),
    "R35": ("small", "8B in fp8"),
    "R36": ("small", "8B in fp8"),
    "R37": ("small", "small on T4"),
    "R38": ("small on T4", "small"),
    "R39": ("small on T4, large batch", "small on T4"),
    "R40": ("small", "small on T4, large batch"),
    "R41": ("8B in fp8", "experts"),
    "R42": ("small", "old CPU"),
    "R43": ("small", "8B in fp8"),
    "R44": ("small on T4", "small"),
    "R45": ("old CPU", "small"),
    "R46": ("too long", "small"),
}


@cache
def odd() -> ModelProfile:
    """Return a gated decoder of four blocks whose FFN no FP8 matmul takes, on the meta device."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11004, num_hidden_layers=4, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        return probe_units(transformers.LlamaForCausalLM(config), model_id="odd")


@cache
def recommended(situation: str) -> Recommendation:
    model, device, options = SITUATIONS[situation]
    return recommend(odd() if model == "odd" else model, device=device, **options)


def said(situation: str, code: str) -> str | None:
    return next((a.text for a in recommended(situation).advice if a.code == code), None)


def test_every_rule_has_its_cases_and_codes_are_unique() -> None:
    assert sorted(CASES) == sorted(rule.code for rule in RULES)
    assert {f"R{n}" for n in range(1, 28)} <= CASES.keys()


@pytest.mark.parametrize("code", CASES)
def test_a_rule_fires_here_and_not_there(code: str) -> None:
    here, there = CASES[code]
    assert said(here, code), f"{code} is silent for '{here}'"
    assert said(there, code) is None, f"{code} speaks for '{there}'"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_names_who_says_so(rule: Any) -> None:
    """A paper by number, an issue, a repository, documentation, or a model of this package by its page."""
    known = r"arXiv:\d{4}\.\d{5}|[\w.-]+/[\w.-]+#\d+|docs|documentation|\.md|\.py|torch\._?\w+|ATC'22|guide|README|"
    known += r"DynamicCache|configuration|models of this package|Trainer\."
    assert re.search(known, rule.source), rule.source


def test_what_matters_most_comes_first() -> None:
    levels = [a.level for a in recommended("7B on V100").advice]
    assert levels == sorted(levels) and levels[0] is Level.STOPS
    assert "one sequence takes" in recommended("7B on V100").advice[0].text


def test_figures_in_the_sentences_are_those_of_the_case() -> None:
    text = said("8B in fp8", "R18")
    parameters = recommended("8B in fp8").memory["parameters"]
    assert text and f"{6 * parameters / 1e9:.1f} GB less" in text  # two moments of 4 bytes as two of 1
    logits = said("8B in fp8", "R20")
    assert logits and f"{8 * 512 * 128256 * 6 / 1e9:.1f} GB" in logits
    batch = said("small on T4, large batch", "R39")
    memory = recommended("small on T4, large batch").memory
    assert batch and batch.startswith(f"{memory['micro_batch']} sequences at once and {memory['accumulation']} times")
    assert memory["micro_batch"] * memory["accumulation"] == 64
    sharded = said("8B in fp8", "R41")
    fits = next(r for r in recommended("8B in fp8").memory["remedies"] if r["fits"] and "over" in r["name"])
    assert sharded and f"{fits['total_bytes'] / 1e9:.1f} GB each" in sharded
    padded = said("odd widths", "R21")
    assert padded and "with 11004: padded to 11008" in padded


def test_the_range_of_fp16_by_family() -> None:
    kept = said("T5 on T4", "R13")
    assert kept and "are in fp32 here" in kept
    whole = said("7B on V100", "R13")
    assert whole and whole.startswith("not fp16: Qwen2ForCausalLM")
