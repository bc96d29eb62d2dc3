"""Train a small Llama with some layers in torchao's FP8, chosen by a plan; no autoprec at run time.

    python examples/train_torchao.py             # emulated where the device has no FP8

The model is made here with random weights: torchao converts `nn.Linear` only, and the demo model has other layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from exported import load, losses_line, parser, print_audit
from transformers import LlamaConfig, LlamaForCausalLM

import autoprec


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the converted layers, the first and the last loss."""
    options = parser("Train with torchao's FP8 in the layers of a plan.").parse_args(argv)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    keep = {"blocks.0.ffn": "bf16", "lm_head": "bf16"}
    plan = autoprec.Plan.load(options.plan) if options.plan else autoprec.Plan.uniform(model, "fp8").replace(keep)
    file = Path(tempfile.mkdtemp(prefix="autoprec-example-")) / "torchao_program.py"
    file.write_text(autoprec.export(plan, "torchao"))
    program = load(file)
    real = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    model = program.prepare(model.to("cuda") if real else model, emulate=not real)
    ids = torch.randint(0, 256, (options.batch_size, options.seq_len), device=model.device)
    batches = [{"input_ids": ids, "labels": ids}] * options.steps
    losses: list[float] = program.train(model, batches, torch.optim.AdamW(model.parameters(), lr=1e-3))
    print(f"{len(program.FP8_LAYERS)} layers in FP8")
    print(losses_line(losses))

    def run() -> object:
        with program.ambient(model.device.type):
            return model(**batches[0])

    print_audit(autoprec.audit(model, plan, batches[0], in_force=False, run=run), plan)
    return losses


if __name__ == "__main__":
    main()
