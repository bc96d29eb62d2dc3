"""What a mixed plan costs: 61 units alternating between BF16 and FP32, against the same casts written by hand.

Both sides are one Llama with one set of weights. By hand, each BF16 layer casts its input and weight in its own
forward and attention casts what it multiplies, as one would write it in plain PyTorch; there is neither autocast nor
autoprec in it. The other side has a plan in force. Before timing, outputs and gradients are compared bit for bit and
the casts of both sides are counted. Each round times three steps in rotating order: by hand, the plan, and by hand
again (A/A: what the machine's noise alone makes of such a ratio). `tiny` has the same 61 units at the width of the
demo model, where a step is mostly Python.

    python benchmarks/bench_mixed.py [--model smollm2|tiny] [--mode infer|train] [--pairs 200]
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any, cast

import torch
from ratios import ratio_row
from record import ROOT, write_result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from autoprec import Plan, apply
from autoprec.probe.compare import median_ci95
from autoprec.probe.units import probe_units
from autoprec.records import Role

LOW = torch.bfloat16
#: batch and window; so few tokens for the tiny one that arithmetic is the lesser part of its step
SIZES = {"tiny": (1, 16), "smollm2": (1, 128)}
#: the most a plan may cost on a real model, at the lower end of the interval
BAR = 1.03


class LowLinear(nn.Linear):
    """A linear layer that computes in BF16 and keeps its weight in FP32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(LOW), self.weight.to(LOW))


class LowAttention(LlamaAttention):  # type: ignore[misc]
    """Attention whose product is in BF16; its projections are `LowLinear`s."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **others: Any
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        found, _ = sdpa_attention_forward(
            self, query.to(LOW), key.to(LOW), value.to(LOW), others["attention_mask"], scaling=self.scaling
        )
        return self.o_proj(found.reshape(*hidden_states.shape[:-1], -1).contiguous()), None


class Casts(TorchDispatchMode):
    """Counts the casts inside its block."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def load(model: str) -> nn.Module:
    """Return the model, with random weights where it is the tiny one."""
    if model == "tiny":
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=30, num_attention_heads=4, vocab_size=1024
        )
        return cast(nn.Module, LlamaForCausalLM(config))
    return cast(nn.Module, LlamaForCausalLM.from_pretrained(ROOT / ".models" / model, dtype=torch.float32))


def alternating(model: nn.Module) -> Plan:
    """Return the plan whose units alternate in the order they run: attention and the head BF16, FFNs FP32."""
    profile = probe_units(model)
    units = [unit.name for unit in profile.units if unit.role is not Role.EMBEDDING]
    return Plan.assign(profile, {name: ("bf16", "fp32")[i % 2] for i, name in enumerate(units)})


def by_hand(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a second model on the same parameters, with the plan's casts written into its layers."""
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for unit in plan.units:
        if unit.format == "bf16":
            for name in unit.modules:
                made.get_submodule(name).__class__ = LowLinear
            if unit.role is Role.ATTENTION:
                made.get_submodule(unit.modules[0].rpartition(".")[0]).__class__ = LowAttention
    return made


class Steps:
    """Steps on shared weights: forward alone, or with backward and an optimizer step of size 0."""

    def __init__(self, model: nn.Module, mode: str, ids: Tensor) -> None:
        self.mode, self.ids = mode, ids
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)

    def run(self, model: nn.Module) -> Tensor:
        """Do one step and return the logits."""
        with torch.set_grad_enabled(self.mode == "train"):
            logits = cast(Tensor, model(input_ids=self.ids, use_cache=False).logits)
        if self.mode == "train":
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten()).backward()
            self.optimizer.step()
        return logits.detach()

    def seconds(self, model: nn.Module) -> float:
        """Return the seconds of one step."""
        start = time.perf_counter()
        self.run(model)
        return time.perf_counter() - start


def check_equal(steps: Steps, planned: nn.Module, manual: nn.Module) -> dict[str, int]:
    """Return the casts of a forward of each side.

    Raises:
        SystemExit: outputs, gradients or the numbers of casts differ, so that times would compare different work.
    """
    counts = {}
    for name, model in (("plan", planned), ("by hand", manual)):
        with Casts() as casts, torch.no_grad():  # type: ignore[no-untyped-call]
            model(input_ids=steps.ids, use_cache=False)
        counts[name] = casts.count
    results = []
    for model in (planned, manual):
        logits = steps.run(model)
        results.append([logits, *(p.grad.clone() for p in steps.parameters if p.grad is not None)])
    unequal = sum(not torch.equal(a, b) for a, b in zip(*results, strict=True))
    if unequal or counts["plan"] != counts["by hand"]:
        raise SystemExit(f"the two sides differ: {unequal} of {len(results[0])} tensors, casts {counts}")
    return counts


def rounds(steps: Steps, planned: nn.Module, manual: nn.Module, pairs: int) -> dict[str, list[float]]:
    """Time `pairs` rounds and return the seconds of each side."""
    sides = [("by hand", manual), ("plan", planned), ("by hand again", manual)]
    seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
    for index in range(-3, pairs):
        order = sides[index % 3 :] + sides[: index % 3]
        for name, model in order if (index // 3) % 2 else reversed(order):
            spent = steps.seconds(model)
            if index >= 0:  # three rounds of warm-up
                seconds[name].append(spent)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios plan / by hand and by hand / by hand, median and 95 % interval."""
    both = [(a + b) / 2 for a, b in zip(seconds["by hand"], seconds["by hand again"], strict=True)]
    result: dict[str, Any] = {"pairs": len(both)}
    for name, one, other in (
        ("plan / by hand", seconds["plan"], both),
        ("A/A: by hand / by hand", seconds["by hand again"], seconds["by hand"]),
    ):
        result[name] = ratio_row(a / b for a, b in zip(one, other, strict=True))
    low = result["plan / by hand"]["ci95"]
    result[f"lower end at most {BAR}, as a plan may cost on smollm2"] = bool(low) and low[0] <= BAR
    result["step by hand, ms (median; this machine, this hour)"] = round(1e3 * median_ci95(both)[0], 2)
    return result


def figures(model: str, modes: list[str], pairs: int) -> dict[str, Any]:
    """Measure one model in each mode."""
    planned = load(model).eval()  # no dropout in these models: the same arithmetic as in train()
    plan = alternating(planned)
    manual = by_hand(planned, plan)
    units = [unit for unit in plan.units if unit.role is not Role.EMBEDDING]
    vocabulary = cast(int, planned.get_submodule("lm_head").out_features)
    ids = torch.randint(vocabulary, SIZES[model], generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"units": len(units), "in bf16": sum(unit.format == "bf16" for unit in units)}
    handle = apply(planned, plan)
    for mode in modes:
        steps = Steps(planned, mode, ids)
        casts = check_equal(steps, planned, manual)
        found[mode] = {"casts in a forward": casts["plan"]} | ratios(rounds(steps, planned, manual, pairs))
    handle.remove()
    return found


def main() -> None:
    """Measure the asked model and mode, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES))
    parser.add_argument("--mode", choices=["infer", "train"])
    parser.add_argument("--pairs", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for model in [asked.model] if asked.model else list(SIZES):
        found = figures(model, [asked.mode] if asked.mode else ["infer", "train"], asked.pairs)
        rows, window = SIZES[model]
        path = write_result(f"mixed-{model}", {"model": model, "batch": f"{rows}x{window} tokens"} | found)
        print(Path(path).read_text())


if __name__ == "__main__":
    main()
