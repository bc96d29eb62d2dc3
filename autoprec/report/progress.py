"""News of a running search on stderr: a live status line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from autoprec.quantities import duration_text
from autoprec.records import Progress
from autoprec.report.figures import plain
from autoprec.report.terminal import measurement_line

__all__ = ["News"]


class News:
    """Prints each `Progress` it is called with; a context manager that clears its live line at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._stage = ""

    def __enter__(self) -> News:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str) -> None:
        """Print a line that stays; off a terminal it is never folded."""
        self._console.print(Text(plain(text)), soft_wrap=not self._console.is_terminal)

    def doing(self, text: str) -> None:
        """Say what is under way: in the live line on a terminal, else as a line."""
        if self._status is None:
            self.say(text)
        else:
            self._status.update(Text(plain(text)))

    def __call__(self, progress: Progress) -> None:
        """Print a measurement or the first news of a stage as a line; later news of a stage is only passing."""
        begins = f"{duration_text(progress.elapsed_seconds):>6}  {progress.stage}: "
        left = "" if progress.eta_seconds is None else f" (about {duration_text(progress.eta_seconds)} left)"
        if progress.measurement is not None:
            trial = "" if progress.trial is None else f"trial {progress.trial}, "
            self.say(f"{begins}{trial}{measurement_line(progress.measurement)}{left}")
        elif progress.stage != self._stage:
            self.say(f"{begins}{progress.message}{left}")
        else:
            self.doing(f"{begins}{progress.message}{left}")
        if self._status is not None:
            self._status.update(Text(plain(f"{begins}{progress.message}{left}")))
        self._stage = progress.stage
