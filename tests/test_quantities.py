"""Durations and drop limits as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.errors import AutoprecError, UsageError
from autoprec.quantities import DropLimit, duration_seconds, duration_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("45m", 2700),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h0m30s", 3630),
        ("1.5h", 5400),
        (" 2m ", 120),
        (12, 12),
        (0.5, 0.5),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2hours", "2", "h", "-5m", "1m1h", "1h 30m", "five", "2 h", "1e3s", "0x2s"])
def test_what_is_no_duration_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' is not a duration. Write it like 90s, 45m, 2h or 1h30m."):
        duration_seconds(text)


@pytest.mark.parametrize("value", ["0s", 0, -1, float("nan"), float("inf"), "9" * 400 + "h"])
def test_a_duration_is_above_zero_and_finite(value: str | float) -> None:
    with pytest.raises(UsageError, match="must be above zero"):
        duration_seconds(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (9.4, "9s"), (59.6, "1m00s"), (125, "2m05s"), (3599.7, "1h00m"), (5400, "1h30m")],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.integers(1, 10**6))
def test_a_printed_duration_reads_back_to_the_minute(seconds: int) -> None:
    # from an hour on the seconds are not shown
    assert 0 <= seconds - duration_seconds(duration_text(seconds)) < (60 if seconds >= 3600 else 1)


@pytest.mark.parametrize(
    ("text", "value", "percent"),
    [
        ("0.25%", 0.25, True),
        ("0.005", 0.005, False),
        (0.005, 0.005, False),
        ("0", 0.0, False),
        (" 1 % ", 1.0, True),
        ("0.005 nats", 0.005, False),
    ],
)
def test_drop_limits(text: str | float, value: float, percent: bool) -> None:
    assert DropLimit.parse(text) == DropLimit(value, percent)


@pytest.mark.parametrize("text", ["", "%", "a little", "0.25%%", "0.1 bits", "1,5%"])
def test_what_is_no_drop_limit_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a drop limit\. Write it like 0\.25% or 0\.005 \(nats\)"):
        DropLimit.parse(text)


@pytest.mark.parametrize("text", ["-1%", -0.1, "nan", "inf%"])
def test_a_drop_limit_is_zero_or_more(text: str | float) -> None:
    with pytest.raises(UsageError, match="must be zero or more"):
        DropLimit.parse(text)


@given(
    st.builds(
        DropLimit,
        # 15 significant digits are printed, which any decimal of that length survives
        st.integers(0, 10**15 - 1).map(lambda n: n / 10**12),
        st.booleans(),
    )
)
def test_a_printed_drop_limit_reads_back(limit: DropLimit) -> None:
    assert DropLimit.parse(str(limit)) == limit
    assert DropLimit.parse(limit) is limit


def test_a_limit_in_percent_looks_at_the_percentage() -> None:
    assert DropLimit.parse("0.25%").allows(drop=9.0, drop_percent=0.25)
    assert not DropLimit.parse("0.25%").allows(drop=0.0, drop_percent=0.26)
    assert DropLimit.parse("0.005").allows(drop=0.005, drop_percent=9.0)
    assert not DropLimit.parse("0.005").allows(drop=float("nan"), drop_percent=0.0)


def test_usage_errors_are_value_errors_and_ours() -> None:
    assert issubclass(UsageError, AutoprecError) and issubclass(UsageError, ValueError)
