"""Tests of the choice and the sentence: hand-made measurements in, one decision out."""

from __future__ import annotations

import dataclasses

import pytest

from autoprec.quantities import DropLimit
from autoprec.records import Confirmed, Measurement, Verdict, VerdictDecision
from autoprec.study.front import pareto_front
from autoprec.study.outcome import outcome_of, standing_of
from autoprec.study.verdict import best_uniform, choose, decide, wanted

PERCENT = DropLimit.parse("0.25%")
HOURS = 3.0
BASELINES = {"uniform fp32", "uniform bf16", "uniform fp16", "cast bf16"}


def made(
    name: str,
    drop: float,
    speedup: float,
    *,
    spread: float = 0.005,
    percent: float | None = None,
    grad_error: float | None = None,
) -> Measurement:
    """Return a measurement of a step of 10 ms without a plan, with an interval of ± `spread`."""
    return Measurement(
        name=name,
        assignment={},
        drop=drop,
        drop_percent=100 * drop if percent is None else percent,
        step_ms=10.0 / speedup,
        speedup=speedup,
        speedup_ci95=(speedup * (1 - spread), speedup * (1 + spread)),
        grad_error=grad_error,
        grad_error_limit=None if grad_error is None else 0.1,
    )


FP32 = made("uniform fp32", 0.0, 1.0)


def judge(*found: Measurement, limit: DropLimit = PERCENT) -> tuple[str | None, Verdict]:
    """Return the chosen measurement's name and the verdict."""
    bases = [m for m in found if m.name in BASELINES]
    front = pareto_front(found)
    chosen = choose(front, BASELINES, limit)
    return None if chosen is None else front[chosen].name, decide(front, chosen, bases, limit, HOURS)


def test_a_plan_faster_than_every_uniform_one_within_the_limit() -> None:
    chosen, verdict = judge(FP32, made("uniform bf16", 0.01, 2.0), made("trial 3", 0.002, 1.5))
    assert chosen == "trial 3"
    assert verdict.decision is VerdictDecision.USE_PLAN
    assert verdict.best_uniform == "uniform fp32"  # bf16 is over the limit
    assert verdict.text == (
        "Use plan.json: 1.50 (1.49–1.51) times as fast as FP32, drop 0.00200 relative squared error (0.20 %, "
        "limit 0.25%); 1.50 times as fast as uniform fp32, the best uniform plan."
    )


def test_break_even_is_search_time_over_the_share_of_time_saved() -> None:
    _, verdict = judge(FP32, made("uniform bf16", 0.001, 1.5), made("trial 3", 0.002, 2.0))
    assert verdict.best_uniform == "uniform bf16"
    # 5 ms instead of 6.667: a quarter of each hour is saved, so the search is paid for after four times its length
    assert verdict.break_even_hours == pytest.approx(HOURS / (1 - 5.0 / (10 / 1.5)))
    assert verdict.break_even_hours == pytest.approx(4 * HOURS)


def test_a_gain_within_its_noise_has_no_break_even() -> None:
    uniform, plan = made("uniform bf16", 0.002, 1.5, spread=0.1), made("trial 3", 0.001, 1.6, spread=0.1)
    chosen, verdict = judge(FP32, uniform, plan)
    assert chosen == "trial 3"
    assert verdict.break_even_hours is None
    assert verdict.text.endswith("as fast as uniform bf16 within noise, with 50 % of its drop.")


def test_a_plan_no_faster_and_no_better_than_uniform_says_so() -> None:
    _, verdict = judge(FP32, made("uniform bf16", 0.001, 1.5, spread=0.1), made("trial 3", 0.002, 1.6, spread=0.1))
    assert verdict.text.endswith("not faster than uniform bf16 by more than noise.")
    assert verdict.break_even_hours is None


def test_a_baseline_is_taken_where_it_is_as_fast() -> None:
    chosen, verdict = judge(FP32, made("uniform bf16", 0.001, 1.99), made("trial 3", 0.002, 2.0))
    assert chosen == "uniform bf16"
    assert verdict.decision is VerdictDecision.USE_UNIFORM
    assert verdict.break_even_hours is None
    assert verdict.text == (
        "Use uniform bf16: 1.99 (1.98–2.00) times as fast as FP32, drop 0.00100 relative squared error (0.10 %, "
        "limit 0.25%). No per-layer plan within the limit is faster by more than noise."
    )


