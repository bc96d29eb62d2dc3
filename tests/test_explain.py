"""Why a unit has its format: shares, what other formats would do, and the sentence."""

from __future__ import annotations

import pytest
import samples

from autoprec.formats import Format
from autoprec.records import Estimate, Origin, Removal
from autoprec.study.explain import explain
from autoprec.study.sampler import Believed
from autoprec.study.space import Decision, SearchSpace

FP32, BF16, FP8 = Format.FP32, Format.BF16, Format.FP8


def believed(drop: float, time: float) -> Believed:
    return Believed(*(Estimate(v, v, v, Origin.PREDICTED) for v in (drop, time)))


SPACE = SearchSpace(
    name="test",
    profile=samples.model_profile(),
    decisions=(
        Decision("a", ("a",), (FP32, BF16, FP8)),
        Decision("b", ("b",), (FP32, BF16)),
        Decision("c", ("c",), (FP32,)),
    ),
    removed=(),
    ambient=BF16,
)
NOTHING = believed(0.0, 0.0)
BELIEVED = {
    "a": {FP32: NOTHING, BF16: believed(1e-4, -3.0), FP8: believed(5e-3, -4.0)},
    "b": {FP32: NOTHING, BF16: believed(3e-4, 0.5)},
    "c": {FP32: NOTHING},
}


def test_shares_and_neighbours_are_those_of_the_plan() -> None:
    a, b, c = explain(SPACE, {"a": BF16, "b": BF16, "c": FP32}, BELIEVED, None, limit=1e-3, step_ms=10.0)
    assert (a.drop_share, b.drop_share, c.drop_share) == pytest.approx((0.25, 0.75, 0.0))
    assert (a.time_share, b.time_share) == pytest.approx((1.0, 0.0))
    assert a.wider is not None and (a.wider.format, a.wider.drop, a.wider.time_ms) == (FP32, -1e-4, 3.0)
    assert a.narrower is not None and a.narrower.format is FP8
    assert a.narrower.drop == pytest.approx(4.9e-3)
    assert b.narrower is None and c.wider is None


def test_the_reason_says_what_another_format_would_do() -> None:
    a, b, c = explain(SPACE, {"a": BF16, "b": BF16, "c": FP32}, BELIEVED, None, limit=1e-3, step_ms=10.0)
    assert (
        a.reason == "fp32 would cost 3.00 ms to save 0.000100 nats of drop; fp8 would save 1.00 ms and pass the limit"
    )
    assert b.reason == "fp32 would cost no time and save 0.000300 nats of drop"
    assert c.reason == "fp32 is its only format"
    high, *_ = explain(SPACE, {"a": FP32, "b": FP32, "c": FP32}, BELIEVED, None, limit=1e-3, step_ms=10.0)
    assert high.reason == "bf16 would save 3.00 ms for 0.000100 nats more drop"


def test_a_plan_outside_of_the_space_is_not_explained() -> None:
    assert explain(SPACE, {"a": FP8, "b": FP8, "c": FP32}, BELIEVED, None, limit=1e-3, step_ms=10.0) == ()


def test_a_format_that_is_vetoed_is_no_step() -> None:
    veto = Removal("a", FP8, "its result is not finite in fp8 (batch 1)")
    chosen = {"a": BF16, "b": BF16, "c": FP32}
    a, *_ = explain(SPACE, chosen, BELIEVED, None, limit=1e-3, step_ms=10.0, vetoes=[veto])
    assert a.narrower is None
    assert a.reason.endswith("; never fp8: its result is not finite in fp8 (batch 1)")
