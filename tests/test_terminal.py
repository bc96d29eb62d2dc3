"""What is printed: every figure with its unit and interval, at any width, plain where there is no terminal."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import samples
from rich.console import Console

from autoprec.formats import Format, Fp8Family
from autoprec.plan import Plan
from autoprec.records import Measurement, Origin, Progress, Standing
from autoprec.report.figures import (
    count_text,
    drop_unit,
    format_counts,
    interval,
    layout_text,
    megabytes,
    number,
    plain,
)
from autoprec.report.grouping import runs, short_modules
from autoprec.report.livefront import front_panel
from autoprec.report.progress import News
from autoprec.report.terminal import (
    measurement_line,
    print_device,
    print_paths,
    print_plan,
    print_result,
    print_units,
)

Printer = Callable[[Console], None]

PAGES: dict[str, Printer] = {
    "device": lambda console: print_device(console, samples.device_profile()),
    "units": lambda console: print_units(console, samples.model_profile()),
    "plan": lambda console: print_plan(console, samples.plan()),
    "result": lambda console: print_result(console, samples.search_result()),
}


def printed(page: Printer, width: int = 120, *, terminal: bool = False) -> str:
    file = io.StringIO()
    page(Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None))
    return file.getvalue()


def squeezed(text: str) -> str:
    """Return text without any space, so that figures and words that were wrapped are found again."""
    return "".join(text.split())


def assert_says(text: str, *wanted: str) -> None:
    missing = [w for w in wanted if squeezed(w) not in squeezed(text)]
    assert not missing, f"missing {missing} in\n{text}"


# figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.345, "12.3"),
        (0.00123456, "0.00123"),
        (-0.5, "-0.500"),
        (412.4, "412"),
        (5123.4, "5123"),
        (3.14e-7, "3.14e-7"),
        (-2e-9, "-2.00e-9"),
        (4e9, "4.00e9"),
        (9.999, "10.0"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "ci95", "text"),
    [
        (None, (0.0, 1.0), "-"),
        (1.5, None, "1.50"),
        (0.0, (0.0, 0.0), "0"),
        (1.63, (1.58, 1.68), "1.630 ±0.050"),
        (12.3, (12.1, 12.9), "12.3 [12.1, 12.9]"),
        (0.00012, (0.0001, 0.00014), "0.000120 ±0.000020"),
        (3.2e-7, (2.6e-7, 3.8e-7), "3.20e-7 ±6.0e-8"),
        (-0.001, (-0.003, 0.001), "-0.0010 ±0.0020"),
        (1000.0, (900.0, 1100.0), "1000 ±100"),
        # a half-width far below the value's digits is not allowed to invent more of them
        (1.0, (1 - 1e-9, 1 + 1e-9), "1.0000 ±0.0000"),
    ],
)
def test_intervals(value: float | None, ci95: tuple[float, float] | None, text: str) -> None:
    assert interval(value, ci95) == text


def test_counts_and_bytes() -> None:
    assert count_text(412) == "412"
    assert count_text(134_515_008) == "135 M"
    assert megabytes(None) == "-"
    assert megabytes(123_456_789) == "123"
    counted = {"a": Format.FP32, "b": Format.BF16, "c": Format.BF16, "d": Format.FP8}
    assert format_counts(counted) == "bf16 2 fp32 1 fp8 1"
    assert format_counts({}) == "-"


def test_layouts_of_values_and_gradients() -> None:
    assert layout_text(Format.BF16) == "1-8-7"
    assert layout_text(Format.FP8) == "1-4-3 1-5-2"
    assert layout_text(Format.FP8, Fp8Family.FNUZ) == "1-4-3 1-5-2"


def test_the_unit_of_drops_is_nats_unless_percent_is_the_same_figure() -> None:
    logits = samples.measurement("a", 0.004, 12.0, 1.6)
    values = replace(logits, drop_percent=100 * 0.004)
    assert drop_unit([logits]) == "nats"
    assert drop_unit([values, replace(values, drop=0.0, drop_percent=0.0)]) == "relative squared error"
    assert drop_unit([values, logits]) == "nats"


# names


def test_runs_join_equal_blocks_that_alternate() -> None:
    units = samples.model_profile().units
    found = runs(units, lambda u: u.name, lambda u: u.role)
    assert [run.name for run in found] == ["embed", "blocks.0-2.attention", "blocks.0-2.ffn", "lm_head"]
    assert [unit for run in found for unit in run.items if unit.name.endswith("ffn")] == [
        unit for unit in units if unit.name.endswith("ffn")
    ]


def test_runs_break_where_blocks_differ_or_are_missing() -> None:
    formats = {"h.0.ffn": "bf16", "h.1.ffn": "bf16", "h.2.ffn": "fp32", "h.3.ffn": "bf16", "h.5.ffn": "bf16"}
    found = runs(formats, str, lambda name: formats[name])
    assert [run.name for run in found] == ["h.0-1.ffn", "h.2.ffn", "h.3.ffn", "h.5.ffn"]


def test_modules_are_shortened_under_their_parent() -> None:
    assert short_modules(("lm_head",)) == "lm_head"
    assert short_modules(("",)) == "(root)"
    assert short_modules(("h.0.attn.q", "h.0.attn.k")) == "h.0.attn: q k"
    assert short_modules(("a.x", "b.x")) == "a.x b.x"
    assert short_modules(tuple(f"moe.experts.{i}" for i in range(64)), 2) == "moe.experts: 0 1 and 62 more"


# pages


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_any_width_and_lose_no_letter(name: str, width: int) -> None:
    # a reason that several units share is printed once where it is narrow, so here each has its own
    units = tuple(replace(unit, reason=f"{unit.name} is so") for unit in samples.plan().units)
    pages = PAGES | {"plan": lambda console: print_plan(console, replace(samples.plan(), units=units))}
    narrow, wide = printed(pages[name], width), printed(pages[name], 400)
    assert max(map(len, narrow.splitlines())) <= width
    assert not Counter(squeezed(wide)) - Counter(squeezed(narrow))


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_plain_off_a_terminal_and_coloured_on_one(name: str) -> None:
    assert "\x1b" not in printed(PAGES[name])
    assert "\x1b[1m" in printed(PAGES[name], terminal=True)


def test_device_page() -> None:
    text = printed(PAGES["device"], 160)
    assert_says(text, "Device sample-cpu", "cpu, measured here", "2 threads", "25.3 GB memory")
    assert_says(text, "TFLOP/s at 256", "TFLOP/s at 512", "TFLOP/s at 1024", "x fp32 at 1024")
    assert_says(text, "1-8-23", "1-8-7", "1-5-10", "1-4-3 1-5-2")
    assert_says(text, "0.201 ±0.020", "0.412 ±0.041", "0.452 ±0.045", "4.00x")
    for choice, known in samples.device_profile().formats.items():
        assert_says(text, f"{choice} {known.support} {known.reason}")
    assert_says(text, "tf32 absent", "copy bandwidth: 6.61 ±0.99 GB/s", "instruction sets: avx2 avx512_bf16")
    assert_says(text, "note: measured beside other work", "versions: torch 2.13.0")


def test_a_device_that_is_not_here_says_so() -> None:
    profile = replace(
        samples.device_profile(),
        origin=Origin.DATASHEET,
        gemm_rates=(),
        copy_gb_per_s=None,
        peak_tflops={"bf16": 989.0},
        bandwidth_gb_per_s=3350.0,
    )
    text = printed(lambda console: print_device(console, profile))
    assert_says(text, "not here: datasheet", "peak TFLOP/s (datasheet)", "989")
    assert_says(text, "memory bandwidth: 3350 GB/s (datasheet)")
    assert "TFLOP/s at" not in text


def test_units_page() -> None:
    text = printed(PAGES["units"], 160)
    assert_says(text, "Model org/tiny-llama", "LlamaForCausalLM, 348 K parameters, 8 units")
    assert_says(text, "blocks.0-2.attention attention 3 x 16.4 K fp32 bf16 fp16 fp8")
    assert_says(text, "model.layers.0-2.self_attn: q_proj k_proj v_proj o_proj")
    assert_says(text, "embed embedding 262 K fp32 bf16 fp16 model.embed_tokens")
    assert_says(text, "no choice: model.norm: norm: runs as the ambient", "one storage: model.embed_tokens = lm_head")


def test_plan_page() -> None:
    text = printed(PAGES["plan"], 160)
    assert_says(text, "Plan for org/tiny-llama", "LlamaForCausalLM, train, on sample-cpu")
    assert_says(text, "blocks.0-2.attention attention bf16 uniform bf16, as torch.autocast does")
    assert_says(text, "blocks.0.ffn ffn fp32 set by replace", "blocks.1-2.ffn ffn bf16")
    assert_says(text, "ambient bf16", "stream fp32", "tf32 off", "gradient scaler none")
    assert_says(text, "bf16=True", "bf16_full_eval=False")
    assert_says(text, "drop 0.00123 ±0.00010 nats", "step 12.3 [12.1, 12.9] ms (predicted)", "peak 456 MB")


def test_a_plan_can_be_printed_unit_by_unit() -> None:
    text = printed(lambda console: print_plan(console, samples.plan(), every_unit=True))
    for unit in samples.plan().units:
        assert_says(text, f"{unit.name} {unit.role} {unit.format} {unit.reason}")


def test_a_plan_of_fp16_names_its_scaler() -> None:
    plan = Plan.uniform(samples.model_profile(), "fp16")
    assert_says(printed(lambda console: print_plan(console, plan)), "any device", "gradient scaler starts at 65536")


def test_result_page() -> None:
    text = printed(PAGES["result"], 160)
    assert_says(text, "Search of org/tiny-llama", "limit 0.25%")
    assert_says(text, "reference: reference, 19.90 ±0.40 ms a step (measured), peak 123 MB")
    assert_says(text, "beats one of these in both drop and step (14 trials, 1m58s)")
    assert_says(text, "drop, nats", "step, ms", "peak, MB")
    assert_says(text, "1 uniform bf16 0.00417 ±0.00042 0.104 12.30 ±0.25 1.620x ±0.032 123 bf16 6 fp32 2")
    assert_says(text, ">2 trial 14 0.000862 ±0.000086 (emulated)", "> 2 is the chosen plan")
    assert_says(text, "uniform fp16: stopped: its first step took 3.4 times the reference's")
    assert_says(text, "not tried: fp8 in 3 units: no FP8 matmul unit on this CPU")
    assert_says(text, "use-plan: The plan of trial 14 is within 0.25%", "after 12.5 hours of use")


def test_a_result_that_chose_nothing_marks_nothing() -> None:
    nothing = replace(samples.search_result(), chosen=None)
    text = printed(lambda console: print_result(console, nothing))
    assert "chosen" not in text
    assert ">" not in text


def test_long_reasons_stand_once_below_the_table() -> None:
    reason = "because " * 30
    units = tuple(replace(unit, reason=reason + unit.format) for unit in samples.plan().units)
    text = printed(lambda console: print_plan(console, replace(samples.plan(), units=units)), 80)
    assert_says(text, "blocks.0-2.attention attention bf16 2", "blocks.0.ffn ffn fp32 1", "lm_head lm_head bf16 2")
    assert text.count("because") == 2 * 30


def test_paths_are_never_folded() -> None:
    path = "runs/" + "x" * 200 + "/plan.json"
    text = printed(lambda console: print_paths(console, {"plan": path, "run folder": "runs"}), 40)
    assert f"plan        {path}\n" in text


def test_names_cannot_command_the_terminal_or_the_markup() -> None:
    evil = replace(samples.model_profile(), model_id="a\x1b[2J[bold]b\n\rc")
    text = printed(lambda console: print_units(console, evil))
    assert "\x1b" not in text
    assert "[bold]b" in text
    assert plain("a\x1b\n\u202eb") == "a   b"


# news


def test_a_measurement_in_one_line() -> None:
    line = measurement_line(samples.measurement("trial 3", 0.004, 12.0, 1.6, Origin.EMULATED))
    assert line == (
        "trial 3: drop 0.00400 ±0.00040 (0.100 %) (emulated), 12.00 ±0.24 ms a step, 1.600x ±0.032, peak 123 MB"
    )
    assert measurement_line(Measurement(name="x", assignment={}, reason="stopped")) == "x: stopped"
    assert measurement_line(Measurement(name="x", assignment={})) == "x: no figure"


def test_news_off_a_terminal_are_lines_with_the_time_left() -> None:
    file = io.StringIO()
    with News(Console(file=file, width=40)) as news:
        news(Progress(stage="baselines", message="six baselines to measure", elapsed_seconds=3, eta_seconds=95))
        measured = samples.measurement("uniform bf16", 0.004, 12.0, 1.6)
        news(Progress(stage="baselines", message="", elapsed_seconds=65, eta_seconds=30, trial=1, measurement=measured))
        news(Progress(stage="search", message="searching", elapsed_seconds=70, eta_seconds=20, at_most=True))
    assert file.getvalue().splitlines() == [
        "    3s  baselines: six baselines to measure (about 1m35s left)",
        f" 1m05s  baselines: trial 1, {measurement_line(measured)} (about 30s left)",
        " 1m10s  search: searching (at most 20s left)",
    ]


def test_news_on_a_terminal_keep_measurements_and_clear_the_live_line() -> None:
    file = io.StringIO()
    with News(Console(file=file, width=200, force_terminal=True)) as news:
        news.doing("Loading")
        news(Progress(stage="search", message="a", elapsed_seconds=3))
        measured = samples.measurement("trial 7", 0.004, 12.0, 1.6)
        news(Progress(stage="search", message="b", elapsed_seconds=4, measurement=measured))
    text = file.getvalue()
    assert "trial 7: drop" in text
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # cursor shown again, line above erased


# the front while a search runs


def standing(members: int = 4, chosen: int | None = 1) -> Standing:
    """A search of baselines, one of them stopped, and a front of so many plans."""
    bf16 = samples.measurement("uniform bf16", 0.0051, 12.3, 1.62)
    stopped = Measurement(name="uniform fp16", assignment={}, reason="stopped: its first step took 3.4 times as long")
    front = [
        samples.measurement(f"trial {n} of a long name", 0.004 / (n + 1), 12.0 + n, 1.6 - n / 50)
        for n in range(members)
    ]
    return Standing(
        baselines=(bf16, stopped), front=tuple(front), chosen=chosen, trials=17, limit="0.25%", drop_unit="nats"
    )  # fmt: skip


def panel(found: Standing, width: int, height: int) -> list[str]:
    return printed(lambda console: console.print(front_panel(found, width, height)), width).splitlines()


@pytest.mark.parametrize("width", [30, 44, 80, 120, 200])
def test_the_front_fits_every_width_with_a_line_a_plan(width: int) -> None:
    lines = panel(standing(), width, 40)
    assert max(map(len, lines)) <= width
    assert len(lines) == 3 + 1 + 1 + 1 + 4  # headings and titles; a baseline, its stopped neighbour, four of the front
    marked = [line for line in lines if line.startswith(">")]
    assert len(marked) == 1 and "0.00200" in marked[0] and "13.0" in marked[0]
    if width >= 80:
        assert "trial 1 of a long name" in marked[0] and "1.58x" in marked[0] and "13.00 ±0.26" in marked[0]
        text = " ".join(lines)
        assert_says(text, "drop, nats", "step, ms", "17 trials", "best within 0.25%: trial 1 of a long name")
        assert_says(text, "uniform fp16: stopped: its first step took 3.4 times as long")
    if width >= 120:
        assert "trial 1 of a long name; measured" in " ".join(lines) and "bf16 6" in marked[0]


@pytest.mark.parametrize("height", [8, 12, 24])
def test_a_low_window_shows_the_best_plan_and_says_what_is_left_out(height: int) -> None:
    lines = panel(standing(members=30, chosen=20), 100, height)
    assert len(lines) <= max(height - 1, 7)
    assert any(line.split()[:3] == [">", "trial", "20"] for line in lines)
    assert any("of 30, 17 trials" in line for line in lines)


def test_a_front_without_a_plan_to_use_says_so() -> None:
    lines = panel(standing(chosen=None), 120, 40)
    assert any("none within 0.25% is faster than FP32 yet" in line for line in lines)
    assert not any(line.startswith(">") for line in lines)


def screen(*, front: bool = True, fail: type[BaseException] | None = None, **options: Any) -> str:
    """Return what a terminal is sent by a search that tells two things, and ends or fails."""
    file = io.StringIO()
    console = Console(file=file, width=120, height=40, force_terminal=True, **options)
    with contextlib.suppress(KeyboardInterrupt), News(console, front=front) as news:
        measured = samples.measurement("trial 7", 0.004, 12.0, 1.6)
        news(Progress(stage="search", message="m", elapsed_seconds=4, measurement=measured, standing=standing()))
        if fail:
            raise fail
    return file.getvalue()


def test_the_front_is_cleared_at_the_end_and_stays_after_ctrl_c() -> None:
    ended, stopped = screen(), screen(fail=KeyboardInterrupt)
    assert "best within 0.25%: trial 1 of a long name" in ended
    cleared = "\x1b[1A\x1b[2K"
    assert ended.endswith(cleared * 5) and not stopped.endswith(cleared)
    assert "\x1b[?25h" in stopped  # the cursor is shown again
    assert "trial 1 of a long name" in stopped.rpartition("\x1b[2K")[2]


def test_without_colour_there_is_none_and_off_a_terminal_no_front() -> None:
    assert "\x1b[1;32m" in screen(color_system="standard")
    assert "\x1b[1;32m" not in screen(color_system="standard", no_color=True)
    assert "Front" not in screen(front=False)
    file = io.StringIO()
    with News(Console(file=file, width=80), front=True) as news:
        news(Progress(stage="search", message="m", elapsed_seconds=4, standing=standing()))
    assert file.getvalue() == "    4s  search: m\n"


def test_pictures_are_drawn_by_news_alone_and_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, drawn = [100.0], list[float]()
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before = threading.active_count()
    with News(Console(file=io.StringIO(), width=80, force_terminal=True), front=True) as news:
        assert threading.active_count() == before, "no thread draws beside a timed step"
        assert news._live is not None
        monkeypatch.setattr(news._live, "refresh", lambda: drawn.append(clock[0]))
        for _ in range(300):
            news(Progress(stage="search", message="m", elapsed_seconds=1, standing=standing()))
            clock[0] += 0.01
    told = drawn[:-1]  # the last is drawn at the end
    assert 12 <= len(told) <= 13 and told[:2] == [100.0, 100.01], "what comes after a pause is drawn at once"
    assert all(later - sooner >= 1.0 for sooner, later in zip(told, told[4:], strict=False))
