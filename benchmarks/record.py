"""Writing a benchmark's result with what is needed to repeat it: command, date, commit, device, versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "optuna", "numpy")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path; the figures come last, after their origin."""
    data = {
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "device": device(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def commit() -> str:
    """Return the commit the code is at, with '+changes' where the package differs from it."""
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changes = subprocess.run(
        ["git", "status", "--porcelain", "--", "autoprec"], cwd=ROOT, capture_output=True, text=True
    )
    return (head.stdout.strip() or os.environ.get("AUTOPREC_COMMIT", "unknown")) + (
        "+changes" if changes.stdout.strip() else ""
    )


def device() -> dict[str, Any]:
    """Return the processor's name, its cores in use by torch, the instruction sets that matter, and the card if any."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    known = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"}
    return {
        "name": name[1] if name else platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(known & set(flags[1].split())) if flags else [],
        **({"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


#: taken when a benchmark starts: the code it runs, whatever is committed meanwhile
COMMIT = commit()
