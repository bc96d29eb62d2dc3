"""Train the demo model under DistributedDataParallel with a plan inside.

torchrun --nproc-per-node 2 examples/train_ddp.py --plan plan.json
"""

from __future__ import annotations

from collections.abc import Sequence

from exported import demo, parser, train_part


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss of this process."""
    made = demo(parser("Train under DDP with a plan.").parse_args(argv))
    program = made.program("ddp")
    device = program.start()
    model = program.wrap(made.model, device)
    return train_part(made, program, model, device)


if __name__ == "__main__":
    main()
