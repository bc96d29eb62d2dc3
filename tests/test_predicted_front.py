"""The predicted front against every assignment counted out, and what it promises where it cannot be exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.errors import StudyError
from autoprec.formats import Format
from autoprec.study.front import ChainUnit, Choice, PredictedFront, predicted_front

Borders = float | list[dict[tuple[Format, Format], float]]
#: sums of small integers are exact in any order
figures = st.integers(0, 30).map(float)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[ChainUnit], Borders]:
    """Draw up to five units, some fixed, some tied to others, with one border cost or one a pair of formats."""
    units = []
    for index in range(draw(st.integers(1, 5))):
        formats = draw(st.permutations(list(Format)))[: draw(st.integers(1, 4))]
        choices = tuple(Choice(f, draw(figures), draw(figures), draw(figures)) for f in formats)
        units.append(ChainUnit(f"u{index}", choices, draw(st.sampled_from([None, None, None, "a", "b"]))))
    if draw(st.booleans()):
        return units, float(draw(st.integers(0, 5)))
    pairs = st.sampled_from(list(itertools.permutations(Format, 2)))
    return units, [draw(st.dictionaries(pairs, figures, max_size=4)) for _ in units[1:]]


def border(borders: Borders, index: int, before: Format, after: Format) -> float:
    if before is after:
        return 0.0
    return borders if isinstance(borders, float) else borders[index].get((before, after), 0.0)


def counted_out(units: list[ChainUnit], borders: Borders, memory: bool) -> set[tuple[float, ...]]:
    """Return the unbeaten points (time, drop, bytes) over all assignments, one by one."""
    points = set()
    for choices in itertools.product(*(u.choices for u in units)):
        ties: dict[str, Format] = {}
        if any(
            ties.setdefault(u.tied, c.format) is not c.format for u, c in zip(units, choices, strict=True) if u.tied
        ):
            continue
        casts = (border(borders, i, a.format, b.format) for i, (a, b) in enumerate(itertools.pairwise(choices)))
        time_ms = sum(c.time_ms for c in choices) + sum(casts)
        point = (time_ms, sum(c.drop for c in choices))
        points.add((*point, sum(c.bytes for c in choices)) if memory else point)
    return {p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)}


def points(front: PredictedFront, memory: bool) -> set[tuple[float, ...]]:
    columns = (front.time_ms, front.drop, front.bytes) if memory else (front.time_ms, front.drop)
    return {tuple(map(float, row)) for row in zip(*columns, strict=True)}


@given(chains(), st.booleans())
def test_it_is_the_front_of_all_assignments(chain: tuple[list[ChainUnit], Borders], memory: bool) -> None:
    units, borders = chain
    wanted = counted_out(units, borders, memory)
    if not wanted:
        with pytest.raises(StudyError, match="no format in common"):
            predicted_front(units, border_ms=borders, memory=memory)
        return
    front = predicted_front(units, border_ms=borders, memory=memory)
    assert front.exact
    assert points(front, memory) == wanted
    for index in range(len(front)):
        again = counted_out([only(u, front.assignment(index)) for u in units], borders, True)
        assert again == {(front.time_ms[index], front.drop[index], front.bytes[index])}


def only(unit: ChainUnit, assignment: dict[str, Format]) -> ChainUnit:
    return ChainUnit(unit.name, tuple(c for c in unit.choices if c.format is assignment[unit.name]), unit.tied)


@given(chains(), st.integers(0, 4))
def test_what_is_thinned_out_is_no_better_than_the_bound(chain: tuple[list[ChainUnit], Borders], most: int) -> None:
    units, borders = chain
    wanted = counted_out(units, borders, False)
    if not wanted:
        return
    front = predicted_front(units, border_ms=borders, max_states=most)
    assert all(any(q[0] <= t and q[1] <= d for q in wanted) for t, d in points(front, False)), "no such assignment"
    for time_ms, drop in wanted:
        assert front.least_ms(drop) <= time_ms * (1 + 1e-9) + 1e-9
    assert front.least_ms(min(d for _, d in wanted) - 1) == math.inf


def test_the_bound_of_a_thinned_front_knows_the_least_drop() -> None:
    # the cast costs time, and no choice does: no price of drop made of the choices' times would pay for it
    low, high = Choice(Format.FP8, 0.0, 0.0), Choice(Format.FP32, 1.0, 0.0)
    units = [ChainUnit("a", (high, low)), ChainUnit("b", (Choice(Format.BF16, 0.0, 0.0),))]
    front = predicted_front(units, border_ms=[{(Format.FP8, Format.BF16): 1.0}], max_states=1)
    assert front.least_ms(0.0) <= 1.0
    assert front.within(0.0) is not None


def random_units(count: int) -> list[ChainUnit]:
    draw = np.random.default_rng(0)
    units = []
    for index in range(count):
        scale = 10 ** draw.uniform(-8, -3)
        costs = ((Format.FP32, 0.0, 4.0), (Format.BF16, 1.0, 2.0), (Format.FP16, 0.1, 2.1), (Format.FP8, 60.0, 1.0))
        units.append(
            ChainUnit(
                f"u{index}",
                tuple(Choice(f, d * scale * draw.lognormal(0, 0.3), t * draw.lognormal(0, 0.2)) for f, d, t in costs),
            )
        )
    return units


def test_a_long_chain_comes_near_its_bound() -> None:
    front = predicted_front(random_units(300), border_ms=0.1)
    assert not front.exact
    gaps = [t / front.least_ms(d) - 1 for t, d in zip(front.time_ms, front.drop, strict=True)]
    # between two corners of the hull the bound runs straight, and no assignment may lie there
    assert max(gaps) < 0.02
    assert np.all(np.diff(front.time_ms) > 0) and np.all(np.diff(front.drop) < 0)
    fastest = front.within(float(front.drop[len(front) // 2]))
    assert fastest == len(front) // 2
    assert front.within(-1.0) is None


def test_a_border_keeps_neighbours_alike() -> None:
    low = (Choice(Format.FP32, 0.0, 2.0), Choice(Format.BF16, 1.0, 1.0))
    units = [ChainUnit(name, low) for name in "abc"]
    free = predicted_front(units)
    dear = predicted_front(units, border_ms=4.0)
    assert len(free) == 4
    assert [set(dear.assignment(i).values()) for i in range(len(dear))] == [{Format.BF16}, {Format.FP32}]


@pytest.mark.parametrize(
    ("units", "borders", "match"),
    [
        ([], 0.0, "no unit"),
        ([ChainUnit("u", ())], 0.0, "'u' has no format"),
        ([ChainUnit("u", (Choice(Format.FP8, math.nan, 1.0),))], 0.0, "'u' in fp8 has drop nan"),
        ([ChainUnit("u", (Choice(Format.FP32, 0.0, 1.0),))], [{}], "1 units have 0 borders; 1 were given"),
    ],
)
def test_what_cannot_be_solved_is_said(units: list[ChainUnit], borders: Borders, match: str) -> None:
    with pytest.raises(StudyError, match=match):
        predicted_front(units, border_ms=borders)


def test_too_many_open_ties_are_refused() -> None:
    choices = tuple(Choice(f, 0.0, 1.0) for f in Format)
    names = [f"t{i}" for i in range(8)]
    units = [ChainUnit(f"{side}{name}", choices, name) for side in "ab" for name in names]
    with pytest.raises(StudyError, match="combinations of tied units"):
        predicted_front(units)
