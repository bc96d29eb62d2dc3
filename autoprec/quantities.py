"""Durations, drop limits and plain numbers as people write them: `90s 45m 2h 1h30m`, `0.25%`, `0.005`, `3.1e-7`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from autoprec.errors import UsageError

__all__ = ["SMALL", "DropLimit", "duration_seconds", "duration_text", "number"]

SMALL = 1e-4  #: below this, zeros after the point are harder to read than an exponent

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def duration_seconds(text: str | float) -> float:
    """Return the seconds of a duration such as '90s', '45m', '2h' or '1h30m' (a number is seconds).

    Raises:
        UsageError: the text is no duration, or it is not above zero.
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        match = _DURATION.fullmatch(text.strip())
        if match is None or not any(match.groups()):
            raise UsageError(f"'{text}' is not a duration. Write it like 90s, 45m, 2h or 1h30m.")
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"a duration must be above zero, got '{text}'. Write it like 90s, 45m, 2h or 1h30m.")
    return seconds


def duration_text(seconds: float) -> str:
    """Return a short text of a duration, such as '1h30m', '2m05s' or '9s'."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{left:02d}s" if minutes else f"{left}s"


def number(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, written out where that is short: 0.00123, 412, 3.1e-7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.999 is 10.0
    if abs(value) >= SMALL and size < 7:
        return f"{value:.{max(0, digits - 1 - size)}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True, slots=True)
class DropLimit:
    """The largest drop a plan may have: a share of the reference's loss in percent, or an amount in nats."""

    value: float
    percent: bool

    @classmethod
    def parse(cls, text: str | float | DropLimit) -> DropLimit:
        """Read '0.25%' as percent and '0.005', '0.005 nats' or a number as nats; the inverse of `str`.

        Raises:
            UsageError: not a number, negative, or not finite.
        """
        if isinstance(text, DropLimit):
            return text
        raw = str(text).strip()
        percent = raw.endswith("%")
        try:
            value = float(raw.removesuffix("%" if percent else "nats"))
        except ValueError:
            raise UsageError(f"'{text}' is not a drop limit. Write it like 0.25% or 0.005 (nats).") from None
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"a drop limit must be zero or more, got '{text}'. Write it like 0.25% or 0.005 (nats).")
        return cls(value, percent)

    def allows(self, drop: float, drop_percent: float) -> bool:
        """Say whether a drop (in nats, and in percent) is within the limit."""
        return (drop_percent if self.percent else drop) <= self.value

    def __str__(self) -> str:
        return f"{self.value:.15g}%" if self.percent else f"{self.value:.15g} nats"
