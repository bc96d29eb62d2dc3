"""Everything printed: no figure without its unit, no table without its origin, and one way to write numbers."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from rich.console import Console
from test_comparison import named, own
from test_sensitivity import bare_workload

from autoprec import Plan, probe_sensitivity, probe_speed, recommend
from autoprec.comparison import compare_plans
from autoprec.probe.units import probe_units
from autoprec.records import (
    Confirmed,
    Estimate,
    Explained,
    LargestBatch,
    Origin,
    PlanComparison,
    SearchResult,
    SensitivityProfile,
)
from autoprec.report import audits, compared, plans, profiles, recommended, sensitivity, speed, terminal, trained
from autoprec.verification import verify

#: what a figure may be counted in, beside it, on top of its column, or at the head of its row
UNITS = re.compile(
    r"\b(nats|relative squared error|ms|MB|GB|GB/s|TFLOP/s|tokens/s|examples|units|steps|seeds|share|loss)\b"
    r"|\b(cosine|times|capability)\b|%|\bx\b|\dx\b|x/|/ fp32|\bTFLOP/s"
)
ORIGINS = re.compile(r"\b(measured|predicted|emulated|datasheet|recorded)\b")
#: a figure that was measured or worked out: counts and sizes have no fraction
FIGURE = re.compile(r"(?<![\w.])-?\d+\.\d+(e-?\d+)?(?![\w.]*\.\d)")
#: of advice: papers have numbers of their own
SOURCE = re.compile(r"\[R\d+: .*\]$")
#: a mantissa with an exponent as C writes it
OTHER_WAY = re.compile(r"\de[+-]?0\d|\de\+")


@dataclass
class Block:
    """What stands under one heading."""

    heading: str
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        cells = [cell for titles, rows in self.tables for row in (titles, *rows) for cell in row]
        return " ".join([self.heading, *self.lines, *cells])


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Console], None]], list[Block]]:
    """Return what a page prints as blocks, before it is laid out."""
    found: list[Block] = []

    def heading(console: Console, title: str, note: str = "") -> None:
        found.append(Block(f"{title} {note}"))

    def line(console: Console, content: Any) -> None:
        found[-1].lines.append(str(content))

    def table(
        console: Console, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], marked: int | None = None
    ) -> None:
        found[-1].tables.append(([title for title, _ in columns], [list(row) for row in rows]))

    for module in (audits, compared, plans, profiles, recommended, sensitivity, speed, terminal, trained):
        for name, stand_in in (("print_heading", heading), ("print_line", line), ("print_table", table)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)

    def read(page: Callable[[Console], None]) -> list[Block]:
        found.clear()
        page(Console(file=io.StringIO(), width=100))
        return list(found)

    return read


def bare(block: Block) -> Iterator[str]:
    """Yield figures of a block's tables that have a unit neither beside them, nor on top, nor before the row."""
    for titles, rows in block.tables:
        for row in rows:
            for title, said in zip(titles, row, strict=True):
                cell = SOURCE.sub("", said)
                if FIGURE.search(cell) and not UNITS.search(f"{title} | {row[0]} | {cell}"):
                    yield f"{title}: {cell} in {row}"


def full_result() -> SearchResult:
    """A search with all that can stand on its page."""
    result = samples.search_result()
    estimate = Estimate(1.23e-5, 1e-5, 1.5e-5, Origin.PREDICTED)
    explained = Explained(
        unit="lm_head", format=result.front[1].assignment["lm_head"], probed=estimate, drop=estimate, drop_share=0.5,
        time_ms=Estimate(-0.5, -0.6, -0.4, Origin.PREDICTED), time_share=0.5, wider=None, narrower=None,
        reason="fp32 would cost 0.500 ms to save 1.23e-5 nats of drop",
    )  # fmt: skip
    confirmed = Confirmed(
        name="trial 14", answer="within", drop=4.41e-5, low=1e-5, high=9.87e-5, batches=5, level=0.035, reason=None
    )
    largest = LargestBatch(
        name="uniform bf16", batch_size=64, accumulation=1, total_bytes=24_000_000_000,
        tokens_per_s=Estimate(12345.6, 12000.0, 13000.0, Origin.PREDICTED),
    )  # fmt: skip
    return dataclasses.replace(
        result, explained=(explained,), confirmed=(confirmed,), largest_batches=(largest,),
        predicted_bound={"drop": 0.01, "step_ms": 11.5, "faster_percent": 1.2},
    )  # fmt: skip


