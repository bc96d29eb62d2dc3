"""What the examples of export targets share: the demo model, a plan, and the exported text loaded as a program.

autoprec export plan.json --to ddp --out planned.py     # what `planned` does here, into a folder of its own
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoprec
from autoprec.demo import folder, text_path


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that all these examples have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--plan", help="a plan.json made for the demo model (default: BF16, but the head in FP32)")
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--seq-len", type=int, default=64)
    return made


@dataclass(frozen=True, slots=True)
class Demo:
    """The demo model with FP32 weights, a plan for it, and where that plan is."""

    model: Any
    plan: autoprec.Plan
    plan_path: Path
    options: argparse.Namespace

    def batches(self, count: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches of the demo text, in a fixed order."""
        size, length = self.options.batch_size, self.options.seq_len
        tokenizer = AutoTokenizer.from_pretrained(folder())
        ids = tokenizer(text_path().read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: len(ids) // length * length].view(-1, length)
        for index in range(self.options.steps if count is None else count):
            rows = windows[torch.arange(index * size, (index + 1) * size) % len(windows)]
            yield {"input_ids": rows, "labels": rows}

    def program(self, target: str) -> Any:
        """Return the text exported to `target`, loaded as a module."""
        file = self.plan_path.parent / f"{target.replace('-', '_')}_program.py"
        file.write_text(autoprec.export(self.plan, target, str(self.plan_path)))
        return load(file)

    def audit(self, model: Any) -> None:
        """Run one more step and print how many units ran in the format that the plan gives them."""
        print_audit(autoprec.audit(model, self.plan, next(self.batches(1))), self.plan)


def load(file: Path) -> Any:
    """Return a Python file as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo(options: argparse.Namespace) -> Demo:
    """Load the demo model, and the plan that was asked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    model.config.use_cache = False
    if options.plan:
        plan = autoprec.Plan.load(options.plan)
    else:
        plan = autoprec.Plan.uniform(model, "bf16").replace({"lm_head": "fp32"})
    path = Path(tempfile.mkdtemp(prefix="autoprec-example-")) / "plan.json"
    plan.save(path)
    return Demo(model, plan, path, options)


def train_part(made: Demo, program: Any, model: Any, device: torch.device) -> list[float]:
    """Train on this process's part of each batch, print its losses, audit, and leave the processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = [{k: v[rank::world].to(device) for k, v in batch.items()} for batch in made.batches()]
    losses: list[float] = program.train(model, batches, optimizer)
    print(f"process {rank}: {losses_line(losses)}")
    made.audit(model)
    program.finish()
    return losses


def print_audit(report: Any, plan: autoprec.Plan) -> None:
    """Print how many units of a plan ran in their format, every product forward and backward."""
    ran: dict[str, set[str]] = {}
    for row in report.rows:
        if row.unit is not None and row.kind in ("matmul", "convolution", "lookup"):
            ran.setdefault(row.unit, set()).add(row.executed.removesuffix(" (emulated)"))
    right = sum(ran.get(unit.name) == {str(unit.format)} for unit in plan.units)
    print(f"audit: {right} of {len(plan.units)} units ran as planned, {len(report.disagreements)} disagreements")


def losses_line(losses: list[float]) -> str:
    """Return the first and the last loss as a line."""
    return f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}"
