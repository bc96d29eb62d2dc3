"""The run folder: who may use it, how its journal is mended after a crash, and what is written as a search goes.

Seen with Optuna's journal: a torn last line makes the study unreadable after the next write; a lock file left by
a killed process blocks for 30 seconds; trials of a killed process stay RUNNING. All three are mended before the
journal is opened, under a lock of our own that the kernel drops with its process.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autoprec.errors import StudyError
from autoprec.files import write_atomic, write_json
from autoprec.records import Measurement

__all__ = ["RunFolder", "fail_dead_trials", "trials_csv"]


class RunFolder:
    """A folder locked for one search; use it as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.created = not path.exists()
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "run.lock").open("a+")
        except OSError as error:
            raise StudyError(
                f"cannot use run folder {self.path}: {error.strerror}. Choose another with --out."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise StudyError(
                f"run folder {self.path} is in use by another search (process {owner}). "
                "Wait for it, stop it, or choose another folder with --out."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.close()
        self._lock = None

    @property
    def journal(self) -> Path:
        """The study's journal."""
        return self.path / "study.journal"

    def has_study(self) -> bool:
        """Say whether a search was begun here."""
        return self.journal.exists() and self.journal.stat().st_size > 0

    def open_storage(self) -> BaseStorage:
        """Mend and open the journal.

        Raises:
            StudyError: the journal is damaged in the middle, which no crash of ours leaves.
        """
        _mend(self.journal)
        try:
            return JournalStorage(JournalFileBackend(str(self.journal)))
        except (ValueError, KeyError) as error:
            raise StudyError(
                f"journal {self.journal} is damaged ({error}). Start anew in another folder with --out."
            ) from None

    def write(self, name: str, data: Any) -> Path:
        """Write one JSON file of the folder, atomically."""
        path = self.path / name
        write_json(path, data)
        return path

    def discard_if_new(self) -> None:
        """Remove the folder again if this search made it and nothing but its lock is in it."""
        left = {p.name for p in self.path.iterdir()}
        if self.created and left <= {"run.lock"}:
            (self.path / "run.lock").unlink(missing_ok=True)
            self.path.rmdir()


def _mend(journal: Path) -> None:
    """Cut off a torn last line and remove a dead process's lock; the run lock says that nobody else is here."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def fail_dead_trials(study: optuna.Study) -> None:
    """Mark trials that a dead process left running as failed, so that nothing waits for them."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def trials_csv(path: Path, rows: Sequence[tuple[int | None, str, Measurement]]) -> None:
    """Write `trials.csv`: one row a measurement; baselines outside the space have no trial number and say so."""
    units = list(dict.fromkeys(name for _, _, m in rows for name in m.assignment))
    text = io.StringIO()
    writer = csv.writer(text)
    head = ("trial", "state", "drop", "step_ms", "peak_bytes", "grad_error", "origin", "reason")
    writer.writerow([*head, *units])
    for number, state, m in rows:
        reason = m.reason if number is not None else "; ".join(filter(None, (f"baseline {m.name}", m.reason)))
        figures = (m.drop, m.step_ms, m.peak_bytes, m.grad_error, m.origin.drop, reason)
        formats = [str(m.assignment.get(unit, "")) for unit in units]
        writer.writerow([number, state, *figures, *formats])
    write_atomic(path, text.getvalue())
