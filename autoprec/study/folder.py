"""The run folder: who may use it, how its journal is mended after a crash, and what is written as a search goes.

Seen with Optuna's journal: a torn last line makes the study unreadable after the next write; a lock file left by
a killed process blocks for 30 seconds; trials of a killed process stay RUNNING. All three are mended before the
journal is opened, under a lock of our own that the kernel drops with its process.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from autoprec.errors import StudyError
from autoprec.files import read_json, write_atomic, write_json
from autoprec.records import Measurement
from autoprec.study.machines import MEASURING
from autoprec.study.patience import Patience, PatientJournal

__all__ = ["Row", "RunFolder", "fail_dead_trials", "trials_csv"]


class Row(NamedTuple):
    """One measurement of a search; baselines have no trial number."""

    trial: int | None
    state: str
    measurement: Measurement
    #: its search went while it was at it, so it tells nothing of the plan
    gone: bool = False


#: what a search writes before its first measurement, and after it
_EARLY = {"run.lock", "device.json", "units.json", "sensitivity.json", "speed.json", "study.journal"}
_LATE = {"trials.csv", "result.json", "plan.json", "report.html"}


class RunFolder:
    """A folder locked for one search; use it as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: with the disk it is on
        self.patience = Patience()
        self._missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._fresh = True
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._fresh = {p.name for p in self.path.iterdir()} <= {"run.lock"}
            self._lock = (self.path / "run.lock").open("a+")
        except OSError as error:
            raise StudyError(
                f"cannot use run folder {self.path}: {error.strerror}. Choose another with --out."
            ) from None
        self._take(self._lock)
        return self

    def _take(self, lock: IO[str]) -> None:
        """Lock the folder and leave our process id in the lock file, for the message others get."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StudyError(
                    f"cannot lock run folder {self.path}: {error.strerror}. Choose another with --out."
                ) from None
            raise StudyError(
                f"run folder {self.path} is in use by another search (process {owner}). "
                "Wait for it, stop it, or choose another folder with --out."
            ) from None

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
        """Say whether a search was begun here, wherever it keeps its study."""
        begun = self.journal.exists() and self.journal.stat().st_size > 0
        return begun or any((self.path / name).exists() for name in ("trials.csv", "result.json"))

    def open_storage(self) -> BaseStorage:
        """Mend and open the journal.

        Raises:
            StudyError: the journal is damaged in the middle, which no crash of ours leaves.
        """
        try:
            _mend(self.journal)
            # absolute: the journal's lock is a symbolic link to it, which must not dangle (Optuna would wait for ever)
            return JournalStorage(PatientJournal(os.path.abspath(self.journal), self.patience))
        except OSError as error:
            raise StudyError(f"journal {self.journal} cannot be used: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError) as error:
            raise StudyError(
                f"journal {self.journal} is damaged ({error}). Start anew in another folder with --out."
            ) from None

    def write(self, name: str, data: Any) -> Path:
        """Write one JSON file of the folder, atomically."""
        path = self.path / name
        self.patience(write_json, path, data)
        return path

    def measured_on(self) -> tuple[str, str] | None:
        """Return the device and the version of torch that figures here are of; None where there are none."""
        if not (self.path / "device.json").exists():
            return None
        known = read_json(self.path / "device.json", what="run file", error=StudyError)
        return str(known.get("name")), str(known.get("versions", {}).get("torch"))

    def set_aside(self) -> None:
        """Keep what was measured here before under other names, so that all of it is measured again."""
        for name in ("study.journal", "sensitivity.json", "speed.json"):
            path, number = self.path / name, 1
            while (aside := path.with_name(f"{name}.{number}")).exists():
                number += 1
            if path.exists():
                os.replace(path, aside)

    def discard_if_new(self) -> None:
        """Leave nothing behind of a search that measured nothing: its early files, and the folders it made for them.

        A folder that held a search, or in which anything else lies, is left as it is.
        """
        if not (self._fresh and {p.name for p in self.path.iterdir()} <= _EARLY):
            return
        for name in _EARLY:
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another search may have begun beside this one
            for folder in self._missing:
                folder.rmdir()


def _mend(journal: Path) -> None:
    """Cut off a torn last line, and remove a dead process's leavings; the run lock says that nobody else is here."""
    patterns = [f"{journal.name}.lock*", *(f".{name}.*.tmp" for name in _EARLY | _LATE)]
    for pattern in patterns:
        for left in journal.parent.glob(pattern):
            left.unlink()
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def fail_dead_trials(study: optuna.Study, whose: Callable[[FrozenTrial], bool] | None = None) -> None:
    """Mark trials that a dead process left running as failed, and ask once more for what they were to measure.

    Args:
        whose: says whether a trial is of that process, where others may be at the study; None: they all are.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if whose is not None and not whose(trial):
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        # only once: what kills the process (a lack of memory) must not do so at every resume
        if trial.params and not {"measurement", "again"} & set(trial.user_attrs):
            kept = {k: v for k, v in trial.user_attrs.items() if k != MEASURING}
            study.enqueue_trial(trial.params, user_attrs={**kept, "again": True})


def trials_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `trials.csv`: one row a measurement; baselines have no trial number, and their name as the reason."""
    units = list(dict.fromkeys(name for row in rows for name in row.measurement.assignment))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ("trial", "state", "drop", "step_ms", "peak_bytes", "grad_error", "origin", "reason")
    writer.writerow([*head, *units])
    for number, state, m, _ in rows:
        reason = m.reason if number is not None else "; ".join(filter(None, (f"baseline {m.name}", m.reason)))
        figures = (m.drop, m.step_ms, m.peak_bytes, m.grad_error, m.origin.drop, reason)
        formats = [str(m.assignment.get(unit, "")) for unit in units]
        writer.writerow([number, state, *figures, *formats])
    write_atomic(path, text.getvalue())
