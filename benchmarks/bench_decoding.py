"""Decoding with weights stored in BF16: batch 1, 64 tokens, against autocast and FP32.

Each round decodes the same prompt on every side, the order turning round. All sides but FP32 compute in BF16; the
stored side also holds keys and values so. Tokens are the most likely ones; how many agree with FP32's is given beside.

    python benchmarks/bench_decoding.py [--model smollm2|demo] [--tokens 64] [--rounds 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ratios import ratio_row
from record import ROOT, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoprec import Plan, applied
from autoprec.demo import folder
from autoprec.integrations.kv import PrecisionCache
from autoprec.probe.compare import median_ci95
from autoprec.probe.steps import timed

PROMPT = "The family of Dashwood had long been settled in Sussex. Their estate was large, and their residence was at"


def autocast() -> AbstractContextManager[Any]:
    """Return autocast as a user enters it, with its cache of cast weights."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, tokens: int, each: Callable[[], Any], cache: Any = None) -> list[int]:
    """Decode greedily, `each` entered at every forward, and return the tokens."""
    made = []
    for _ in range(tokens):
        with each():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        made.append(int(ids))
    return made


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "demo"], default="smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    place = folder() if asked.model == "demo" else ROOT / ".models" / asked.model
    ids = AutoTokenizer.from_pretrained(place)(PROMPT, return_tensors="pt")["input_ids"]
    fp32 = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    # models of their own: a plan goes on once, not at every round
    low, stored = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for _ in range(2))
    plan = Plan.uniform(fp32, "bf16", mode="infer")
    plan = plan.replace({unit.name: "bf16" for unit in plan.units})  # a tied head can be stored low only so

    def outer() -> list[int]:
        with autocast():
            return decode(fp32, ids, asked.tokens, nullcontext)

    def held() -> list[int]:
        return decode(stored, ids, asked.tokens, nullcontext, PrecisionCache(stored, plan))

    sides: dict[str, Callable[[], list[int]]] = {
        "fp32": partial(decode, fp32, ids, asked.tokens, nullcontext),
        "autocast at each forward": partial(decode, fp32, ids, asked.tokens, autocast),
        "autocast once around all": outer,
        "plan, weights in fp32": partial(decode, low, ids, asked.tokens, nullcontext),
        "plan, weights in bf16": held,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, list[int]] = {}
    with ExitStack() as stack:
        stack.enter_context(applied(low, plan))
        stack.enter_context(applied(stored, plan, storage="bf16")).settle()
        names = list(sides)
        for index in range(-1, asked.rounds):
            order = names[index % 5 :] + names[: index % 5]
            for name in order if (index // 5) % 2 else reversed(order):
                spent, made[name] = timed(torch.device("cpu"), sides[name])
                if index >= 0:  # one round of warm-up
                    seconds[name].append(spent)
    figures: dict[str, Any] = {"model": asked.model, "tokens": asked.tokens, "rounds": asked.rounds}
    base = seconds["plan, weights in bf16"]
    for name in names:
        ratios = ratio_row(a / b for a, b in zip(seconds[name], base, strict=True))
        figures[f"{name} / plan, weights in bf16"] = {
            **ratios,
            "ms a token": round(1e3 * median_ci95(seconds[name])[0] / asked.tokens, 2),
            "tokens as in fp32": sum(a == b for a, b in zip(made[name], made["fp32"], strict=True)),
        }
    print(Path(write_result(f"decoding-{asked.model}", figures)).read_text())


if __name__ == "__main__":
    main()
