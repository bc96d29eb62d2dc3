"""What a very deep model costs before its first step: finding units, making plans, applying and removing them.

Two models of 1,000 blocks: Llama of Hugging Face, and a GPT written in plain PyTorch. Units are found on the meta
device at the widths of a 7B model; plans are applied to real weights of width 16, which cost no arithmetic.

    python benchmarks/bench_units.py [--layers 1000] [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from record import write_result
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from autoprec import Plan, apply
from autoprec.probe.units import probe_units

#: width, inner width and vocabulary of what is only probed, and of what a plan is applied to
LARGE, SMALL = (4096, 11008, 32000), (16, 32, 64)


class Block(nn.Module):
    """A block as people write it by hand: one projection for query, key and value, two for the FFN."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.norm2(x)))))


class BareGpt(nn.Module):
    """Embedding, blocks, norm and head, without a base class that declares anything."""

    def __init__(self, layers: int, width: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))


def llama(layers: int, width: int, inner: int, vocabulary: int) -> nn.Module:
    """Return Hugging Face's Llama of these sizes."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "vocab_size": vocabulary}
    return cast(nn.Module, LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=2)))


MODELS: dict[str, Callable[[int, int, int, int], nn.Module]] = {"llama": llama, "bare-gpt": BareGpt}


def measure(call: Callable[[], object], runs: int) -> dict[str, float]:
    """Return median and largest CPU and wall seconds of some calls, the first included."""
    cpu, wall = [], []
    for _ in range(runs):
        start, clock = time.process_time(), time.perf_counter()
        call()
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - clock)
    return {
        "cpu_s_median": round(statistics.median(cpu), 4),
        "cpu_s_max": round(max(cpu), 4),
        "wall_s_median": round(statistics.median(wall), 4),
        "wall_s_max": round(max(wall), 4),
    }


def figures(build: Callable[[int, int, int, int], nn.Module], layers: int, runs: int) -> dict[str, Any]:
    """Time each step of one model."""
    with torch.device("meta"):
        shapes = build(layers, *LARGE)
    model = build(layers, *SMALL)
    profile = probe_units(model)
    matmuls = [u.name for u in profile.units if "bf16" in u.formats and "fp32" in u.formats]
    mixed = {name: ("bf16", "fp32")[i % 2] for i, name in enumerate(matmuls)}
    plans = {"uniform": Plan.uniform(profile, "bf16"), "mixed": Plan.assign(profile, mixed)}
    found: dict[str, Any] = {"modules": sum(1 for _ in model.modules()), "units": len(profile.units)}
    found["probe_units, on meta"] = measure(lambda: probe_units(shapes), runs)
    found["probe_units"] = measure(lambda: probe_units(model), runs)
    found["Plan.uniform of a profile"] = measure(lambda: Plan.uniform(profile, "bf16"), runs)
    found["Plan.assign of a profile, formats alternating"] = measure(lambda: Plan.assign(profile, mixed), runs)
    for name, plan in plans.items():
        found[f"apply and remove, {name}"] = measure(apply_and_remove(model, plan), runs)
    return found


def apply_and_remove(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Return a call that puts a plan in force and takes it off."""
    return lambda: apply(model, plan).remove()


def main() -> None:
    """Measure both models and write one result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: figures(build, asked.layers, asked.runs) for name, build in MODELS.items()}
    path = write_result(f"units-{asked.layers}", {"runs": asked.runs} | found)
    print(Path(path).read_text())


if __name__ == "__main__":
    main()
