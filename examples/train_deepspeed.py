"""Train the demo model with DeepSpeed and a plan in force.

    deepspeed examples/train_deepspeed.py --plan plan.json

Not run here: it needs a GPU. The exported configuration was read by DeepSpeed's own parser.
"""

from __future__ import annotations

from collections.abc import Sequence

from exported import demo, parser


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and return the losses."""
    made = demo(parser("Train with DeepSpeed and a plan.").parse_args(argv))
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    settings = {"train_micro_batch_size_per_gpu": made.options.batch_size, "optimizer": optimizer}
    engine, *_ = made.program("deepspeed").initialize(made.model, **settings)
    losses = []
    for batch in made.batches():
        loss = engine(**{name: rows.to(engine.device) for name, rows in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    made.audit(engine.module)
    return losses


if __name__ == "__main__":
    main()
