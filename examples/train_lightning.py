"""Train the demo model with Lightning and a plan in force.

python examples/train_lightning.py --plan plan.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from exported import demo, parser


def main(argv: Sequence[str] | None = None) -> float:
    """Train and print the last loss."""
    made = demo(parser("Train with Lightning and a plan.").parse_args(argv))
    program = made.program("lightning")
    module = program.Planned(made.model)
    trainer = program.make_trainer(
        "cuda" if torch.cuda.is_available() else "cpu",
        max_steps=made.options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(made.batches()), batch_size=None))
    loss = float(trainer.callback_metrics["train_loss"])
    print(f"loss {loss:.4f} at step {trainer.global_step}")
    made.audit(module.model)
    return loss


if __name__ == "__main__":
    main()
