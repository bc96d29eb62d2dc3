"""The report in a real browser: it draws without a fault, fits wide and narrow windows, and answers to clicks.

Needs the extra `nightly` and a Chromium: the system's, or `playwright install chromium`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
from searching import sample_device, short, workload
from test_comparison_page import hostile_comparison
from test_report_page import hostile_run

from autoprec import search
from autoprec.measurement import evaluate
from autoprec.report.comparedpage import comparison_page
from autoprec.report.html import run_page
from autoprec.study import knowledge, measuring
from autoprec.study.reading import read_run

pytestmark = pytest.mark.nightly

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'autoprec[nightly]'")

NAMES = ("here", "away", "unfinished", "hostile", "compared", "compared-hostile")
#: seconds from opening to all charts drawn; the figure aimed at is 3, and nights are busy
OPENS = 6.0


#: where an element of a chart is, None where it has none
BOX = "(c, what) => c.querySelector(what)?.getBoundingClientRect().toJSON() ?? null"
#: whether texts that are not slanted lie over each other
OVERLAPS = """(c, what) => {
  const flat = [...c.querySelectorAll(what)].filter((t) => !/rotate\\(-/.test(t.getAttribute('transform') || ''));
  const boxes = flat.map((t) => t.getBoundingClientRect()).sort((a, b) => a.left - b.left);
  return boxes.some((b, i) => i && b.left < boxes[i - 1].right - 1 && b.top < boxes[i - 1].bottom - 1);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    system = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        yield (opened := started.chromium.launch(executable_path=system, args=["--no-sandbox"]))
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a search here, of one for a card that is not here, of one that has not ended, and of hostile names.

    Comparisons too, one of them of hostile names.
    """
    room = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprec.study.run.probe_device", sample_device)
        patch.setattr(knowledge, "_BEGIN_SECONDS", 9.0)  # a busy machine must not leave the probe out
        patch.setattr(measuring, "evaluate", lambda request: evaluate(short(request)))
        search(workload("train"), budget=300, trials=4, out=room / "here")
        search(workload(), budget=300, trials=4, device="h100-sxm", out=room / "away")
    pages = {name: (room / name / "report.html").read_text() for name in ("here", "away")}
    (room / "here" / "result.json").unlink()
    pages |= {"unfinished": run_page(read_run(room / "here")), "hostile": run_page(hostile_run())}
    pages["compared"] = comparison_page(samples.comparison(("bf16", "fp16", "fp8", "cast-bf16")))
    pages["compared-hostile"] = comparison_page(hostile_comparison())
    for name, text in pages.items():
        (room / f"{name}.html").write_text(text)
    return {name: room / f"{name}.html" for name in pages}


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """A page opened offline; a fault that the browser tells of fails the test."""
    name, width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, faults = context.new_page(), list[str]()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: faults.append(f"a script of a name ran: {dialog.message}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    begun = time.monotonic()
    page.goto(pages[name].as_uri())
    page.wait_for_selector("body[data-ready]")
    assert time.monotonic() - begun <= OPENS
    yield page
    assert not faults
    context.close()


@pytest.mark.parametrize(
    "opened",
    [(n, w, s) for n in NAMES for w in (1440, 390) for s in ("light", "dark")],
    ids=str,
    indirect=True,
)
def test_every_chart_is_drawn_and_nothing_overlaps(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    charts = opened.query_selector_all(".chart")
    assert len(charts) >= 4
    for chart in charts:
        name = chart.get_attribute("id")
        drawn = chart.evaluate("c => c.querySelectorAll('.points path, .lines path').length")
        assert drawn > 0, f"{name} is empty"
        assert chart.evaluate("c => !!c.querySelector('.xtitle')?.textContent"), f"{name} has no title on its axis"
        legend, plot = (chart.evaluate(BOX, part) for part in (".legend", ".nsewdrag"))
        if legend and plot:
            assert legend["bottom"] <= plot["top"] + 1, f"the legend of {name} lies over its points"
        assert not chart.evaluate(OVERLAPS, ".xtick text"), f"labels of {name} lie over each other"
    boxes = opened.evaluate("[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().toJSON())")
    assert all(box["width"] > 200 and box["height"] > 30 for box in boxes)


@pytest.mark.parametrize("opened", [("here", 1440, "light"), ("here", 390, "dark")], ids=str, indirect=True)
def test_clicks_are_answered(opened: Any) -> None:
    opened.click("[data-show=drop]")
    assert opened.get_attribute("#grid .units", "data-mode") == "drop"
    assert opened.is_visible("[data-legend=drop]") and not opened.is_visible("[data-legend=format]")
    cell = opened.query_selector_all("#grid .cell")[1]
    cell.click()
    assert "blocks.0.attention" in opened.inner_text("#detail") and "drop alone in bf16" in opened.inner_text("#detail")

    opened.click("[data-show=format]")
    opened.select_option("#plan", label="uniform bf16")
    assert cell.inner_text().split() == ["attn", "bf16"]
    opened.select_option("#plan", label="uniform fp32")
    assert cell.inner_text().split() == ["attn", "fp32"] and "fp32" in cell.get_attribute("class")


@pytest.mark.parametrize("opened", [("here", 1440, "light")], ids=str, indirect=True)
def test_a_point_of_the_front_shows_its_plan(opened: Any) -> None:
    opened.select_option("#plan", label="uniform fp32")
    index = opened.evaluate("document.getElementById('front').data.findIndex(trace => trace.name === 'uniform bf16')")
    box = opened.evaluate(
        "i => document.querySelectorAll('#front .scatterlayer .trace')[i].querySelector('.point')"
        ".getBoundingClientRect().toJSON()",
        index,
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.mouse.move(x, y)
    opened.wait_for_selector("#front .hovertext")
    assert "nats" in opened.text_content("#front .hoverlayer")
    opened.mouse.click(x, y)
    assert opened.evaluate("document.getElementById('plan').selectedOptions[0].text") == "uniform bf16"


@pytest.mark.parametrize("opened", [("here", 1440, "light")], ids=str, indirect=True)
def test_charts_follow_the_theme(opened: Any) -> None:
    colour = "document.querySelector('#front .xtitle').style.fill"
    before = opened.evaluate(colour)
    opened.emulate_media(color_scheme="dark")
    for _ in range(100):  # the page's policy lets no function be evaluated in it, so it is asked from here
        if opened.evaluate(colour) != before:
            break
        opened.wait_for_timeout(100)
    assert opened.evaluate(colour) != before
