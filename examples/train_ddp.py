"""Train the demo model under DistributedDataParallel with a plan inside.

torchrun --nproc-per-node 2 examples/train_ddp.py --plan plan.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from exported import demo, losses_line, parser


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss of this process."""
    made = demo(parser("Train under DDP with a plan.").parse_args(argv))
    program = made.program("ddp")
    device = program.start()
    model = program.wrap(made.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = [{k: v[rank::world].to(device) for k, v in batch.items()} for batch in made.batches()]
    losses: list[float] = program.train(model, batches, optimizer)
    print(f"process {rank}: {losses_line(losses)}")
    made.audit(model)
    program.finish()
    return losses


if __name__ == "__main__":
    main()
