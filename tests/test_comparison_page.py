"""The page of a comparison: whole in one file, true to the record, deaf to hostile names; and its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import samples
from click.testing import CliRunner, Result
from test_comparison import OWN, run_folder
from test_report_page import HOSTILE, UNITS, Page, assert_drawable

from autoprec.cli.main import main
from autoprec.files import from_json
from autoprec.records import Figure, Origin, PlanComparison, TargetOutcome, TrainingVerdict
from autoprec.report.comparedhead import answer_of, fastest_kept
from autoprec.report.comparedpage import comparison_page


def hostile_comparison() -> PlanComparison:
    """A comparison in which everything that people or libraries name is an attack on the page."""
    found = samples.comparison((HOSTILE, HOSTILE + "2"), metric=HOSTILE)
    rows = [
        dataclasses.replace(row, source=HOSTILE, device=HOSTILE, reasons=(HOSTILE,))
        for row in (found.reference, *found.plans)
    ]
    return dataclasses.replace(
        found, model_id=HOSTILE, device=HOSTILE, reference=rows[0], plans=tuple(rows[1:]), notes=(HOSTILE,),
        command=HOSTILE, versions={HOSTILE: HOSTILE},
    )  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, list(arguments))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(comparison_page(samples.comparison()))


# one file


def test_the_page_is_whole_small_enough_and_fetches_nothing(page: Page) -> None:
    text = comparison_page(samples.comparison())
    assert len(text.encode()) <= 6_000_000 and text.count("plotly.js v") == 1
    assert not [a for _, a in page.elements if "src" in a or "href" in a or "data" in a]
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'")
    assert len(page.ids()) == len(set(page.ids()))


def test_a_hostile_name_makes_no_element_and_comes_through_as_text() -> None:
    page = Page(comparison_page(hostile_comparison()))
    assert sorted({tag for tag, _ in page.elements} & {"img", "script", "a", "link", "iframe"}) == ["script"]
    assert len(page.scripts) == 3 and page.text.count(HOSTILE) >= 8
    assert not [a for _, a in page.elements for name in a if name.startswith("on")]
    texts = json.dumps(page.data["charts"])
    assert "<img" not in texts and "</script" not in texts and "&lt;img src=x" in texts


def test_charts_are_what_plotly_knows_have_points_and_name_their_units(page: Page) -> None:
    charts = {chart["name"]: chart for chart in page.data["charts"]}
    assert set(charts) == {"plans", "seeds", "training0", "gap0"} <= set(page.ids())
    assert_drawable(charts, named={"seeds"}, units=(*UNITS, "%"))


# what it says


def test_points_intervals_and_origins_are_those_of_the_record(page: Page) -> None:
    found = samples.comparison()
    chart = next(c for c in page.data["charts"] if c["name"] == "plans")
    points = {trace["name"]: trace for trace in chart["traces"] if "error_x" in trace}
    assert list(points) == ["fp32", "bf16", "fp16"]
    for row in found.plans:
        assert row.drop and row.step_ms and row.step_ms.ci95
        trace = points[row.name]
        assert (trace["x"], trace["y"]) == ([row.step_ms.value], [row.drop.value])
        assert trace["error_x"]["array"] == [row.step_ms.ci95[1] - row.step_ms.value]
        assert f"({row.drop.origin})" in trace["text"][0]
    assert 0 < points["fp32"]["y"][0] < points["bf16"]["y"][0], "a drop of nothing has a place on a logarithmic axis"
    assert chart["layout"]["xaxis"]["title"]["text"] == "step time, ms (measured)"
    assert chart["layout"]["yaxis"]["title"]["text"] == "drop, % of FP32's loss (measured, emulated)"


def test_every_run_of_every_seed_has_its_dot(page: Page) -> None:
    chart = next(c for c in page.data["charts"] if c["name"] == "seeds")
    dots = [trace for trace in chart["traces"] if trace.get("showlegend") is False]
    assert [trace["x"] for trace in dots] == [[2.5, 2.51, 2.52]] * 3
    assert chart["layout"]["xaxis"]["title"]["text"] == "held-out loss (measured)"


def test_the_page_says_verdict_figures_device_versions_and_command(page: Page) -> None:
    said = " ".join(page.text.split())
    for wanted in (
        "Use bf16", "bf16 is the fastest of those whose drop is under 0.5 %", "12.00 % ±0.24 (predicted)",
        "on sample-cpu", "torch 2.13.0", "autoprec compare bf16 fp16 org/tiny-llama", "not-worse", "drop under 0.5 %",
        "123 MB (predicted)", "Measured here, where a figure names no other origin",
        "drop measured, emulated: against the FP32 run",
    ):  # fmt: skip
        assert wanted in said, wanted


# the verdict


def test_the_verdict_names_the_fastest_that_keeps_the_quality_and_who_is_as_fast() -> None:
    found = samples.comparison(("bf16", "fp16", "fp8"))
    best = fastest_kept(found)
    assert best is not None and best.name == "bf16" and "Within noise" not in answer_of(found).text
    wide = Figure(value=1.4, ci95=(1.2, 1.6), unit="x", origin=Origin.PREDICTED)
    bf16, fp16, fp8 = found.plans
    near = dataclasses.replace(found, plans=(bf16, dataclasses.replace(fp16, speedup=wide), fp8))
    assert answer_of(near).text.endswith("Within noise fp16 is as fast.")
    missed = dataclasses.replace(bf16.targets[0], outcome=TargetOutcome.OPEN)
    open_drop = dataclasses.replace(found, plans=(dataclasses.replace(bf16, targets=(missed,)), fp16))
    assert (kept := fastest_kept(open_drop)) is not None and kept.name == "fp16"


def test_a_plan_that_is_not_faster_or_trains_worse_is_not_named() -> None:
    found = samples.comparison(("bf16",))
    (bf16,) = found.plans
    level = Figure(value=1.1, ci95=(0.9, 1.3), unit="x", origin=Origin.MEASURED)
    assert bf16.trained is not None
    worse = dataclasses.replace(bf16.trained, verdict=TrainingVerdict.WORSE)
    for row in (dataclasses.replace(bf16, speedup=level), dataclasses.replace(bf16, trained=worse)):
        head = answer_of(dataclasses.replace(found, plans=(row,)))
        assert head.badge == "Stay with FP32" and head.text.startswith("No plan compared is faster than FP32")


# the command


def test_compare_html_writes_a_page_beside_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    done = run("compare", "bf16", "fp16", "own.py:make", "--pairs", "6", "--html", "page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "page  page.html" and "Verdict" in done.stdout
    said = " ".join(Page(Path("page.html").read_text()).text.split())
    assert "autoprec compare bf16 fp16 own.py:make --pairs 6 --html page.html" in said and "torch 2." in said


def test_compare_html_of_recorded_runs_with_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path("one")), run_folder(Path("two"), chosen=0)
    done = run("compare", "one", "two", "--recorded", "--html", "page.html", "--json")
    assert done.exit_code == 0, done.output
    found = from_json(PlanComparison, json.loads(done.stdout), what="comparison")
    assert found.command == "autoprec compare one two --recorded --html page.html --json"
    assert "not measured again" in Page(Path("page.html").read_text()).text


@pytest.mark.parametrize("name", ["demo", "missing/page.html", "folder.html"])
def test_a_page_that_cannot_be_is_told_before_anything_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    done = run("compare", "bf16", "fp16", "demo", "--html", name)
    assert done.exit_code == 2 and done.stdout == "" and name.split("/")[0] in done.stderr
    assert "Loading" not in done.stderr
