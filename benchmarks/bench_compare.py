"""A classifier's formats: accuracy, drop, speed, memory, and training over seeds, as `autoprec compare` has them.

    python benchmarks/bench_compare.py [--device NAME] [--batches N] [--steps N] [--seeds K]

The spam classifier (MiniLM with a logistic head) on mails its head was not fitted on, 8 a batch, under blanket BF16,
FP16 and FP8. On a card that is not here formats are emulated, times and memory predicted; `--device auto` measures on
this machine, FP16 and FP8 left out where it has no such units. Writes the result, and its page into docs/compare.md.
"""

from __future__ import annotations

import argparse
import io
import re
from typing import Any

import torch
from bench_training import RATES, minilm
from record import ROOT, write_result
from rich.console import Console

from autoprec.comparison import Candidate, compare_plans, plan_by_name
from autoprec.files import as_json
from autoprec.probe.steps import device_of
from autoprec.probe.units import probe_units
from autoprec.records import PlanComparison
from autoprec.report.compared import print_comparison
from autoprec.study.away import absent_device, forecast_of

PAGE = ROOT / "docs" / "compare.md"
WIDTH = 110


def main() -> None:
    """Compare, write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100-sxm")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    workload = minilm()
    workload = workload.with_batches(workload.batches[: asked.batches])
    known = absent_device(device_of(workload.model), asked.device)
    away: dict[str, Any] = {}
    names = ["bf16", "cast-bf16"]
    if known is not None:
        away["forecast"] = forecast_of(workload, probe_units(workload.model, model_id=workload.model_id), known)
        names = ["bf16", "fp16", "fp8"]
    candidates = [
        Candidate(
            name=name, source="by name", plan=plan_by_name(name, workload.model, mode=workload.mode, device=known)
        )
        for name in names
    ]
    found = compare_plans(
        workload,
        candidates,
        train_steps=asked.steps,
        seeds=asked.seeds,
        learning_rate=RATES["minilm"],
        pairs=200 if known is None else 20,  # times on a shared machine are claimed from 200 pairs on
        tell=lambda text: print(text, flush=True),
        **away,
    )
    name = "compare-minilm" if known is not None else "compare-minilm-here"
    print(write_result(name, {"comparison": as_json(found), "threads": torch.get_num_threads()}))
    text = page(found)
    print(text)
    PAGE.write_text(placed(PAGE.read_text(), name, text))


def page(found: PlanComparison) -> str:
    """Return the page that the command prints."""
    file = io.StringIO()
    print_comparison(Console(file=file, width=WIDTH), found)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def placed(document: str, name: str, text: str) -> str:
    """Return the document with a page between its marks; as it is where it has none of the name."""
    return re.sub(
        rf"(<!-- {name}: begin .*?-->\n).*?(<!-- {name}: end -->)",
        lambda match: f"{match[1]}```\n{text}\n```\n{match[2]}",
        document,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    main()
