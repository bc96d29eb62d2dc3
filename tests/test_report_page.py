"""The report of a run: whole in one file, true to the folder, deaf to hostile names, and no danger to a search."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
import samples
from click.testing import CliRunner
from searching import sample_device, short, workload

from autoprec import Plan, recommend, search
from autoprec.cli.main import main
from autoprec.files import as_json, read_json, write_json
from autoprec.formats import Format
from autoprec.measurement import evaluate
from autoprec.records import (
    MemoryBreakdown,
    MemoryParts,
    Mode,
    Moment,
    Origin,
    Progress,
    SearchResult,
    TrainedArm,
    TrainingConfirmation,
    TrainingCurve,
    TrainingVerdict,
)
from autoprec.report.html import run_page
from autoprec.report.run import Run, RunRow
from autoprec.study import knowledge, live, measuring
from autoprec.study.live import LiveReport
from autoprec.study.reading import read_run

HOSTILE = '</script><img src=x onerror="alert(1)">.0.<b>&amp;@ink'
#: what an axis of figures may be counted in
UNITS = ("ms", "nats", "MB", "GB", "relative", "step", "measurements", "unit", "loss")


class Page(HTMLParser):
    """The parts of a page that a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]  # type: ignore[misc]


def trained() -> TrainingConfirmation:
    curves = [
        TrainingCurve(
            name=n, seed=s, losses=tuple(3.0 - 0.1 * i + 0.01 * s for i in range(4)), final_loss=2.5, skipped_steps=0
        )
        for n in ("fp32", HOSTILE)
        for s in range(3)
    ]
    arm = TrainedArm(name=HOSTILE, gap=0.01, gap_ci95=(0.0, 0.02), verdict=TrainingVerdict.NOT_WORSE, reason="so said")
    return TrainingConfirmation(
        steps=4, seeds=3, learning_rate=1e-4, reference_loss=2.5, seed_deviation=0.01, margin=0.01, arms=(arm,),
        curves=tuple(curves),
    )  # fmt: skip


def memory(model_id: str) -> MemoryBreakdown:
    parts = MemoryParts(weights_bytes=500_000_000, activations_bytes=700_000_000)
    return MemoryBreakdown(
        model_id=model_id, mode=Mode.TRAIN, policy="fp32", batch_size=8, seq_len=128, devices=1, accumulation=1,
        checkpointing="none", parameters=1, trained_parameters=1, parts=parts, moment=Moment.BACKWARD,
        moments_bytes={Moment.BACKWARD: parts.total_bytes}, units=(), simple_bytes=0, leaves_out=(),
    )  # fmt: skip


def hostile_run() -> Run:
    """A run in which everything that people or libraries name is an attack on the page."""

    def named(m: Any) -> Any:
        return dataclasses.replace(m, name=HOSTILE + m.name, assignment={HOSTILE: Format.BF16}, reason=HOSTILE)

    result = samples.search_result()
    result = dataclasses.replace(
        result,
        model_id=HOSTILE,
        device=HOSTILE,
        baselines=tuple(named(m) for m in result.baselines),
        front=tuple(named(m) for m in result.front),
        verdict=dataclasses.replace(result.verdict, text=HOSTILE, best_uniform=HOSTILE),
        notes=(HOSTILE,),
        trained=(trained(),),
        memory={HOSTILE: memory(HOSTILE)},
        unit_ms={Format.FP32: {HOSTILE: 1.0}, Format.BF16: {HOSTILE: 0.5}},
    )
    profile = samples.model_profile()
    unit = dataclasses.replace(profile.units[1], name=HOSTILE, modules=(HOSTILE,))
    return Run(
        name=HOSTILE,
        rows=tuple(
            RunRow(n if m in result.front[1:] else None, m)
            for n, m in enumerate((*result.baselines, *result.front[1:]))
        ),
        front=result.front,
        chosen=1,
        reference=result.reference,
        result=result,
        device=dataclasses.replace(samples.device_profile(), name=HOSTILE),
        model=dataclasses.replace(profile, model_id=HOSTILE, units=(unit,)),
        faults=(HOSTILE,),
    )


