"""How long a user waits: CPU time and peak memory of `autoprec recommend MODEL`, wall time of `autoprec --help`.

python benchmarks/bench_start.py [--runs 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from record import ROOT, write_result


def spent(command: list[str], runs: int) -> dict[str, Any]:
    """Run a command several times after a warm-up; return CPU seconds, wall seconds and peak memory."""
    cpu, wall, peak = [], [], []
    for index in range(runs + 1):
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        if index:
            wall.append(time.perf_counter() - began)
            cpu.append(usage.ru_utime + usage.ru_stime)
            peak.append(usage.ru_maxrss / 1024)
    return {
        "runs": runs,
        "cpu_s": {"median": round(statistics.median(cpu), 2), "max": round(max(cpu), 2)},
        "wall_s": {"median": round(statistics.median(wall), 2), "max": round(max(wall), 2)},
        "peak_mb": {"median": round(statistics.median(peak)), "max": round(max(peak))},
    }


def main() -> None:
    """Measure both commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    autoprec = [sys.executable, "-m", "autoprec"]
    with tempfile.TemporaryDirectory() as out:
        recommend = spent([*autoprec, "recommend", str(ROOT / ".models" / "smollm2"), "--out", out], runs)
        listed = spent(
            [*autoprec, "recommend", str(ROOT / ".models" / "smollm2"), "--device", "h100-sxm", "--out", out], runs
        )
    path = write_result(
        "start",
        {
            "autoprec recommend smollm2": recommend,
            "autoprec recommend smollm2 --device h100-sxm": listed,
            "autoprec --help": spent([*autoprec, "--help"], runs),
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
