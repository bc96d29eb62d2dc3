"""Published peaks of GPUs (memory.csv of public measurements) as predictions take them, or why a row cannot be one."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprec.plan import Plan
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.predict.skeleton import skeleton_profile
from autoprec.records import Architecture, ModelFacts

__all__ = ["Published", "compare", "read_rows"]

#: sizes from the models' public configurations
_MODELS = {
    "phi-1.5 1.3B": ("GPTNeoXForCausalLM", 2048, 24, 32, 8192, False, 51200),
    "StableLM Alpha 3B": ("GPTNeoXForCausalLM", 4096, 16, 32, 16384, False, 50688),
    "Llama 2 7B": ("LlamaForCausalLM", 4096, 32, 32, 11008, True, 32000),
}
#: tokens of the longest example, by model: the page that has the peaks states them (litgpt, resource-tables.md)
_LONGEST = {"phi-1.5 1.3B": 1044, "StableLM Alpha 3B": 1034, "Llama 2 7B": 1304}
#: prompt and new tokens of the script that measured inference, by its defaults (litgpt, generate/base.py)
_GENERATED = 60
_PAGE = "resource-tables.md"


@dataclass(frozen=True, slots=True)
class Published:
    """A row with the options of its prediction, or the reason it has none."""

    row: Mapping[str, str]
    options: Mapping[str, Any] | None
    reason: str


def read_rows() -> list[Published] | None:
    """Return the rows of $AUTOPREC_PUBLIC_DATA/memory.csv; None where there is no such file."""
    path = Path(os.environ.get("AUTOPREC_PUBLIC_DATA", ""), "memory.csv")
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        return [_read(row) for row in csv.DictReader(file)]


def _read(row: Mapping[str, str]) -> Published:
    reason = _reason(row)
    if reason:
        return Published(row, None, reason)
    four_bit = "nf4" in row["dtype"]
    options: dict[str, Any] = {
        "batch_size": int(row["micro_batch"] or 1),
        "seq_len": _LONGEST[row["model"]] if row["mode"] == "lora" else _GENERATED,
        "mode": "train" if row["mode"] == "lora" else "infer",
        "method": "qlora" if four_bit else "lora" if row["mode"] == "lora" else "full",
        "double_quant": row["dtype"].endswith("dq"),
    }
    if row["mode"] == "lora":  # trained parameters on the page are those of rank 8 on queries and values
        options |= {"adapter_rank": 8, "adapters": "query-value", "loss": "narrow", "dropout": True}
        options |= {"packed_inputs": four_bit}  # bitsandbytes 0.41.1 is stated
        options |= {"optimizer": "adamw-foreach", "accumulation": 128 // options["batch_size"]}
    return Published(row, options, "")


def _reason(row: Mapping[str, str]) -> str:
    """Return why a row's configuration is not fully stated or not modelled; '' where it is."""
    if row["source"].startswith("meta-pytorch/torchtune"):
        return "the memory after building the model, not the peak of a step"
    if "<=512" in row["seq"]:
        return "a limit of 512 tokens is stated, the length of the longest example is not"
    if not row["source"].endswith(_PAGE):
        same = "finetune_lora.md" in row["source"] and "mixed" not in row["dtype"]
        return "stands on the other page already" if same else "sizes of the model, sequence or batch are not stated"
    if row["mode"] == "adapter":
        return "trains prompts and gates of LLaMA-Adapter, which are not modelled"
    if int(row["ngpu"]) > 1:
        return "how the GPUs share the work, and what is checkpointed, is not stated"
    return "" if row["model"] in _MODELS else "the model's sizes are not known here"


def compare(published: Published) -> dict[str, Any]:
    """Return the published and the predicted peak of a row."""
    assert published.options is not None
    row, options = published.row, dict(published.options)
    class_name, hidden, layers, heads, ffn, gated, vocab = _MODELS[row["model"]]
    facts = ModelFacts(
        model_id=row["model"],
        architecture=Architecture.DECODER,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        gated=gated,
        vocab=vocab,
        max_positions=None,
        tied=False,
    )
    profile = skeleton_profile(facts, class_name, joint=True)
    plan = Plan.cast(profile, "bf16", mode=options["mode"])
    predicted = predict_memory(profile, plan, setup_of(plan, **options), facts)
    peak = float(row["peak_gb"]) * 1e9
    return {
        "gpu": row["gpu"],
        "model": row["model"],
        "mode": row["mode"],
        "dtype": row["dtype"],
        "micro_batch": options["batch_size"],
        "seq_len": options["seq_len"],
        "published_gb": float(row["peak_gb"]),
        "predicted_gb": round(predicted.allocated_bytes / 1e9, 2),
        "error_percent": round(100 * (predicted.allocated_bytes / peak - 1), 1),
        "moment": str(predicted.moment),
        "source": row["source"],
    }
