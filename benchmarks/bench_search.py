"""A search on a real model as a user runs it: keeps its budget, and nothing measured beats the chosen plan.

python benchmarks/bench_search.py [--model smollm2] [--mode infer] [--budget 15m] [--batches 16]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, write_result

from autoprec.quantities import duration_seconds


def beaten(chosen: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """Return the names of measurements that are better than the chosen plan in both drop and step time."""
    return [
        m["name"]
        for m in measured
        if m["drop"] is not None and m["drop"] < chosen["drop"] and m["step_ms"] < chosen["step_ms"]
    ]


def gentle(front: list[dict[str, Any]], uniform: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fastest plan with at most half of uniform BF16's drop, and the share of its time saved it keeps."""
    mild = [m for m in front if m["drop"] is not None and m["drop"] <= uniform["drop"] / 2]
    if not mild:
        return None
    best = max(mild, key=lambda m: float(m["speedup"]))
    saved = {name: 1 - 1 / m["speedup"] for name, m in (("own", best), ("uniform", uniform))}
    return {
        "name": best["name"],
        "drop over uniform bf16's": round(best["drop"] / uniform["drop"], 4),
        "time saved over uniform bf16's": round(saved["own"] / saved["uniform"], 3),
    }


def main() -> None:
    """Run `autoprec search` in a process of its own and record what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "minilm", "demo"])
    parser.add_argument("--mode", default="infer", choices=["infer", "train"])
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--batches", default="16")
    asked = parser.parse_args()
    place = asked.model if asked.model == "demo" else str(ROOT / ".models" / asked.model)
    text = ROOT / ".models" / "austen" / "sense_and_sensibility.txt"
    out = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, "-m", "autoprec", "search", place, "--data", str(text), "--mode", asked.mode]
    command += ["--batches", asked.batches]
    began = time.monotonic()
    subprocess.run([*command, "--budget", asked.budget, "--out", str(out), "--json"], check=True, cwd=ROOT)
    seconds = time.monotonic() - began
    result = json.loads((out / "result.json").read_text())
    chosen = None if result["chosen"] is None else result["front"][result["chosen"]]
    shown = ("name", "drop", "drop_percent", "speedup", "speedup_ci95", "speedup_over_uniform")
    rows = [{k: m[k] for k in shown} for m in result["front"]]
    path = write_result(
        f"search-{asked.model}-{asked.mode}",
        {
            "budget_s": duration_seconds(asked.budget),
            "wall_s, loading included": round(seconds, 1),
            "search_s": round(result["seconds"], 1),
            "trials": result["trials"],
            "evaluations": result["evaluations"],
            "verdict": result["verdict"]["text"],
            "chosen": chosen and {k: chosen[k] for k in shown},
            "chosen is beaten in both by": beaten(chosen, result["front"] + result["baselines"]) if chosen else [],
            "fastest with half of uniform bf16's drop": gentle(
                result["front"] + result["baselines"],
                next(m for m in result["baselines"] if m["name"] == "uniform bf16"),
            ),
            "predicted bound": result["predicted_bound"],
            "notes": result.get("notes"),
            "front": rows,
            "baselines": [{k: m[k] for k in (*shown, "reason")} for m in result["baselines"]],
        },
    )
    shutil.rmtree(out.parent)
    print(path.read_text())


if __name__ == "__main__":
    main()
