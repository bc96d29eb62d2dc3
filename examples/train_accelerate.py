"""Train the demo model with accelerate and a plan in force.

    autoprec export plan.json --to accelerate --out accelerate.yaml
    accelerate launch --config_file accelerate.yaml examples/train_accelerate.py --plan plan.json

The plan is applied before `prepare`; accelerate's own mixed precision stays around the model, the plan inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from exported import demo, losses_line, parser

import autoprec


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss, and accelerate's own format."""
    made = demo(parser("Train with accelerate and a plan.").parse_args(argv))
    autoprec.apply(made.model, made.plan)
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(made.model, optimizer)
    model.train()
    losses = []
    for batch in made.batches():
        optimizer.zero_grad()
        loss = model(**{k: v.to(accelerator.device) for k, v in batch.items()}).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    print(f"accelerate's mixed_precision: {accelerator.mixed_precision}")
    print(losses_line(losses))
    made.audit(model)
    return losses


if __name__ == "__main__":
    main()
