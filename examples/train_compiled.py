"""Train the demo model with its blocks compiled one by one, and a plan inside.

python examples/train_compiled.py --plan plan.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from exported import demo, losses_line, parser


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss."""
    options = parser("Train compiled blocks with a plan.")
    options.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    made = demo(options.parse_args(argv))
    program = made.program("torch-compile")
    model = program.prepare(made.model, backend=made.options.backend)
    losses: list[float] = program.train(model, made.batches(), torch.optim.AdamW(model.parameters(), lr=1e-3))
    print(losses_line(losses))
    made.audit(model)
    return losses


if __name__ == "__main__":
    main()
