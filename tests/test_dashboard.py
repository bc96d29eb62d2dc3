"""optuna-dashboard opens what a search leaves: its journal, and its study in a database."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import postgres
import pytest
from searching import table, workload

from autoprec import search

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("short_measurements")]

#: as the command `optuna-dashboard` does
PROGRAM = "from optuna_dashboard._cli import main; main()"


@contextmanager
def dashboard(storage: str, log: Path) -> Iterator[str]:
    """Run the dashboard on a storage, and yield the address of its JSON."""
    port = postgres.free_port()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, storage, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}/api"
    finally:
        process.kill()
        process.wait()


def read(address: str, log: Path) -> Any:
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)
        except ConnectionError:
            assert time.monotonic() < end, log.read_text()
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ConnectionError) and time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def check(storage: str, out: Path) -> None:
    log = out.with_suffix(".log")
    with dashboard(storage, log) as address:
        found = {s["study_name"]: s for s in read(f"{address}/studies", log)["study_summaries"]}
        (name,) = [name for name in found if not name.endswith("-turns")]
        detail = read(f"{address}/studies/{found[name]['study_id']}?after=0", log)
    assert [str(d).lower() for d in detail["directions"]] == ["minimize", "minimize"]
    rows = {int(row["trial"]): row for row in table(out) if row["trial"]}
    shown = {t["number"]: t for t in detail["trials"] if any(a["key"] == "measurement" for a in t["user_attrs"])}
    assert shown.keys() == rows.keys() and len(rows) == 3
    clocks: list[float] = []
    for number, trial in shown.items():
        assert trial["state"] == "Complete"
        drop, step_ms = (float(value) for value in trial["values"])
        assert drop == pytest.approx(float(rows[number]["drop"]))
        clocks.append(float(rows[number]["step_ms"]) / step_ms)
        assert len(trial["params"]) == 6
    # rows are put on one clock in the end, the same for all
    assert clocks == pytest.approx([clocks[0]] * len(clocks))


def test_it_opens_a_journal(tmp_path: Path) -> None:
    out = tmp_path / "run"
    search(workload(), budget=300, trials=3, out=out, learn=False)
    check(str(out / "study.journal"), out)


def test_it_opens_a_database(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with postgres.server() as server:
        search(workload(), budget=300, trials=3, out=out, storage=server.url, learn=False)
        check(server.url.replace("postgresql:", "postgresql+psycopg:"), out)
