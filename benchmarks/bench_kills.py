"""Kill searches of the demo model at random moments, resume them, and count what was lost.

    python benchmarks/bench_kills.py --kills 200 [--device h100-sxm]

Each kill is `kill -9` of the search or of its worker process, after a random time; half of those of the search wait for
a write of the run folder, and come in the middle of it where they can. After each kill of the search its folder is read
as the next one will find it, and the search is resumed. In the end one search goes on to the end, and the front it
reports is compared with the front of every trial that was ever noted as measured. On a machine that computes nothing
faster than FP32 there is nothing to search: --device names a card to emulate.

Written to benchmarks/results/kills.json: trials lost, files that could not be read, whether the fronts are equal, and
what a trial takes beyond its measurement.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from record import write_result

QUICK = ["--mode", "infer", "--batches", "2", "--batch-size", "2", "--seq-len", "32", "--space", "modules"]
#: of the kills, so many come after another trial was measured; the rest at any moment, most of them of a start
_AFTER_A_TRIAL = 0.6
#: what a search says whose worker is killed while it starts, and again as it starts anew; it can be resumed
GIVEN_UP = "the worker process was ended by SIGKILL"
JSON_FILES = ("device.json", "units.json", "sensitivity.json", "speed.json", "result.json", "plan.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds until a kill")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    search = partial(command, given.device)
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        counts = {"search": 0, "search in a write": 0, "worker": 0, "worker, twice in one start": 0}
        lost, unreadable, known = 0, list[str](), dict[int, Any]()
        while sum(counts.values()) < given.kills:
            killed = one_run(search, run, draw, given.longest, given.kills - sum(counts.values()))
            for what in killed:
                counts[what] += 1
            unreadable += faults_of(run)
            now = measured(run)
            lost += sum(now.get(number) != found for number, found in known.items())
            known = now
            print(f"{sum(counts.values())} kills, {len(known)} trials measured, {lost} lost, {unreadable}", flush=True)
        subprocess.run(search(run, len(known) + 2), check=True, stdout=subprocess.DEVNULL)
        unreadable += faults_of(run)
        final = measured(run)
        lost += sum(final.get(number) != found for number, found in known.items())
        write_result(
            "kills",
            {
                "device of the searches": given.device,
                "kills": counts,
                "trials": len(final),
                "trials_lost": lost,
                "unreadable": unreadable,
                "front_equal": reported_front(run) == front_of_table(run),
                "overhead_ms": overhead_ms(),
            },
        )


def command(device: str, run: Path, trials: int = 100_000) -> list[str]:
    # with a number of trials a search does not end where nothing is left to gain
    words = [
        sys.executable,
        "-m",
        "autoprec",
        "search",
        "demo",
        "--device",
        device,
        "--budget",
        "1h",
        "--resume",
        "--out",
        str(run),
        *QUICK,
    ]
    return [*words, "--trials", str(trials)]


def one_run(
    command: Callable[[Path], list[str]], run: Path, draw: random.Random, longest: float, most: int
) -> list[str]:
    """Run or resume a search until it is killed; return whom the kills met, its workers among them."""
    killed = []
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=said) as search,
    ):
        while True:
            if draw.random() < _AFTER_A_TRIAL:
                wait_for_a_trial(search, run)
            time.sleep(draw.uniform(0.0, longest))
            if search.poll() is not None:
                said.seek(0)
                last = said.read()[-2000:]
                if killed[-2:] == ["worker", "worker"] and GIVEN_UP in last:
                    return [*killed[:-1], "worker, twice in one start"]
                raise SystemExit(f"the search ended by itself with code {search.returncode}: {last}")
            what = draw.choice(["search", "search in a write", "worker"])
            if what == "worker" and len(killed) + 1 < most:
                for worker in children(search.pid):
                    worker_killed = subprocess.run(["kill", "-9", str(worker)], check=False).returncode == 0
                    killed += ["worker"] * worker_killed
                continue
            if what == "search in a write":
                wait_for_a_write(run)
            search.send_signal(signal.SIGKILL)
            return [*killed, what if what != "worker" else "search"]


def wait_for_a_trial(search: subprocess.Popen[bytes], run: Path) -> None:
    """Return as one more trial has been measured, or the search has ended."""
    before = len(measured(run))
    while len(measured(run)) == before and search.poll() is None:
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for_a_write(run: Path) -> None:
    """Return as a file of the folder is being written: a temporary file, the journal's lock, or a longer journal."""
    until, journal = time.monotonic() + 20.0, run / "study.journal"
    size = journal.stat().st_size if journal.exists() else 0
    while time.monotonic() < until and run.exists():
        names = [path.name for path in run.iterdir()]
        if any(n.endswith(".tmp") or n.startswith("study.journal.lock") for n in names):
            return
        if journal.exists() and journal.stat().st_size != size:
            return


def measured(run: Path) -> dict[int, Any]:
    """Return what the journal has of each trial, as far as its lines are whole."""
    found: dict[int, Any] = {}
    if not (run / "study.journal").exists():
        return found
    for line in (run / "study.journal").read_bytes().split(b"\n")[:-1]:
        entry = json.loads(line)
        if "measurement" in entry.get("user_attr", {}):
            found[entry["trial_id"]] = entry["user_attr"]["measurement"]
    return found


def faults_of(run: Path) -> list[str]:
    """Return the files of a run folder that cannot be read as what they are."""
    faults = []
    for name in JSON_FILES:
        try:
            if (run / name).exists():
                json.loads((run / name).read_text())
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if (run / "trials.csv").exists():
        rows = list(csv.reader((run / "trials.csv").read_text().splitlines()))
        if any(len(row) != len(rows[0]) for row in rows):
            faults.append("trials.csv")
    return faults


def reported_front(run: Path) -> set[tuple[float, float]]:
    front = json.loads((run / "result.json").read_text())["front"]
    return {(m["drop"], round(m["step_ms"], 6)) for m in front}


def front_of_table(run: Path) -> set[tuple[float, float]]:
    """Return the points of trials.csv that no other beats, by comparing each with each."""
    rows = csv.DictReader((run / "trials.csv").read_text().splitlines())
    points = {(float(r["drop"]), round(float(r["step_ms"]), 6)) for r in rows if r["state"] == "COMPLETE"}
    return {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}


def overhead_ms(count: int = 50) -> dict[str, float]:
    """Return what asking a warm worker adds to a measurement of the demo model."""
    from autoprec.measurement import Request
    from autoprec.plan import Plan
    from autoprec.study.protocol import Loading
    from autoprec.study.worker import Worker

    loading = Loading(model="demo", device="cpu", mode="infer", batches=2, batch_size=2, seq_len=32)
    with Worker(loading) as worker:
        workload = loading.load()
        worker.open(workload, workload, None)
        worker.first_look()
        plan, times = Plan.uniform(workload.model, "bf16", mode="infer"), list[float]()
        for _ in range(count):
            worker.evaluate(Request(workload=workload, plan=plan, timing_seconds=0.0))
            times.append(1e3 * worker.overhead_seconds)
    return {"median": statistics.median(times), "longest": max(times), "measurements": count}


if __name__ == "__main__":
    main()
