"""Estimates from squares and wholes: what they come to when the truth is known, and how wide their intervals are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoprec.probe.estimation import Prediction, Scores, model_error, predict


def scores(
    true: float, ratio: float, *, examples: int, draws: int, generator: np.random.Generator, role: str = "ffn"
) -> Scores:
    """Draw the scores of a unit with 64 positions an example whose errors go together by `ratio`."""
    positions = 64
    # a position's effect is its own plus one it shares with its example: wholes are `ratio` times squares on average
    shared = max(ratio - 1, 0.0) / (positions - 1)
    scale = math.sqrt(2 * true / ratio)
    own = generator.normal(size=(draws, examples, positions)) * math.sqrt(max(1 - shared, 0.0))
    a = scale * (own + generator.normal(size=(draws, examples, 1)) * math.sqrt(shared))
    return Scores(
        role=role,
        squares=0.5 * (a**2).sum(axis=(0, 2)),
        wholes=0.5 * (a.sum(axis=2) ** 2).sum(axis=0),
        fourths=0.25 * float((a**4).sum()),
        weights=np.full(examples, float(positions * draws)),
        draws=draws,
        spread=2.0,
    )


def test_the_mean_of_a_role_corrects_squares_that_go_together() -> None:
    draw = np.random.default_rng(0)
    true = {f"attention {i}": 10 ** draw.uniform(-7, -4) for i in range(30)}
    found = predict({u: scores(t, 1.5, examples=16, draws=4, generator=draw) for u, t in true.items()})
    logs = [math.log(found[u].value / t) for u, t in true.items()]
    # squares alone are 1.5 times too low; each log has a standard error of about 0.1
    assert abs(float(np.mean(logs))) < 0.08
    assert max(map(abs, logs)) < 0.5


def test_units_are_told_apart_where_wholes_are_sure() -> None:
    draw = np.random.default_rng(1)
    ratios = {f"u{i}": r for i, r in enumerate((1.0, 1.0, 1.0, 4.0))}
    found = predict({u: scores(1e-5, r, examples=64, draws=40, generator=draw) for u, r in ratios.items()})
    assert all(p.value == pytest.approx(1e-5, rel=0.2) for p in found.values())


def test_intervals_hold_what_they_say() -> None:
    draw = np.random.default_rng(2)
    inside, reaches = [], []
    for _ in range(20):
        true = {f"u{i}": 10 ** draw.uniform(-7, -4) for i in range(12)}
        ratios = draw.lognormal(0.2, 0.1, size=12)
        given = {
            u: scores(t, max(r, 1.0), examples=16, draws=2, generator=draw)
            for (u, t), r in zip(true.items(), ratios, strict=True)
        }
        for unit, prediction in predict(given).items():
            low, high = prediction.interval(0.0)
            inside.append(low <= true[unit] <= high)
            reaches.append(high / prediction.value)
    # 95 % of 240, less four standard deviations; and an interval that holds everything would say nothing
    assert np.mean(inside) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / len(inside))
    assert np.median(reaches) < 2.5


def test_what_has_no_effect_has_none() -> None:
    nothing = Scores("embedding", np.zeros(4), np.zeros(4), 0.0, np.ones(4), 1, 2.0)
    draw = np.random.default_rng(3)
    found = predict(
        {"exact": nothing, "other": scores(1e-6, 1.0, examples=4, draws=1, generator=draw, role="embedding")}
    )
    assert found["exact"].value == 0.0 and found["exact"].interval(0.1) == (0.0, 0.0)
    assert found["other"].value > 0


@pytest.mark.parametrize("examples", [1, 2])
def test_few_examples_widen_and_do_not_fail(examples: int) -> None:
    draw = np.random.default_rng(4)
    low, high = predict({"u": scores(1e-6, 1.0, examples=examples, draws=1, generator=draw)})["u"].interval(0.1)
    assert 0 < low < 1e-6 < high < math.inf
    assert high / low > 5


def test_an_unlucky_whole_of_nought_is_no_estimate_of_nought() -> None:
    given = Scores("ffn", np.ones(8), np.zeros(8), 1.0, np.ones(8), 1, 2.0)
    assert predict({"u": given})["u"].value > 0.3


def test_measured_units_tell_the_error_of_the_method() -> None:
    nothing_known = model_error([])
    assert model_error([(0.01, 0.01)] * 20) < nothing_known < model_error([(1.0, 0.01)] * 3)
    assert model_error([(0.1, 1.0)] * 3) < nothing_known, "what sampling explains is no error of the method"


def test_interaction_widens() -> None:
    plain = Prediction(1e-5, 0.1, 0.1, 10)
    assert plain.interval(0.1, 0.5)[1] > plain.interval(0.1)[1] > 1e-5 > plain.interval(0.1)[0]