def device_elsewhere() -> Any:
    return dataclasses.replace(
        samples.device_profile(), origin=Origin.DATASHEET, gemm_rates=(), copy_gb_per_s=None,
        peak_tflops={"bf16": 989.4, "fp32": 66.9}, bandwidth_gb_per_s=3350.5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def real() -> dict[str, Callable[[Console], None]]:
    """Pages of what was really probed, compared, verified and recommended."""
    torch.set_num_threads(1)
    workload = bare_workload(mode="train")
    units = probe_units(workload.model).units
    probed = probe_sensitivity(workload, seconds=9.0, cache=False)
    timed = probe_speed(workload, ["bf16"], seconds=1.0, cache=False)
    classifier = own()
    found = compare_plans(classifier, named(classifier, "bf16", "fp16"), pairs=6, train_steps=2, seeds=2)
    plan = Plan.uniform(classifier.model, "bf16", mode="train")
    verified = verify(classifier, plan, train_steps=2, seeds=2)
    advice = recommend("demo", device="h100-sxm")

    def sensitive(console: Console, profile: SensitivityProfile = probed) -> None:
        sensitivity.print_sensitivity(console, profile, units)

    def side_by_side(console: Console, comparison: PlanComparison = found) -> None:
        compared.print_comparison(console, comparison)

    return {
        "sensitivity": sensitive,
        "speed": lambda console: speed.print_speed(console, timed),
        "comparison": side_by_side,
        "verification": lambda console: audits.print_verification(console, verified),
        "recommendation": lambda console: recommended.print_recommended(console, advice.to_json(), advice.plan),
        "all of it": lambda console: recommended.print_recommended(
            console, advice.to_json(), advice.plan, explain=True
        ),
    }


MADE: dict[str, Callable[[Console], None]] = {
    "device": lambda console: profiles.print_device(console, samples.device_profile()),
    "device elsewhere": lambda console: profiles.print_device(console, device_elsewhere()),
    "plan": lambda console: plans.print_plan(console, samples.plan()),
    "result": lambda console: terminal.print_result(console, full_result()),
    "explained": lambda console: terminal.print_explained(console, full_result()),
    "comparison made": lambda console: compared.print_comparison(console, samples.comparison()),
}
REAL = ("sensitivity", "speed", "comparison", "verification", "recommendation", "all of it")


@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_every_figure_of_a_table_has_a_unit_and_every_table_an_origin(
    name: str, blocks: Callable[[Callable[[Console], None]], list[Block]], real: dict[str, Callable[[Console], None]]
) -> None:
    printed = blocks(MADE[name] if name in MADE else real[name])
    assert any(FIGURE.search(cell) for b in printed for _, rows in b.tables for row in rows for cell in row) or (
        name in ("plan", "recommendation")  # whose figures stand on lines
    )
    for block in printed:
        assert not list(bare(block))
        if any(FIGURE.search(cell) for _, rows in block.tables for row in rows for cell in row[1:]):
            assert ORIGINS.search(block.text), f"nothing says where the figures under '{block.heading}' are from"


@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_numbers_are_written_one_way(name: str, real: dict[str, Callable[[Console], None]]) -> None:
    file = io.StringIO()
    (MADE[name] if name in MADE else real[name])(Console(file=file, width=200))
    said = file.getvalue()
    assert not OTHER_WAY.search(said), OTHER_WAY.findall(said)


def test_the_help_gives_defaults_one_way_too() -> None:
    golden = (Path(__file__).parent / "golden" / "help.txt").read_text()
    assert not OTHER_WAY.search(golden)


def test_a_table_without_units_or_origin_is_found() -> None:
    assert list(bare(Block("Front", [(["plan", "drop"], [["bf16", "0.0123"]])])))
    assert not list(bare(Block("Front", [(["plan", "drop, nats"], [["bf16", "0.0123"]])])))
    assert not ORIGINS.search(Block("Front", [(["plan", "drop, nats"], [["bf16", "0.0123"]])]).text)
    assert OTHER_WAY.search("drop 4.41e-05") and not OTHER_WAY.search("drop 4.41e-5")
