"""Tests of a race's decisions: how often they are wrong on simulated drops and times, and what happens at the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from autoprec.errors import UsageError
from autoprec.probe.pacing import Speed, pace
from autoprec.study.confirmation import Candidate, confirm, spending
from autoprec.study.race import FIRST_LOOK, Answer, Spread, difference, drop_bounds, evidence, judge, look_levels

Array = npt.NDArray[np.float64]

REPEATS = 1000


def log_normal(variation: float, shape: tuple[int, ...], seed: int = 0) -> Array:
    sd = math.sqrt(math.log1p(variation**2))
    drawn: Array = np.exp(sd * np.random.default_rng(seed).standard_normal(shape) - sd**2 / 2)
    return drawn


def ever(drops: Array, limit: float, spread: Spread, level: float) -> tuple[float, float]:
    """Return the shares of rows [R, N] that are at any look called within, and above."""
    within, above = np.zeros(len(drops), bool), np.zeros(len(drops), bool)
    batches = drops.shape[1]
    for count, share in enumerate(look_levels(level, batches, batches), FIRST_LOOK):
        over, under = evidence(drops[:, :count], limit, spread)
        within |= over <= share
        above |= under <= share
    return float(within.mean()), float(above.mean())


def most(level: float, repeats: int = REPEATS) -> float:
    """Return a rate that a test of this level exceeds once in a thousand times: 3.1 binomial deviations more."""
    return level + 3.1 * math.sqrt(level * (1 - level) / repeats)


# drops


@pytest.mark.parametrize("variation", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("spread", ["known", "unknown"])
def test_neither_bound_fails_more_often_than_its_level(variation: float, spread: str) -> None:
    known = Spread(math.sqrt(math.log1p(variation**2)), 10.5) if spread == "known" else Spread()
    within, above = ever(log_normal(variation, (REPEATS, 16)), 1.0, known, 0.05)
    assert within <= most(0.05)
    assert above <= most(0.05)


def test_the_interval_it_replaces_fails_often_in_the_same_simulation() -> None:
    # so that the test above is known to be able to fail
    drops, wrong = log_normal(0.7, (REPEATS, 16)), np.zeros(REPEATS, bool)
    for count in range(FIRST_LOOK, 17):
        seen = drops[:, :count]
        wrong |= seen.mean(axis=1) + 1.96 * seen.std(axis=1, ddof=1) / math.sqrt(count) < 1.0
    assert wrong.mean() > 0.2


def test_a_plan_at_half_the_limit_is_accepted_nine_times_in_ten() -> None:
    spread = Spread(math.sqrt(math.log1p(0.7**2)), 10.5)
    within, _ = ever(log_normal(0.7, (REPEATS, 16)), 2.0, spread, spending(0))
    assert within >= 0.9


def test_a_plan_at_twice_the_limit_is_dropped_nine_times_in_ten() -> None:
    spread = Spread(math.sqrt(math.log1p(0.3**2)), 10.5)
    _, above = ever(log_normal(0.3, (REPEATS, 16)), 0.5, spread, 0.05)
    assert above >= 0.9


def test_looks_add_up_to_the_level_for_a_random_walk() -> None:
    walk = np.cumsum(np.random.default_rng(1).standard_normal((20_000, 24)), axis=1)
    counts = np.arange(1, 25)
    levels = look_levels(0.05, 16, 24)
    crossed = (stats.norm.sf(walk / np.sqrt(counts))[:, FIRST_LOOK - 1 :] <= np.array(levels)).any(axis=1).mean()
    # all but the part kept for looks after the 24th; three deviations either way
    assert crossed == pytest.approx(0.05 * (0.98 + 0.02 * (1 - 16 / 24)), abs=0.005)
    assert len(levels) == 24 - FIRST_LOOK + 1
    assert all(0 < level < 0.05 for level in levels)


def test_a_look_does_not_depend_on_those_after_it() -> None:
    assert look_levels(0.03, 16, 30)[:5] == look_levels(0.03, 16, 8)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_batches_have_no_bounds_and_leave_it_open(count: int) -> None:
    assert drop_bounds([1e-9] * count) is None
    assert judge([1e-9] * count, 1.0) is Answer.OPEN


def test_bounds_widen_as_the_level_falls_and_hold_the_mean() -> None:
    drops = log_normal(0.5, (10,), seed=3).tolist()
    found = [drop_bounds(drops, level=level) for level in (0.2, 0.05, 0.01, 1e-4, 1e-7)]
    for wide, wider in itertools.pairwise(found):
        assert wide is not None and wider is not None
        assert wider.lower <= wide.lower <= wide.mean <= wide.upper < wider.upper


def test_bounds_scale_with_the_unit() -> None:
    drops = log_normal(0.5, (10,), seed=3)
    one, thousandth = drop_bounds(drops.tolist()), drop_bounds((1e-3 * drops).tolist())
    assert one is not None and thousandth is not None
    assert [thousandth.lower, thousandth.upper] == pytest.approx([1e-3 * one.lower, 1e-3 * one.upper], rel=1e-6)


def test_the_answer_is_the_bounds() -> None:
    drops = log_normal(0.4, (12,), seed=5).tolist()
    bounds = drop_bounds(drops, spread=Spread(0.4, 10), planned=12)
    assert bounds is not None
    # a floor that is the same for both, as `judge` takes it from the limit
    for limit, answer in ((1.001 * bounds.upper, "within"), (0.999 * bounds.upper, "open")):
        over, _ = evidence(np.array(drops), limit, Spread(0.4, 10), floor=0.01 * bounds.mean)
        assert (over <= look_levels(0.05, 12, 12)[-1]) == (answer == "within")


@pytest.mark.parametrize(
    ("drops", "answer"),
    [
        pytest.param([0.0] * 6, Answer.WITHIN, id="the same as the reference"),
        pytest.param([0.0, 0.0, 0.01, 0.0, 0.02, 0.0], Answer.WITHIN, id="zeros among small drops"),
        pytest.param([-1e-18, 1e-3, 2e-3, 1e-3, 1e-3, 1e-3], Answer.WITHIN, id="rounding below zero"),
        pytest.param([0.0, 5.0] * 3, Answer.OPEN, id="zeros among large drops"),
        pytest.param([3.0, 4.0, 5.0, 3.5] * 4, Answer.ABOVE, id="all above"),
        pytest.param([0.01, math.nan], Answer.ABOVE, id="not a number"),
        pytest.param([math.inf], Answer.ABOVE, id="infinite"),
        pytest.param([0.01] * 8 + [math.nan], Answer.WITHIN, id="decided before"),
    ],
)
def test_odd_drops(drops: list[float], answer: Answer) -> None:
    assert judge(drops, 1.0) is answer


def test_bounds_of_zeros_and_of_what_is_not_finite() -> None:
    zeros, broken = drop_bounds([0.0] * 8), drop_bounds([0.1, math.nan])
    assert zeros is not None and (zeros.lower, zeros.mean, zeros.upper) == (0.0, 0.0, 0.0)
    assert broken is not None and broken.lower == broken.upper == math.inf


def test_one_batch_far_off_is_not_averaged_away_by_logarithms() -> None:
    drops = [1.0, 1.1, 0.9] * 5 + [60.0]
    bounds = drop_bounds(drops, spread=Spread(0.1, 12))
    assert bounds is not None
    assert bounds.upper > 2 * bounds.mean


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_no_limit_is_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        judge([0.1] * 8, limit)


# weights


def test_weights_that_are_equal_change_nothing_and_zeros_leave_batches_out() -> None:
    drops = log_normal(0.5, (8,), seed=2).tolist()
    plain = drop_bounds(drops)
    assert plain is not None
    heavy = drop_bounds([*drops, 100.0], weights=[7.0] * 8 + [0.0])
    assert heavy is not None
    assert heavy.batches == 8
    assert heavy.mean == pytest.approx(plain.mean)
    assert heavy.upper == pytest.approx(plain.upper, rel=1e-6)


def test_weights_move_the_mean_and_widen_the_bounds() -> None:
    drops = [0.5, 1.0, 1.5, 1.0] * 4
    even = drop_bounds(drops)
    uneven = drop_bounds(drops, weights=[4.0, 1.0, 4.0, 1.0] * 4)
    assert even is not None and uneven is not None
    assert uneven.mean == pytest.approx(1.0)
    assert uneven.upper > even.upper
    low = drop_bounds(drops, weights=[9.0, 1.0, 1.0, 1.0] * 4)
    assert low is not None and low.mean == pytest.approx(8.0 / 12)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="one weight a batch"):
        drop_bounds([0.1] * 5, weights=[1.0] * 4)


# what is known of the spread


def test_spread_is_that_of_the_logarithm_and_weighs_by_batches() -> None:
    found = Spread.of(log_normal(0.7, (200, 8)).tolist())
    assert found.log_sd == pytest.approx(math.sqrt(math.log1p(0.49)), rel=0.05)
    assert found.weight == 10.5
    assert Spread.of(log_normal(0.7, (2, 40)).tolist()).weight == 12.0


def test_a_plan_that_varies_more_than_others_counts_by_its_own_spread() -> None:
    steady, wild = log_normal(0.1, (20, 8)).tolist(), log_normal(1.0, (8,), seed=4).tolist()
    assert Spread.of(steady, own=wild).log_sd == Spread.of([wild]).log_sd > 3 * Spread.of(steady).log_sd
    assert Spread.of(steady, own=[1.0] * 8).log_sd == Spread.of(steady).log_sd


@pytest.mark.parametrize("earlier", [[], [[0.0] * 8], [[0.3]], [[math.nan, 1.0]]])
def test_nothing_to_learn_from_is_the_cautious_default(earlier: list[list[float]]) -> None:
    assert Spread.of(earlier) == Spread()


def test_a_known_spread_accepts_sooner() -> None:
    drops = log_normal(0.1, (200, 16), seed=8)
    known, unknown = (ever(drops, 1.5, spread, 0.05)[0] for spread in (Spread(0.1, 10.5), Spread()))
    assert known > unknown + 0.3


def test_a_spread_learnt_from_plans_that_vary_far_less_is_soon_given_up() -> None:
    # taken at its word, as long as 12 batches count, it would accept wrongly three times as often
    within, _ = ever(log_normal(1.0, (REPEATS, 16)), 1.0, Spread(0.08, 12.0), 0.05)
    assert within <= 1.5 * 0.05


# confirmation


def test_levels_halve_and_add_up_to_five_percent() -> None:
    levels = [spending(k) for k in range(60)]
    assert sum(levels) == pytest.approx(0.05)
    assert sum(levels) <= 0.05 + 1e-15
    assert all(b == a / 2 for a, b in itertools.pairwise(levels[1:]))
    assert levels[1] <= levels[0] / 2


@pytest.mark.parametrize("shared", [False, True])
def test_a_chosen_plan_is_over_the_limit_at_most_five_times_in_a_hundred(shared: bool) -> None:
    # 20 plans, all 2 % over, whose spread was learnt from 8 batches with the same noise
    sd, wrong = math.sqrt(math.log1p(0.7**2)), np.zeros(REPEATS, bool)
    known = sd * np.sqrt(np.random.default_rng(12).chisquare(7, REPEATS) / 7)
    for k in range(20):
        drops = 1.02 * log_normal(0.7, (REPEATS, 16), seed=0 if shared else k)
        # an array stands for the number: as many spreads as rows
        spread = Spread(known, 10.5)  # type: ignore[arg-type]
        for count, share in enumerate(look_levels(spending(k), 16, 16), FIRST_LOOK):
            wrong |= evidence(drops[:, :count], 1.0, spread)[0] <= share
    assert wrong.mean() <= most(0.05)


def test_a_confirmation_decides_as_judging_all_batches_does() -> None:
    drops = 0.6 * log_normal(0.5, (12, 16), seed=9)
    for row in drops:
        single = confirm([Candidate("a", row.__getitem__, Spread(0.5, 10.5))], 1.0, 16)
        alone = judge(row.tolist(), 1.0, level=spending(0), spread=Spread(0.5, 10.5))
        assert (single.accepted is not None) == (alone is Answer.WITHIN)


def test_the_first_that_passes_is_taken_and_no_more_is_measured() -> None:
    calls: list[tuple[str, int]] = []

    def plan(name: str, drop: float) -> Candidate:
        def measure(batch: int) -> float:
            calls.append((name, batch))
            return drop * (1 + 0.1 * (batch % 3))

        return Candidate(name, measure, Spread(0.1, 10.5))

    plans = [plan("fast", 3.0), plan("overflows", math.nan), plan("good", 0.01), plan("slow", 0.001)]
    found = confirm(iter(plans), 1.0, 16)
    assert found.accepted is not None and found.accepted.name == "good"
    assert [t.answer for t in found.tries] == [Answer.ABOVE, Answer.ABOVE, Answer.WITHIN]
    assert [t.level for t in found.tries] == [spending(0), spending(1), spending(2)]
    assert "above the limit of 1" in str(found.tries[0].reason)
    assert found.tries[1].reason == "its drop on batch 0 is not finite"
    bounds = found.accepted.bounds
    assert bounds is not None and bounds.upper <= 1.0 and bounds.level == spending(2)
    # each batch once, in order, until there is an answer
    assert calls == [(t.name, i) for t in found.tries for i in range(t.batches)]


def test_running_out_of_batches_is_a_failure_with_its_reason() -> None:
    found = confirm([Candidate("near", lambda batch: 0.9 + 0.2 * (batch % 2))], 1.0, 8)
    assert found.accepted is None
    assert found.tries[0].answer is Answer.OPEN
    assert "8 batches do not tell" in str(found.tries[0].reason)
    few = confirm([Candidate("few", lambda batch: 1e-6)], 1.0, 3)
    assert few.accepted is None and "give at least 4" in str(few.tries[0].reason)
    assert confirm([], 1.0, 8).accepted is None


def test_batches_of_no_weight_are_not_measured() -> None:
    seen: list[int] = []

    def measure(batch: int) -> float:
        seen.append(batch)
        return 1e-4

    assert confirm([Candidate("a", measure)], 1.0, 8, weights=[0, 1, 1, 1, 0, 1, 1, 1]).accepted is not None
    assert 0 not in seen and 4 not in seen


def test_a_difference_is_paired() -> None:
    common, generator = log_normal(1.0, (12,)), np.random.default_rng(6)
    a = common + 0.01 * generator.standard_normal(12)
    same = difference(a.tolist(), common.tolist())
    more = difference((a + 0.1).tolist(), common.tolist())
    assert same is not None and same[0] < 0 < same[1] < 0.02
    assert more is not None and more[0] > 0.05
    assert difference([1.0] * 3, [2.0] * 3) is None


# pace


def times(pairs: int, gain: float, seed: int) -> tuple[list[float], list[float]]:
    """Return seconds of a shared machine: drift, bursts of slow steps, rare huge ones, and the second of two slower."""
    generator = np.random.default_rng(seed)
    load = 0.1 * np.cumsum(generator.standard_normal(2 * pairs)) / math.sqrt(pairs)
    burst = 0.3 * (np.convolve(generator.random(2 * pairs) < 0.02, np.ones(6))[: 2 * pairs] > 0)
    noise = 0.01 * generator.standard_t(2, 2 * pairs)
    step = (1e-3 * np.exp(load + burst + noise)).reshape(pairs, 2)
    step[:, 1] *= 1.03
    step[1::2] = step[1::2, ::-1]
    return step[:, 0].tolist(), (step[:, 1] / gain).tolist()


@pytest.mark.parametrize("pairs", [8, 20, 60])
def test_a_reference_is_hardly_ever_faster_than_itself(pairs: int) -> None:
    found = [pace(*times(pairs, 1.0, seed)).answer for seed in range(400)]
    assert found.count(Speed.FASTER) <= 400 * most(0.01, 400)
    assert found.count(Speed.SLOWER) <= 400 * most(0.01, 400)


def test_a_gain_of_a_tenth_is_seen() -> None:
    found = [pace(*times(60, 1.1, seed)) for seed in range(200)]
    assert sum(f.answer is Speed.FASTER for f in found) >= 0.8 * 200
    assert np.median([f.ratio for f in found]) == pytest.approx(1.1, rel=0.01)
    slower = [pace(*times(60, 1 / 1.1, seed)).answer for seed in range(200)]
    assert slower.count(Speed.SLOWER) >= 0.8 * 200


def test_steps_that_hang_together_count_for_less() -> None:
    # noise that stays for four pairs at a time: ranks that took pairs for independent would be wrong in 3 % here
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(400):
        noise = np.repeat(0.05 * generator.standard_normal(15), 4)
        wrong += pace(np.exp(noise).tolist(), [1.0] * 60).answer is Speed.FASTER
    assert wrong <= 400 * most(0.01, 400)


def test_a_gain_within_two_percent_is_the_same_however_sure() -> None:
    reference = [1.015 + 1e-6 * (i % 5) for i in range(60)]
    found = pace(reference, [1.0] * 60)
    assert found.interval is not None and found.interval[0] > 1.0
    assert found.answer is Speed.SAME


def test_few_pairs_give_a_ratio_and_no_interval() -> None:
    found = pace([2.0] * 7, [1.0] * 7)
    assert found.ratio == pytest.approx(2.0)
    assert (found.interval, found.answer) == (None, Speed.SAME)
    for pairs in (8, 9, 19, 20, 60):
        found = pace([2.0, 2.1] * (pairs // 2) + [2.0] * (pairs % 2), [1.0] * pairs)
        assert (found.answer, found.pairs) == (Speed.FASTER, pairs)
