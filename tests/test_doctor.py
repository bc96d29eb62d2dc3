"""The doctor on recorded texts: each trouble under its code, and nothing above a note on set-ups that are well."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoprec.cli.main import main
from autoprec.doctor import hosts
from autoprec.doctor.case import Case
from autoprec.doctor.diagnosis import all_checks, diagnose
from autoprec.doctor.logs import Log
from autoprec.doctor.run import Run
from autoprec.doctor.scaling import fp16_hazard
from autoprec.errors import DataError, ModelError, UsageError
from autoprec.recommender.advice import FP16_OVERFLOW
from autoprec.records import Diagnosis, Severity

DATA = Path(__file__).parent / "doctor"
TROUBLES = sorted((DATA / "troubles").iterdir())
HEALTHY = sorted((DATA / "healthy").iterdir())
VARIANTS = [line for line in (DATA / "variants.txt").read_text().splitlines() if line]
SETTINGS = json.loads((DATA / "settings.json").read_text())


def visit(path: Path, device: str = "auto") -> Diagnosis:
    return (
        diagnose(logs=[str(path)], device=device)
        if path.suffix == ".log"
        else diagnose(settings=[str(path)], device=device)
    )


def codes(found: Diagnosis, least: Severity = Severity.NOTE) -> set[str]:
    return {finding.code for finding in found.findings if finding.severity.rank <= least.rank}


@pytest.mark.parametrize("path", TROUBLES, ids=lambda p: p.name)
def test_a_trouble_is_found_under_its_code(path: Path) -> None:
    found = visit(path)
    assert path.name[:5] in codes(found), codes(found)
    place = next(f for f in found.findings if f.code == path.name[:5]).evidence[0].place
    assert place.startswith(str(path))


def test_each_of_the_24_troubles_has_a_recorded_text() -> None:
    assert {f"AP{n:03}" for n in range(1, 25)} <= {path.name[:5] for path in TROUBLES}


@pytest.mark.parametrize("instructions", [("avx2",), ("avx2", "avx512_bf16")], ids=["", "bf16"])
@pytest.mark.parametrize("path", HEALTHY, ids=lambda p: p.name)
def test_a_healthy_set_up_gets_notes_at_most_whatever_the_cpu(
    path: Path, instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "cpu_instructions", lambda: instructions)
    found = visit(path)
    assert not codes(found, Severity.WARNING), [(f.code, f.evidence) for f in found.findings]
    assert not found.broken


def test_there_are_twenty_healthy_set_ups() -> None:
    assert len(HEALTHY) >= 20


@pytest.mark.parametrize("line", VARIANTS)
def test_the_same_cause_in_other_words(line: str) -> None:
    code, _, text = line.partition("|")
    case = Case(logs=(Log("log", text.replace("\\n", "\n")),), run=Run(()))
    found = {c.code: [e.severity or c.severity for e in c.find(case)] for c in all_checks()}
    loud = {code for code, seen in found.items() if any(s is not Severity.NOTE for s in seen)}
    if code == "none":
        assert not loud
    else:
        assert found[code] and loud <= {code}, loud


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: f"{row['code']}-{row['text'][:24]!r}")
def test_settings_in_other_words(row: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / row["name"]
    path.write_text(row["text"])
    found = visit(path, row.get("device", "auto"))
    if row["code"] == "none":
        assert not codes(found, Severity.WARNING), [(f.code, f.evidence) for f in found.findings]
    else:
        assert row["code"] in codes(found)


def test_scripts_are_read_and_never_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from pathlib import Path\nPath('ran').touch()\nraise SystemExit(3)\n")
    diagnose(settings=[str(script)])
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()


def test_findings_come_worst_first(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"fp16": true, "fp16_backend": "amp", "use_cpu": true, "gradient_checkpointing": true}')
    found = diagnose(settings=[str(path)])
    ranks = [f.severity.rank for f in found.findings]
    assert ranks == sorted(ranks) and ranks[0] == 0 and ranks[-1] == 2
    assert found.worst is Severity.ERROR and found.broken


# bad input


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"   \n\n", "empty"),
        (b"PK\x03\x04" + bytes(200), "zip archive"),
        (bytes(range(256)) * 20, "binary"),
        (b"Roses are red\nviolets are blue\n", "does not read like a log"),
    ],
)
def test_a_log_that_is_no_log_is_refused_with_the_reason(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        diagnose(logs=[str(path)])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"bf16": true', "damaged or cut off"),
        ("a.yaml", "a: [1\nb: 2", "no YAML"),
        ("a.py", "def f(:\n", "no Python"),
        ("a.toml", "= 3", "no valid TOML"),
        ("a.json", "[1, 2]", "not a table"),
        ("a.ipynb", '{"cells": 3}', "no notebook"),
    ],
)
def test_damaged_settings_are_refused_with_the_reason(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        diagnose(settings=[str(path)])


def test_missing_files_folders_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        diagnose(logs=[str(tmp_path / "none.log")])
    with pytest.raises(DataError, match="is a folder"):
        diagnose(settings=[str(tmp_path)])
    with pytest.raises(ModelError, match="no model or checkpoint folder"):
        diagnose(str(tmp_path))
    with pytest.raises(UsageError, match="something to look at"):
        diagnose()
    with pytest.raises(UsageError, match="--trace runs a model"):
        diagnose(logs=["x"], trace=True)


def test_of_a_huge_log_the_beginning_and_the_end_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprec.doctor.reading._HEAD_BYTES", 1000)
    monkeypatch.setattr("autoprec.doctor.reading._TAIL_BYTES", 1000)
    path = tmp_path / "big.log"
    path.write_text("step 1 loss 2.0\n" * 1000 + "ValueError: Attempting to unscale FP16 gradients.\n")
    found = diagnose(logs=[str(path)])
    assert codes(found) == {"AP001"}
    assert any("not read" in note for note in found.notes)


# the command


def test_the_command_prints_findings_and_exits_1_only_when_something_is_broken(tmp_path: Path) -> None:
    broken, well = DATA / "troubles" / "AP001-trainer.log", DATA / "healthy" / "trainer.log"
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["doctor", "--log", str(broken)])
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())  # where a line ends depends on how long the file's path is
    for wanted in ("AP001", "error", "Attempting to unscale", "dtype=torch.float32", "https://github.com/"):
        assert wanted in words
    result = CliRunner().invoke(main, ["doctor", "--log", str(well), "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "autoprec/diagnosis@1" and document["worst"] is None and document["findings"] == []


def test_the_command_says_what_is_wrong_with_a_file() -> None:
    result = CliRunner().invoke(main, ["doctor", "--log", "missing.log"])
    assert result.exit_code == 1 and result.stdout == ""
    assert "Error: --log missing.log does not exist" in result.stderr
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 2


# the register


def test_every_check_is_told_in_full() -> None:
    for check in all_checks():
        assert check.meaning and check.advice and check.sources, check.code
        assert all(source.startswith("https://") for source in check.sources), check.code


def test_every_row_of_the_retired_page_has_a_check() -> None:
    page = (Path(__file__).parent.parent / "docs" / "retired.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| AP")]
    assert [row.split("|")[1].strip() for row in rows] == [c.code for c in all_checks() if c.code > "AP100"]


def test_the_page_is_what_the_script_writes() -> None:
    scripts = Path(__file__).parent.parent / "scripts"
    spec = importlib.util.spec_from_file_location("doctor_docs", scripts / "doctor_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (scripts.parent / "docs" / "doctor.md").read_text() == module.page(), "run python scripts/doctor_docs.py"


@pytest.mark.parametrize("family", FP16_OVERFLOW)
def test_families_that_the_recommender_keeps_from_fp16_are_known_here(family: str) -> None:
    assert fp16_hazard(f"{family.lower()}forcausallm {family}Model")
