"""Trace the demo model with a plan as casts in its graph, and compile it where TensorRT is installed.

python examples/compile_tensorrt.py --plan plan.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from exported import demo, parser

from autoprec.exporters.program import products


def main(argv: Sequence[str] | None = None) -> Counter[str]:
    """Print how many products the program has in each format, and compile it where that can be done."""
    made = demo(parser("Compile a plan with TensorRT.").parse_args(argv))
    program = made.program("tensorrt")
    ids = next(made.batches(1))["input_ids"]
    traced = program.trace(made.model, input_ids=ids)
    counts = Counter(format for product in products(traced, made.plan, made.model) for format in product.executed)
    print("products by format: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if find_spec("torch_tensorrt") and torch.cuda.is_available():
        engine = program.compile_model(made.model.cuda(), input_ids=ids.cuda())
        print(engine(input_ids=ids.cuda()).logits.dtype)
    return counts


if __name__ == "__main__":
    main()
