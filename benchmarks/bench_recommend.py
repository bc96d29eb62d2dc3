"""What `autoprec recommend` takes on a catalogued device: CPU time and peak memory.

Writes benchmarks/results/recommend.json. The limits the project sets itself: 3 s and 300 MB for a model of the
catalogue, 8 s for a local one: `demo`, whose class is one of `profiles/classes`, and a folder with the configuration of
GPT-Neo-125M, whose modules transformers builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from record import ROOT, write_result

from autoprec.models import find_model

BUILT = "EleutherAI/gpt-neo-125m"
MODELS = ("openai-community/gpt2", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "demo", f"./{BUILT}")
DEVICE = "h100-sxm"
RUNS = 5


def recommend(model: str, folder: Path) -> dict[str, float]:
    """Run the command once; return CPU seconds (user and system), peak resident MB, and the units of its plan."""
    command = [sys.executable, "-m", "autoprec", "recommend", model, "--device", DEVICE, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "out.json").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    plan = json.loads((folder / "out.json").read_text())["plan"]
    # Linux counts ru_maxrss in kilobytes
    return {"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1e3, "units": len(plan["units"])}


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        local, known = Path(folder) / BUILT, find_model(BUILT)
        assert known is not None
        local.mkdir(parents=True)
        (local / "config.json").write_text(json.dumps(known.configuration))
        for model in MODELS:
            runs = [recommend(model, Path(folder)) for _ in range(RUNS)]
            figures[model] = {
                "runs": RUNS,
                "cpu_s": round(median(run["cpu_s"] for run in runs), 3),
                "cpu_s_largest": round(max(run["cpu_s"] for run in runs), 3),
                "peak_mb": round(max(run["peak_mb"] for run in runs), 1),
                "units": runs[0]["units"],
            }
            print(model, figures[model])
    write_result("recommend", {"device": DEVICE, "models": figures})


if __name__ == "__main__":
    main()