@pytest.fixture(scope="module")
def hostile() -> Page:
    return Page(run_page(hostile_run()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a real search, which leaves its report there."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprec.study.run.probe_device", sample_device)
        patch.setattr(knowledge, "_BEGIN_SECONDS", 9.0)  # a busy machine must not leave the probe out
        patch.setattr(measuring, "evaluate", lambda request: evaluate(short(request)))
        search(workload(), budget=300, trials=2, out=path, command="autoprec search tiny --trials 2")
    yield path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


# names


def test_a_hostile_name_makes_no_element_and_comes_through_as_text(hostile: Page) -> None:
    assert sorted({tag for tag, _ in hostile.elements} & {"img", "script", "a", "link", "iframe"}) == ["script"]
    assert len(hostile.scripts) == 3, "data, plotly and the page's own"
    assert not [a for _, a in hostile.elements for name in a if name.startswith("on")]
    assert hostile.text.count(HOSTILE) >= 8
    assert hostile.data["units"][0]["name"] == HOSTILE
    assert any(plan["name"].startswith(HOSTILE) for plan in hostile.data["plans"])


def test_a_hostile_name_is_text_for_plotly_too(hostile: Page) -> None:
    # plotly reads tags in every text, and undoes these three entities
    texts = json.dumps([c["traces"] for c in hostile.data["charts"]])
    assert "<img" not in texts and "</script" not in texts
    assert "&lt;img src=x" in texts and "&amp;amp;@ink" in texts


# one file


def test_the_page_is_whole_small_enough_and_fetches_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert len(text.encode()) <= 6_000_000
    assert text.count("plotly.js v") == 1
    page = Page(text)
    assert not [a for _, a in page.elements if "src" in a or "href" in a or "data" in a]
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'")
    assert len(page.ids()) == len(set(page.ids()))


@pytest.mark.parametrize("source", ["real", "made"])
def test_charts_are_what_plotly_knows_have_points_and_name_their_units(
    source: str, folder: Path, hostile: Page
) -> None:
    page = hostile if source == "made" else Page((folder / "report.html").read_text())
    charts = {chart["name"]: chart for chart in page.data["charts"]}
    wanted = {"front", "unitdrop", "unittime", "convergence", "dropfit", "timefit", "memory"}
    made = {"front", "unittime", "convergence", "memory", "training0", "gap0"}
    assert set(charts) == (made if source == "made" else wanted)
    assert set(charts) <= set(page.ids())
    assert_drawable(charts, named={"memory"}, units=UNITS)


def assert_drawable(charts: Mapping[str, Any], named: Collection[str], units: Sequence[str]) -> None:
    """Check that plotly takes charts, that all have points, and units on axes; the y axes of `named` name plans."""
    for name, chart in charts.items():
        figure = plotly.graph_objects.Figure(data=colourless(chart["traces"]), layout=colourless(chart["layout"]))
        assert len(figure.data) == len(chart["traces"]) > 0
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in chart["traces"]), name
        titles = [chart["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
        titles = titles[:1] if name in named else titles
        assert all(any(unit in title for unit in units) for title in titles), titles


def colourless(value: Any) -> Any:
    """Return plotly data with the theme's colours replaced by one that plotly knows."""
    if isinstance(value, dict):
        return {k: "red" if k.endswith("color") and str(v).startswith("@") else colourless(v) for k, v in value.items()}
    return [colourless(v) for v in value] if isinstance(value, list) else value


# what it says


def test_the_page_says_what_the_result_says(folder: Path) -> None:
    page, run = Page((folder / "report.html").read_text()), read_run(folder)
    assert run.result is not None and not run.faults
    said = " ".join(page.text.split())
    for wanted in (
        run.result.verdict.text, "autoprec search tiny --trials 2", "search 0", "0.25%", "torch 2.", "autoprec 0.",
        "2 of 2 x 12 tokens", "measured: against the FP32 run on the same batches",
    ):  # fmt: skip
        assert wanted in said, wanted
    front = next(c for c in page.data["charts"] if c["name"] == "front")
    points = {(x, y) for t in front["traces"] if "customdata" in t for x, y in zip(t["x"], t["y"], strict=True)}
    measured = {m.step_ms: m.drop for m in run.measured if m.drop is not None and m.step_ms is not None}
    assert {x for x, _ in points} == set(measured)
    assert all(measured[x] == y for x, y in points if measured[x])


def test_figures_of_the_page_have_their_origins(hostile: Page) -> None:
    said = " ".join(hostile.text.split())
    assert "training measured: beside FP32" in said and "training emulated" not in said
    away = dataclasses.replace(samples.device_profile(), origin=Origin.DATASHEET)
    elsewhere = Page(run_page(dataclasses.replace(hostile_run(), device=away)))
    titles = {c["name"]: c["layout"]["yaxis"]["title"]["text"] for c in elsewhere.data["charts"]}
    assert titles["training0"] == "training loss (emulated)"
    assert "training emulated: beside FP32" in " ".join(elsewhere.text.split())
    assert "(emulated)" in said and "memory by part predicted: by the memory model" in said


def test_rows_are_those_of_the_table_and_on_its_clock(folder: Path) -> None:
    run, text = read_run(folder), (folder / "trials.csv").read_text()
    for row in run.rows:
        if row.measurement.step_ms is not None:
            assert f",{row.measurement.drop},{row.measurement.step_ms}," in text


def test_a_result_holds_what_was_asked_and_what_holds_the_memory(folder: Path) -> None:
    run = read_run(folder)
    assert run.result is not None and run.setting is not None
    assert run.setting.max_drop == "0.25%" and run.setting.budget_seconds == 300 and run.setting.batches == 2
    assert "uniform fp32" in run.result.memory
    assert run.result.memory["uniform fp32"].parts.weights_bytes > 0


# folders in any state


def test_a_run_that_has_not_ended_is_shown_as_such(copied: Path) -> None:
    (copied / "result.json").unlink()
    run = read_run(copied)
    page = Page(run_page(run))
    assert run.result is None and run.limit is not None and not run.faults
    assert "This search has not ended" in page.text
    assert {c["name"] for c in page.data["charts"]} >= {"front", "unitdrop", "convergence"}


def test_a_result_of_before_a_search_was_resumed_does_not_stand_for_it(copied: Path) -> None:
    result = read_json(copied / "result.json", what="result")
    write_json(copied / "result.json", result | {"trials": result["trials"] - 1})
    assert read_run(copied).result is None


def test_without_its_journal_a_run_is_read_from_its_table(copied: Path) -> None:
    before = read_run(copied)
    (copied / "study.journal").unlink()
    after = read_run(copied)
    assert [(r.trial, r.measurement.drop) for r in after.rows] == [(r.trial, r.measurement.drop) for r in before.rows]
    assert [m.name for m in after.baselines] == [m.name for m in before.baselines]
    run_page(after)


@pytest.mark.parametrize("name", ["sensitivity.json", "speed.json", "units.json", "device.json", "study.journal"])
def test_a_damaged_file_is_left_out_and_named(copied: Path, name: str) -> None:
    content = (copied / name).read_text()
    (copied / name).write_text("{" if name != "study.journal" else "{}\n" + content)
    run = read_run(copied)
    assert [fault.split()[0] for fault in run.faults] == [name]
    assert f"{name} is left out" in Page(run_page(run)).text


def test_a_result_of_an_older_release_is_shown(copied: Path) -> None:
    result = read_json(copied / "result.json", what="result")
    for new in ("setting", "memory", "unit_ms", "explained", "largest_batches", "trained", "confirm"):
        result.pop(new)
    write_json(copied / "result.json", result)
    assert read_run(copied).result is not None
    run_page(read_run(copied))


# the command


def test_show_html_writes_the_report_of_a_run(copied: Path) -> None:
    (copied / "report.html").unlink()
    done = CliRunner().invoke(main, ["show", str(copied), "--html"])
    assert done.exit_code == 0, done.output
    assert str(copied / "report.html") in done.output
    assert "</html>" in (copied / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["show", "plan.json", "--html"], 2, "run folder"),
        (["show", "empty", "--html"], 1, "no measurements"),
        (["show", "empty", "--html", "--json"], 2, "one of them"),
    ],
)
def test_show_html_says_what_it_cannot_report(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    samples.plan().save("plan.json")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code
    assert says in " ".join(done.output.split())


# while a search runs


def test_a_report_that_fails_is_said_once_and_stops_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    news = list[Progress]()
    monkeypatch.setattr(live, "write_atomic", fail)
    report = LiveReport(copied, news.append)
    m = samples.search_result().front[0]
    for stage in ("baselines", "search", "done"):
        report(Progress(stage=stage, message="", elapsed_seconds=1.0, measurement=None if stage == "done" else m))
    assert [p.message for p in news if "report.html is not written: no room" in p.message] == [
        "report.html is not written: no room"
    ]


def test_a_page_is_made_before_the_first_measurement_so_that_all_peaks_hold_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, written = list[object](), list[object]()

    def make(run: object) -> str:
        made.append(run)
        return ""

    monkeypatch.setattr(live, "run_page", make)
    monkeypatch.setattr(live, "write_atomic", lambda path, text: written.append(path))
    report = LiveReport(copied, lambda _: None)
    for stage, m, want in (("probe", None, (0, 0)), ("baselines", None, (1, 0)), ("baselines", None, (1, 0))):
        report(Progress(stage=stage, message="", elapsed_seconds=1.0, measurement=m))
        assert (len(made), len(written)) == want
    report(Progress(stage="baselines", message="", elapsed_seconds=1.0, measurement=samples.search_result().front[0]))
    assert (len(made), len(written)) == (2, 1)


def test_a_report_takes_a_hundredth_of_the_time_at_most(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], list[float]()
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def make(*_: object) -> str:
        clock[0] += 0.5
        return ""

    monkeypatch.setattr(live, "run_page", make)
    monkeypatch.setattr(live, "write_atomic", lambda *_: written.append(clock[0]))
    monkeypatch.setattr(live, "read_run", lambda path: None)
    report = LiveReport(copied, lambda _: None)
    m = samples.search_result().front[0]
    while clock[0] < 200:
        report(Progress(stage="search", message="", elapsed_seconds=clock[0], measurement=m))
        report(Progress(stage="search", message="news without a figure", elapsed_seconds=clock[0]))
        clock[0] += 1
    assert len(written) == 4
    assert all(later - sooner >= 50 for sooner, later in zip(written, written[1:], strict=False))


# notebooks


def test_records_show_themselves_in_a_notebook(folder: Path) -> None:
    result = read_run(folder).result
    assert isinstance(result, SearchResult)
    advice = recommend("demo", device="h100-sxm", mode="infer")
    for record, wanted in (
        (result, result.verdict.text),
        (samples.plan(), "blocks.0"),
        (advice, advice.reasons[0]),
    ):
        text = record._repr_html_()
        assert text is not None
        page = Page(text)
        assert wanted in " ".join(page.text.split())
        assert not page.scripts and len(text) < 200_000


def test_a_hostile_plan_is_text_in_a_notebook() -> None:
    plan = dataclasses.replace(samples.plan(), model=dataclasses.replace(samples.plan().model, id=HOSTILE))
    page = Page(plan._repr_html_() or "")
    assert HOSTILE in page.text and "img" not in {tag for tag, _ in page.elements}
    assert Plan.from_json(as_json(plan) | {"model": plan.to_json()["model"]}) == plan
