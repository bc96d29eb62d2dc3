"""The page of a search, written while it runs, between measurements and for a hundredth of its time at most."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from autoprec.errors import first_line
from autoprec.files import write_atomic
from autoprec.records import Progress
from autoprec.report.html import run_page
from autoprec.study.course import News
from autoprec.study.reading import read_run

__all__ = ["REPORT", "LiveReport"]

REPORT = "report.html"
#: of a search's time
_SHARE = 0.01


class LiveReport:
    """Passes news on, and writes the run's page after a measurement where it is due, and at the end.

    News come between measurements, so no step is timed meanwhile. A page is made once before the first measurement and
    thrown away: what that leaves in memory, about 10 MB, would else be in the peaks of all plans but the reference's.
    A page that cannot be made or written is said once, and stops nothing.
    """

    def __init__(self, folder: Path, tell: News) -> None:
        self._folder, self._tell = folder, tell
        self._ready = self._failed = False
        self._written = time.monotonic()
        self._took = 0.0

    def __call__(self, progress: Progress) -> None:
        """Pass a piece of news on, then write the page if it is time."""
        self._tell(progress)
        if progress.stage == "baselines" and not self._ready:
            self._make(progress, write=False)
            self._ready = True
        due = self._took <= _SHARE * (time.monotonic() - self._written)
        if progress.stage == "done" or (progress.measurement is not None and due and not self._failed):
            self._make(progress, write=True)

    def _make(self, progress: Progress, *, write: bool) -> None:
        begun = time.monotonic()
        try:
            page = run_page(read_run(self._folder))
            if write:
                write_atomic(self._folder / REPORT, page)
        except Exception as fault:  # whatever is wrong with a page, the search is worth more
            if not self._failed:
                why = f"{REPORT} is not written: {first_line(fault)}"
                self._tell(replace(progress, message=why, measurement=None, eta_seconds=None))
            self._failed = True
        if write:
            self._written = time.monotonic()
            self._took = self._written - begun
