"""Plans under DDP and FSDP2, two processes: the bits of one process, whatever is wrapped and in whichever order.

The two processes are started once for each suite and run all its cells; a test reads what they wrote about one cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_scenarios import SCENARIOS
from distributed_worker import FAST, NIGHTLY, WORLD, Cell
from filelock import FileLock

ROOT = Path(__file__).parents[1]

#: what was wrong with a cell, for each process
Found = dict[str, list[list[str]]]


def _run(folder: Path, suite: str, seconds: float) -> Found:
    """Run a suite in two processes and return what each of them found for each cell."""
    command = [sys.executable, "-m", "distributed_worker", str(folder)]
    logs = [(folder / f"log{rank}").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen([*command, str(rank), suite], cwd=ROOT / "tests", stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the cells that are missing say so
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    found: Found = {}
    for rank in range(WORLD):
        written = folder / f"rank{rank}.jsonl"
        for line in written.read_text().splitlines() if written.exists() else ():
            name, wrong = json.loads(line)
            found.setdefault(name, []).append(wrong)
    found["log"] = [(folder / f"log{rank}").read_text()[-3000:].splitlines() for rank in range(WORLD)]
    return found


def _check(found: Found, name: str) -> None:
    assert len(found.get(name, [])) == WORLD, "a process ended before this:\n" + "\n".join(sum(found["log"], []))
    for rank, wrong in enumerate(found[name]):
        assert wrong == [], f"process {rank}:\n" + "\n".join(wrong[:20])


def _once(factory: pytest.TempPathFactory, suite: str, seconds: float) -> Found:
    """Run a suite once for all test processes that stand side by side: four of its own on two cores are slow."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"distributed-{suite}"
    folder.mkdir(exist_ok=True)
    result = folder / "found.json"
    with FileLock(folder / "lock"):
        if not result.exists():
            result.write_text(json.dumps(_run(folder, suite, seconds)))
    found: Found = json.loads(result.read_text())
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _once(tmp_path_factory, "fast", 280)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _once(tmp_path_factory, "nightly", 3600)


@pytest.mark.slow
@pytest.mark.parametrize("cell", FAST, ids=str)
def test_two_processes_give_what_one_gives(cell: Cell, fast: Found) -> None:
    _check(fast, str(cell))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, fast: Found) -> None:
    _check(fast, name)


@pytest.mark.nightly
@pytest.mark.parametrize("cell", NIGHTLY, ids=str)
def test_every_cell(cell: Cell, full: Found) -> None:
    _check(full, str(cell))
