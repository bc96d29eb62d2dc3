"""News of a running command on stderr: lines off a terminal; on one a line that is drawn anew, and a search's front.

Nothing is drawn but when news come, and no thread draws: news come between measurements, so that no timed step of
this process shares its core with a picture.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from autoprec.quantities import duration_text
from autoprec.records import Progress, Standing
from autoprec.report.figures import plain
from autoprec.report.livefront import front_panel, left_text, time_text
from autoprec.report.terminal import measurement_line

__all__ = ["News"]

_DONE = "done"  #: the last stage, of which nothing is left to wait for
#: pictures in any second, at most; what comes sooner is drawn with the next news
_PICTURES = 4


class News:
    """Prints each `Progress` it is called with; a context manager that clears what it drew at the end.

    Args:
        front: draw a search's baselines and front below the lines, where the console is a terminal. They stay on the
            screen where what is told about ends by an error or Ctrl-C.
    """

    def __init__(self, console: Console, *, front: bool = False) -> None:
        self._console, self._front = console, front
        self._live: Live | None = None
        self._stage, self._now = "", ""
        self._standing: Standing | None = None
        self._drawn = deque[float](maxlen=_PICTURES)  # when the last pictures were

    def __enter__(self) -> News:
        if self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._picture)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.transient = kind is None or self._standing is None
            self._live.stop()
            self._live = None

    def _picture(self) -> RenderableType:
        now = Text(plain(self._now), no_wrap=True, overflow="ellipsis")
        if self._standing is None:
            return now
        panel = front_panel(self._standing, self._console.width, self._console.height)
        return Group(panel, now) if self._now else panel

    def say(self, text: str) -> None:
        """Print a line that stays; off a terminal it is never folded."""
        self._console.print(Text(plain(text)), soft_wrap=not self._console.is_terminal)

    def doing(self, text: str) -> None:
        """Say what is under way: in the line that is drawn anew on a terminal, else as a line."""
        if self._live is None:
            self.say(text)
            return
        self._now = text
        self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if self._live is not None and (len(self._drawn) < _PICTURES or now - self._drawn[0] >= 1.0):
            self._live.refresh()
            self._drawn.append(now)

    def __call__(self, progress: Progress) -> None:
        """Print a measurement or the first news of a stage as a line; later news of a stage is only passing."""
        begins = f"{duration_text(progress.elapsed_seconds):>6}  {progress.stage}: "
        left = f" ({left_text(progress)})" if progress.eta_seconds is not None else ""
        if self._front and progress.standing is not None:
            self._standing = progress.standing
        if self._live is not None:
            gone = time_text(progress)
            self._now = "" if progress.stage == _DONE else f"{progress.stage}: {progress.message}; {gone}"
        if progress.measurement is not None:
            trial = f"trial {progress.trial}"
            named = progress.trial is None or progress.measurement.name == trial
            self.say(f"{begins}{'' if named else f'{trial}, '}{measurement_line(progress.measurement)}{left}")
        elif self._live is None or progress.stage != self._stage:
            self.say(f"{begins}{progress.message}{left}")
        self._draw()
        self._stage = progress.stage
