"""Train a small Llama with Transformer Engine's linear layers in a plan's FP8.

    python examples/train_transformer_engine.py

Not run here: Transformer Engine needs a GPU. The exclusion file was read by nvdlfw-inspect 0.2.2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nvdlfw_inspect.api as debug_api
import torch
import transformer_engine.pytorch as te
from exported import load
from transformers import LlamaConfig, LlamaForCausalLM

import autoprec


def with_engine(model: torch.nn.Module) -> torch.nn.Module:
    """Put Transformer Engine's linear layers, of the same names and weights, into a model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            made = te.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            made.load_state_dict(layer.state_dict(), strict=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    return model


def main(steps: int = 5) -> list[float]:
    """Train, all layers in FP8 but those of the first block and the head, and return the losses."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    keep = {"blocks.0.attention": "bf16", "blocks.0.ffn": "bf16", "lm_head": "bf16"}
    plan = autoprec.Plan.uniform(model, "fp8").replace(keep)
    file = Path(tempfile.mkdtemp(prefix="autoprec-example-")) / "engine_program.py"
    file.write_text(autoprec.export(plan, "transformer-engine"))
    program = load(file)
    model = program.prepare(with_engine(model).cuda(), str(file.parent))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (4, 64), device="cuda")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with program.region():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        debug_api.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
