"""docs/claims.md is what its script would write now: no claim without what the package finds of it today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_claims_page_is_up_to_date() -> None:
    command = [sys.executable, "benchmarks/claims_table.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert run.returncode == 0, run.stderr


def test_every_finding_has_its_origin_and_source() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "claims.md").read_text().splitlines() if line[:2] == "| "]
    rows = [row for row in rows if row[0] != "| claim"]
    assert len(rows) > 30 and {len(row) for row in rows} == {5}
    origins = {
        "measured",
        "emulated",
        "predicted",
        "datasheet",
        "recorded",
        "by definition",
        "by arithmetic",
        "by rule",
    }
    for row in rows:
        known = row[3] in origins and len(row[4].strip(" |")) > 5
        assert known or row[3] == "-", row