def test_a_cast_is_a_baseline_and_no_uniform_plan() -> None:
    chosen, verdict = judge(FP32, made("uniform bf16", 0.001, 1.5), made("cast bf16", 0.002, 2.0))
    assert chosen == "cast bf16"
    assert verdict.decision is VerdictDecision.USE_UNIFORM
    assert verdict.best_uniform == "uniform bf16"


@pytest.mark.parametrize(
    "others",
    [
        (),
        (made("uniform bf16", 0.01, 2.0), made("trial 3", 0.003, 1.5)),  # fast and over the limit
        (made("uniform bf16", 0.001, 0.8), made("trial 3", 0.0005, 0.9)),  # within the limit and slower
        (made("trial 3", 0.001, 1.05, spread=0.1),),  # faster, and its interval holds 1
        (made("trial 3", 0.001, 2.0, grad_error=0.2),),  # its gradient is beyond the limit
    ],
)
def test_do_nothing(others: tuple[Measurement, ...]) -> None:
    chosen, verdict = judge(FP32, *others)
    assert chosen is None
    assert verdict == Verdict(
        decision=VerdictDecision.DO_NOTHING,
        text="Do nothing: no plan measured is faster than FP32 by more than its noise with a drop within 0.25%.",
        best_uniform="uniform fp32",
        break_even_hours=None,
    )


def test_a_device_that_computes_nothing_but_fp32_is_told() -> None:
    chosen, verdict = judge(FP32, Measurement(name="uniform fp16", assignment={}, reason="stopped"))
    assert chosen is None and verdict.decision is VerdictDecision.DO_NOTHING
    assert verdict.text.startswith("Do nothing: every plan but FP32 is far slower here, or cannot run")


def test_fp32_is_never_the_plan_to_use_however_lucky_its_timing() -> None:
    assert choose([made("uniform fp32", 0.0, 1.05)], BASELINES, PERCENT) is None


def test_the_limit_is_in_percent_or_in_nats() -> None:
    found = made("trial 3", 0.004, 2.0, percent=0.1)
    assert judge(FP32, found, limit=DropLimit.parse("0.1%"))[0] == "trial 3"
    assert judge(FP32, found, limit=DropLimit.parse("0.09%"))[0] is None
    assert judge(FP32, found, limit=DropLimit.parse("0.004"))[0] == "trial 3"
    chosen, verdict = judge(FP32, found, limit=DropLimit.parse("0.0039"))
    assert chosen is None and "within 0.0039 nats" in verdict.text


def test_best_uniform_is_the_fastest_within_the_limit() -> None:
    bf16, fp16 = made("uniform bf16", 0.002, 1.5), made("uniform fp16", 0.001, 1.8)
    assert best_uniform([FP32, bf16, fp16], PERCENT) is fp16
    assert best_uniform([FP32, bf16, made("uniform fp16", 0.003, 1.8)], PERCENT) is bf16
    assert best_uniform([FP32, bf16, made("uniform fp16", 0.001, 1.8, grad_error=0.2)], PERCENT) is bf16
    assert best_uniform([made("cast bf16", 0.0, 3.0)], PERCENT) is None
    assert best_uniform([], PERCENT) is None


def test_without_an_interval_a_gain_must_exceed_what_counts_as_the_same() -> None:
    def bare(speedup: float) -> Measurement:
        return Measurement(
            name="trial 1", assignment={}, drop=0.0, drop_percent=0.0, step_ms=10 / speedup, speedup=speedup
        )

    assert choose([bare(1.02)], BASELINES, PERCENT) is None
    assert choose([bare(1.03)], BASELINES, PERCENT) == 0


def test_outcome_joins_front_choice_and_verdict() -> None:
    stopped = Measurement(name="uniform fp16", assignment={}, reason="stopped")
    found = [FP32, made("uniform bf16", 0.001, 1.5), stopped, made("trial 3", 0.002, 2.0), made("trial 4", 0.003, 1.9)]
    outcome = outcome_of(found, BASELINES, PERCENT, HOURS * 3600)
    assert [m.name for m in outcome.baselines] == ["uniform fp32", "uniform bf16", "uniform fp16"]
    assert [m.name for m in outcome.front] == ["uniform fp32", "uniform bf16", "trial 3"]
    assert [m.speedup_over_uniform for m in outcome.front] == pytest.approx([1 / 1.5, 1.0, 2 / 1.5])
    assert outcome.best is not None and outcome.best.name == "trial 3"
    assert outcome.verdict.break_even_hours == pytest.approx(4 * HOURS)
    named = outcome.with_plan("run/plan.json")
    assert [m.plan for m in named.front] == [None, None, "run/plan.json"]


