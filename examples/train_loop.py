"""Train the demo model in a plain PyTorch loop with a plan in force.

    python examples/train_loop.py --plan plan.json
    python examples/train_loop.py --format bf16 --steps 20

What autoprec adds to the loop is one line, `autoprec.apply`; a plan with FP16 in it also says how to scale the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoprec
from autoprec.demo import folder, text_path


def batches(batch_size: int, seq_len: int) -> Iterator[torch.Tensor]:
    """Yield batches of token ids [batch_size, seq_len] from the demo text, windows in a fixed random order, forever."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    ids = tokenizer(text_path().read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from windows[torch.randperm(len(windows), generator=generator)].split(batch_size)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, print the first and the last loss, and return the loss of every step."""
    parser = argparse.ArgumentParser(description="Train the demo model with a plan in force.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--plan", help="a plan.json made for the demo model")
    choice.add_argument("--format", default="bf16", help="one format for all units (default: %(default)s)")
    parser.add_argument("--emulate", action="store_true", help="emulate FP8 where the device has none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).to(device).train()
    plan = autoprec.Plan.load(options.plan) if options.plan else autoprec.Plan.uniform(model, options.format)
    autoprec.apply(model, plan, emulate=options.emulate)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaling = dataclasses.asdict(plan.grad_scaler) if plan.grad_scaler else {}
    scaler = torch.amp.GradScaler(device, **scaling, enabled=plan.grad_scaler is not None)
    losses: list[float] = []
    for _, ids in zip(range(options.steps), batches(options.batch_size, options.seq_len), strict=False):
        ids = ids.to(device)
        loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # clip the true gradients, not the scaled ones
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
    return losses


if __name__ == "__main__":
    main()
