"""The time a probe may spend."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Seconds since `started` (as `time.monotonic` counts), and how many are allowed."""

    def __init__(self, started: float) -> None:
        self.started, self.allowed = started, float("inf")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def fits(self, seconds: float, share: float = 1.0) -> bool:
        """Say whether so many seconds more stay within a share of what is allowed."""
        return self.elapsed + seconds <= share * self.allowed
