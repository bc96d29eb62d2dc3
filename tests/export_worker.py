"""One of two processes that run the exported `ddp` and `fsdp2` programs and compare with what one process gets.

Started by `tests/test_export_runs.py` as `python -m export_worker FOLDER RANK`, with the variables that torchrun
sets. FOLDER holds plan.json and the exported programs; writes what was wrong, by way of wrapping, to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from distributed_worker import alone, batch_of, differences, step
from zoo import ZOO

from autoprec import Plan, audit
from autoprec.records import AuditReport, OpKind

__all__ = ["MODEL", "WAYS", "not_as_planned"]

#: its head and embedding share a weight, which the plan computes in two formats
MODEL = "llama_tied"
#: ways of wrapping: the program, and how it is asked to wrap
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 with low_gather": ("fsdp2", {"low_gather": True}),
}


def not_as_planned(report: AuditReport, plan: Plan) -> list[str]:
    """Return the units that did not run in their format, each product of them, forward and backward."""
    ran: dict[str, set[str]] = {}
    for row in report.rows:
        if row.unit is not None and row.kind in (OpKind.MATMUL, OpKind.CONVOLUTION, OpKind.LOOKUP):
            ran.setdefault(row.unit, set()).add(row.executed.removesuffix(" (emulated)"))
    wrong = [f"{u.name}: {ran.get(u.name)}, not {u.format}" for u in plan.units if ran.get(u.name) != {str(u.format)}]
    return wrong + list(report.disagreements)


def load(file: Path) -> dict[str, Any]:
    """Run an exported program and return its names."""
    names: dict[str, Any] = {"__name__": file.stem}
    exec(compile(file.read_text(), str(file), "exec"), names)
    return names


def found(program: dict[str, Any], device: torch.device, plan: Plan, rank: int, options: dict[str, Any]) -> list[str]:
    """Wrap, take one step and compare it bit for bit, audit another, then train three."""
    wanted = alone(ZOO[MODEL], plan, grouped=program["__name__"] == "fsdp2")
    case = batch_of(ZOO[MODEL](), rank)
    model = program["wrap"](case.model, device, **options)
    wrong = differences(step(case, model), wanted)
    model.zero_grad()
    wrong += not_as_planned(audit(model, plan, case.batch), plan)
    assert isinstance(case.batch, dict)
    losses = program["train"](model, [case.batch] * 3, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return wrong + ([] if losses[-1] < losses[0] else [f"losses {losses}"])


def main(folder: Path, rank: int) -> None:
    """Run every way of wrapping and write what was wrong."""
    torch.set_num_threads(1)
    programs = {name: load(folder / f"{name}.py") for name in ("ddp", "fsdp2")}
    plan = Plan.load(folder / "plan.json")
    device = programs["ddp"]["start"]()
    result = {way: found(programs[name], device, plan, rank, options) for way, (name, options) in WAYS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    programs["ddp"]["finish"]()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
