"""Write the demo model as ONNX with a plan as casts in its graph, and run it in onnxruntime.

    python examples/infer_onnx.py

onnxruntime's CPU provider has no BF16 products, so the plan here is of FP16 and FP32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime
import torch
from exported import demo, parser

import autoprec


def main(argv: Sequence[str] | None = None) -> float:
    """Write, run, and return the largest difference from PyTorch under the same plan."""
    options = parser("Run a plan in onnxruntime.").parse_args(argv)
    made = demo(options)
    if not options.plan:
        plan = autoprec.Plan.uniform(made.model, "fp16", mode="infer").replace({"lm_head": "fp32"})
        plan.save(made.plan_path)
        made = type(made)(made.model, plan, made.plan_path, options)
    ids = next(made.batches(1))["input_ids"]
    file = made.plan_path.parent / "model.onnx"
    made.program("onnx").write(made.model, file, input_ids=ids)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": ids.numpy()})
    with autoprec.applied(made.model.eval(), made.plan), torch.inference_mode():
        wanted = made.model(input_ids=ids).logits
    difference = float((torch.from_numpy(logits).float() - wanted.float()).abs().max())
    print(f"logits in {logits.dtype}, at most {difference:.2e} from PyTorch's under the same plan")
    return difference


if __name__ == "__main__":
    main()