def test_a_recommended_plan_outside_the_space_stands_with_the_baselines_and_takes_a_plan_file() -> None:
    found = [FP32, made("uniform bf16", 0.001, 1.5), made("recommended", 0.0005, 2.0)]
    beside = {m.name for m in found}
    outcome = outcome_of(found, BASELINES, PERCENT, HOURS * 3600, beside=beside)
    assert [m.name for m in outcome.baselines] == ["uniform fp32", "uniform bf16", "recommended"]
    assert outcome.best is not None and outcome.best.name == "recommended"
    assert outcome.verdict.decision is VerdictDecision.USE_PLAN and outcome.verdict.best_uniform == "uniform bf16"
    standing = standing_of(FP32, found, BASELINES, PERCENT, "nats", beside=beside)
    assert [m.name for m in standing.baselines] == [m.name for m in outcome.baselines] and standing.trials == 0
    assert standing.chosen is not None and standing.front[standing.chosen].name == "recommended"


def confirmation(name: str, answer: str, reason: str | None = None) -> Confirmed:
    return Confirmed(name=name, answer=answer, drop=1e-4, low=5e-5, high=2e-4, batches=5, level=0.035, reason=reason)


def test_a_plan_that_fails_on_unseen_batches_is_not_chosen() -> None:
    found = [FP32, made("uniform bf16", 0.001, 1.5), made("trial 1", 0.002, 2.0)]
    tried = (confirmation("trial 1", "above", "too large"), confirmation("uniform bf16", "within"))
    outcome = outcome_of(found, BASELINES, PERCENT, 3600.0, tried)
    assert outcome.best is not None and outcome.best.name == "uniform bf16"
    assert outcome.verdict.decision is VerdictDecision.USE_UNIFORM
    assert (
        "confirmed on 5 unseen batches (drop 0.000100 relative squared error, at most 0.000200)" in outcome.verdict.text
    )


def test_nothing_is_done_where_no_plan_is_confirmed() -> None:
    found = [FP32, made("trial 1", 0.002, 2.0)]
    outcome = outcome_of(found, BASELINES, PERCENT, 3600.0, (confirmation("trial 1", "open", "5 batches do not tell"),))
    assert outcome.chosen is None and outcome.verdict.decision is VerdictDecision.DO_NOTHING
    assert "trial 1: 5 batches do not tell" in outcome.verdict.text


def test_what_was_not_confirmed_is_said() -> None:
    found = [FP32, made("trial 1", 0.002, 2.0)]
    outcome = outcome_of(found, BASELINES, PERCENT, 3600.0, (), "not confirmed: too few batches")
    assert outcome.best is not None and "(not confirmed: too few batches)" in outcome.verdict.text


def test_plans_are_wanted_in_the_order_in_which_they_would_be_chosen() -> None:
    front = [FP32, made("uniform bf16", 0.001, 1.5), made("trial 1", 0.002, 2.0), made("trial 2", 0.01, 3.0)]
    assert [m.name for m in wanted(front, BASELINES, PERCENT)] == ["trial 1", "uniform bf16"]


def test_a_pace_of_same_is_not_faster() -> None:
    even = dataclasses.replace(made("trial 1", 0.001, 1.05), pace="same")
    assert choose([FP32, even], BASELINES, PERCENT) is None
    assert choose([FP32, dataclasses.replace(even, pace="faster")], BASELINES, PERCENT) == 1


@pytest.mark.parametrize(
    ("drop", "speedup", "picked"),
    [(0.00195, 1.51, "uniform bf16"), (0.0012, 1.51, "trial 2"), (0.00195, 1.6, "trial 2")],
    ids=["ahead by noise", "gentler", "faster"],
)
def test_a_plan_that_is_ahead_of_a_uniform_one_by_noise_alone_is_not_worth_a_file(
    drop: float, speedup: float, picked: str
) -> None:
    uniform = dataclasses.replace(made("uniform bf16", 0.002, 1.5), drop_ci95=(0.0019, 0.0021))
    trial = dataclasses.replace(made("trial 2", drop, speedup), drop_ci95=(0.95 * drop, 1.05 * drop))
    outcome = outcome_of([FP32, uniform, trial], BASELINES, PERCENT, 60.0)
    assert outcome.best is not None and outcome.best.name == picked
    assert (outcome.verdict.decision is VerdictDecision.USE_UNIFORM) is (picked == "uniform bf16")
    assert [m.name for m in outcome.front] == ["uniform fp32", picked]
