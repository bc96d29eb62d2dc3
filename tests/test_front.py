"""Tests of the Pareto front: hand tables, and what holds for any points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.records import Measurement
from autoprec.study.front import feasible, pareto_front, pareto_indices

# few different values, so that equal coordinates and equal points come up often
COORDINATE = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 1e6, allow_nan=False))
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=30)


def point(drop: float | None, step_ms: float | None, name: str = "plan") -> Measurement:
    return Measurement(name=name, assignment={}, drop=drop, step_ms=step_ms)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(0.0, 3.0), (1.0, 2.0), (2.0, 1.0)], [0, 1, 2]),
        ([(2.0, 1.0), (0.0, 3.0), (1.0, 2.0)], [1, 2, 0]),  # from the least first coordinate up
        ([(0.0, 3.0), (1.0, 3.0), (2.0, 1.0)], [0, 2]),  # as slow, with more drop
        ([(0.0, 3.0), (0.0, 2.0)], [1]),  # no more drop, and faster
        ([(1.0, 1.0), (1.0, 1.0)], [0]),  # of equal points the first
        ([(1.0, 1.0), (0.0, 0.0), (2.0, 2.0)], [1]),
        ([(0.0, math.inf), (1.0, 1.0)], [1]),  # what never ends is on no front
    ],
)
def test_hand_tables(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_indices(points) == front


@given(POINTS)
def test_no_point_of_the_front_is_beaten(points: list[tuple[float, float]]) -> None:
    for index in pareto_indices(points):
        assert not any(beats(other, points[index]) for other in points)


@given(POINTS)
def test_every_other_point_is_beaten_or_equal_to_one_of_the_front(points: list[tuple[float, float]]) -> None:
    front = pareto_indices(points)
    for index in set(range(len(points))) - set(front):
        assert any(beats(points[i], points[index]) or points[i] == points[index] for i in front)


@given(POINTS)
def test_the_front_rises_in_one_coordinate_and_falls_in_the_other(points: list[tuple[float, float]]) -> None:
    front = [points[i] for i in pareto_indices(points)]
    for before, after in zip(front, front[1:], strict=False):
        assert before[0] < after[0] and before[1] > after[1]


@given(POINTS.flatmap(lambda points: st.tuples(st.just(points), st.permutations(points))))
def test_order_does_not_matter(pair: tuple[list[tuple[float, float]], list[tuple[float, float]]]) -> None:
    fronts = [[points[i] for i in pareto_indices(points)] for points in pair]
    assert fronts[0] == fronts[1]


@given(POINTS)
def test_the_front_of_the_front_is_itself(points: list[tuple[float, float]]) -> None:
    front = [points[i] for i in pareto_indices(points)]
    assert pareto_indices(front) == list(range(len(front)))


def test_measurements_keep_their_names() -> None:
    found = pareto_front([point(1.0, 1.0, "fast"), point(2.0, 2.0, "beaten"), point(0.0, 3.0, "exact")])
    assert [m.name for m in found] == ["exact", "fast"]


def test_what_is_barred_is_on_no_front_and_hides_nothing() -> None:
    barred = replace(point(0.0, 0.5, "barred"), barred=True)
    assert pareto_front([barred, point(1.0, 1.0)]) == [point(1.0, 1.0)]


def test_what_has_no_figures_is_on_no_front() -> None:
    stopped = Measurement(name="stopped", assignment={}, reason="stopped after its first step")
    emulated = point(0.0, None, "emulated")
    assert pareto_front([stopped, emulated, point(1.0, 1.0)]) == [point(1.0, 1.0)]


@pytest.mark.parametrize(
    ("error", "limit", "reason", "expected"),
    [
        (None, None, None, True),  # infer mode
        (0.1, 0.1, None, True),
        (0.1000001, 0.1, None, False),
        (0.0, 0.0, None, True),  # the reference itself
        (0.5, None, None, True),  # one batch: nothing to hold the error against
        (None, None, "the gradient is not finite at the initial loss scale", False),
        (None, None, "the reference's gradient is zero; no VmHWM in /proc/self/status", True),
    ],
)
def test_a_gradient_beyond_its_limit_is_not_feasible(
    error: float | None, limit: float | None, reason: str | None, expected: bool
) -> None:
    found = Measurement(
        name="plan",
        assignment={},
        drop=0.0,
        step_ms=1.0,
        grad_error=error,
        grad_error_limit=limit,
        reason=reason,
    )
    assert feasible(found) is expected
    assert pareto_front([found]) == ([found] if expected else [])


def test_an_infeasible_point_beats_nothing() -> None:
    wrong = Measurement(name="wrong", assignment={}, drop=0.0, step_ms=0.1, grad_error=1.0, grad_error_limit=0.1)
    assert pareto_front([wrong, point(1.0, 1.0)]) == [point(1.0, 1.0)]
