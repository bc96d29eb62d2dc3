"""Train the demo model sharded by FSDP2 with a plan inside.

torchrun --nproc-per-node 2 examples/train_fsdp2.py --plan plan.json
torchrun --nproc-per-node 2 examples/train_fsdp2.py --plan plan.json --low-gather
"""

from __future__ import annotations

from collections.abc import Sequence

from exported import demo, parser, train_part


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and print the first and the last loss of this process."""
    options = parser("Train under FSDP2 with a plan.")
    options.add_argument("--low-gather", action="store_true", help="gather 16-bit layers in their format")
    made = demo(options.parse_args(argv))
    program = made.program("fsdp2")
    device = program.start()
    model = program.wrap(made.model, device, low_gather=made.options.low_gather)
    return train_part(made, program, model, device)


if __name__ == "__main__":
    main()
