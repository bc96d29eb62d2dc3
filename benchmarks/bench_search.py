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

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from record import ROOT, write_result

from autoprec import FrontSampler
from autoprec.files import from_json
from autoprec.quantities import duration_seconds
from autoprec.records import DeviceProfile, ModelProfile, SensitivityProfile, SpeedProfile
from autoprec.study.knowledge import drop_priors, time_priors
from autoprec.study.space import build_space


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


def least_possible(run: Path, drop: float, uniform: str) -> dict[str, Any]:
    """Return, as believed from all trials, how much of uniform BF16's saving the exact front keeps at this drop."""
    read = {
        name: json.loads((run / f"{name}.json").read_text()) for name in ("device", "units", "sensitivity", "speed")
    }
    device = from_json(DeviceProfile, read["device"], what="device")
    space = build_space("default", from_json(ModelProfile, read["units"], what="units"), device)
    known = from_json(SensitivityProfile, read["sensitivity"], what="sensitivity")
    speed = from_json(SpeedProfile, read["speed"], what="speed")
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(run / "study.journal"))))
    sampler = FrontSampler(
        {d.name: d.formats for d in space.decisions}, drop_priors(space, known), time_priors(space, speed)
    )
    told = next(t for t in study.get_trials() if t.user_attrs.get("baseline") == uniform)
    wide = next(t for t in study.get_trials() if t.user_attrs.get("baseline") == "uniform fp32")
    times = {"all": told.values[1], "none": wide.values[1], "least": sampler.least_time(study, drop)}
    return {
        "least ms believed": round(times["least"], 2),
        "uniform bf16 ms": round(times["all"], 2),
        "fp32 ms": round(times["none"], 2),
        "time saved over uniform bf16's": round((times["none"] - times["least"]) / (times["none"] - times["all"]), 3),
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
    if (asked.model, asked.mode) == ("minilm", "train"):  # an encoder alone has nothing to train towards
        command[3:] = ["search", f"{ROOT / 'benchmarks' / 'truths.py'}:minilm_training"]
    began = time.monotonic()
    subprocess.run([*command, "--budget", asked.budget, "--out", str(out), "--json"], check=True, cwd=ROOT)
    seconds = time.monotonic() - began
    result = json.loads((out / "result.json").read_text())
    chosen = None if result["chosen"] is None else result["front"][result["chosen"]]
    shown = ("name", "drop", "drop_percent", "speedup", "speedup_ci95", "speedup_over_uniform")
    rows = [{k: m[k] for k in shown} for m in result["front"]]
    uniform = next(m for m in result["baselines"] if m["name"] == "uniform bf16")
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
            "fastest with half of uniform bf16's drop": gentle(result["front"] + result["baselines"], uniform),
            "exact front at half of uniform bf16's drop": least_possible(out, uniform["drop"] / 2, "uniform bf16"),
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
