"""What every operator of every architecture of the test suite really ran in, against its plan: the audit as a table.

Each model of `tests/zoo.py` is given five plans (uniform FP32, BF16, FP16 and emulated FP8, and one in which formats
alternate), one step is audited forward and backward, and what was seen is counted: operators that agree, operators
that differ for a reason that the audit gives, and those that disagree. Nothing here is timed.

    python benchmarks/bench_audit.py
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from typing import Any

import torch
from record import ROOT, write_result

from autoprec import applied, audit
from autoprec.plan import Plan
from autoprec.records import AuditReport, Direction

sys.path.insert(0, str(ROOT / "tests"))

from test_matrix import CHOICES, case_of, plan_of  # noqa: E402
from zoo import ZOO  # noqa: E402


def row_of(name: str, choice: str) -> dict[str, Any]:
    """Audit one cell and return its counts."""
    case = case_of(name)
    plan: Plan = plan_of(case.model, choice)
    with applied(case.model, plan, emulate=True):
        report = audit(case.model, plan, case.batch, loss=case.loss)
    return {"units": len(plan.units)} | counts(report)


def counts(report: AuditReport) -> dict[str, Any]:
    """Return how many calls ran in what, and what differs."""
    decided = [row for row in report.rows if row.planned is not None]
    ran: dict[str, dict[str, int]] = {}
    for direction in Direction:
        calls: Counter[str] = Counter()
        for row in decided:
            if row.direction is direction:
                calls[f"{row.planned} in {row.executed}"] += row.calls
        ran[direction.value] = dict(sorted(calls.items()))
    return {
        "calls, planned in executed": ran,
        "explained": dict(Counter(row.reason for row in decided if row.reason)),
        "weights used behind their module": sorted({use.parameter for use in report.behind}),
        "never called": list(report.unused),
        "casts": sum(cast.calls for cast in report.casts),
        "disagreements": list(report.disagreements),
    }


def main() -> None:
    """Audit the matrix and write one result."""
    warnings.simplefilter("ignore")  # of transformers, on models of random weights
    torch.set_num_threads(1)
    table = {name: {choice: row_of(name, choice) for choice in CHOICES} for name in ZOO}
    cells = [row for choices in table.values() for row in choices.values()]
    calls = sum(n for row in cells for found in row["calls, planned in executed"].values() for n in found.values())
    total = {
        "architectures": len(table),
        "cells": len(cells),
        "calls of operators that a plan decides": calls,
        "disagreements": sum(len(row["disagreements"]) for row in cells),
    }
    path = write_result("audit-matrix", {"total": total, "matrix": table})
    print(f"{total}\n{path}")


if __name__ == "__main__":
    main()
