"""Train the demo model sharded by FSDP2 with a plan inside.

torchrun --nproc-per-node 2 examples/train_fsdp2.py --plan plan.json
torchrun --nproc-per-node 2 examples/train_fsdp2.py --plan plan.json --low-gather
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from exported import demo, losses_line, parser


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss of this process."""
    options = parser("Train under FSDP2 with a plan.")
    options.add_argument("--low-gather", action="store_true", help="gather 16-bit layers in their format")
    made = demo(options.parse_args(argv))
    program = made.program("fsdp2")
    device = program.start()
    model = program.wrap(made.model, device, low_gather=made.options.low_gather)
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
