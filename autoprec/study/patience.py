"""Patience with a disk that is full or a storage that is away: what they refuse is tried again for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from autoprec.errors import AutoprecError, first_line
from autoprec.quantities import duration_text

__all__ = ["Patience", "PatientJournal", "patient_storage"]

T = TypeVar("T")

#: a server that restarts or a network that comes back does so within; a disk that somebody clears may well
SECONDS = 120.0
_PAUSE_SECONDS = 0.5
#: what storages that keep heartbeats are asked beside
_OF_HEARTBEATS = ("record_heartbeat", "_get_stale_trial_ids")


class Patience:
    """Tries again what fails for want of a disk or a storage, and keeps what it waited for.

    Args:
        tell: called with a sentence as a wait begins.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None) -> None:
        self.tell = tell
        self._waits: list[str] = []
        self._waiting = False

    def __call__(self, action: Callable[..., T], *arguments: Any, undo: Callable[[], None] | None = None) -> T:
        """Return what `action` returns, once it does; `undo` takes back what a failed try has left.

        Raises:
            what the action raised, where that lasts.
        """
        if self._waiting:  # a part of what is tried again already
            return action(*arguments)
        begun, why = time.monotonic(), None
        self._waiting = True
        try:
            while True:
                try:
                    if why is not None and undo is not None:
                        undo()
                    result = action(*arguments)
                    break
                except Exception as error:
                    fault = _fault(error)
                    if fault is None or time.monotonic() - begun >= SECONDS:
                        raise
                    if why is None:
                        self.tell(f"waiting: {fault}")
                    why = fault
                    time.sleep(_PAUSE_SECONDS)
        finally:
            self._waiting = False
        if why is not None:
            self._waits.append(f"waited {duration_text(time.monotonic() - begun)} for the storage: {why}")
        return result

    def taken(self) -> list[str]:
        """Return what was waited for since the last call, one sentence each."""
        found, self._waits = self._waits, []
        return found


def _fault(error: BaseException) -> str | None:
    """Return what of a disk or storage an error tells, None where it is of another kind."""
    if isinstance(error, AutoprecError):
        return _fault(error.__cause__) if error.__cause__ is not None else None
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, StorageInternalError | SQLAlchemyError):
        return first_line(error.__cause__ or error)
    # Optuna's journal, where its folder went while it held its lock there
    return "the journal's lock is gone" if "did not possess lock" in str(error) else None


class PatientJournal(JournalFileBackend):
    """A journal whose writes are tried again; each is there once and whole, or not at all. One process writes it."""

    def __init__(self, path: str, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read on from a line, all of it at once."""
        read = super().read_logs
        yield from self._patience(lambda: list(read(log_number_from)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write at the end; what a failed try has written of it is cut off."""
        path, size = self._file_path, os.path.getsize(self._file_path)

        def cut() -> None:
            if os.path.getsize(path) > size:
                os.truncate(path, size)

        self._patience(partial(super().append_logs, logs), undo=cut)


def patient_storage(storage: BaseStorage, patience: Patience) -> BaseStorage:
    """Have a storage's calls tried again; each is one transaction, which a database takes back as a whole."""
    for name in (*BaseStorage.__abstractmethods__, *_OF_HEARTBEATS):
        if hasattr(storage, name):
            setattr(storage, name, _patiently(getattr(storage, name), patience))
    return storage


def _patiently(call: Callable[..., T], patience: Patience) -> Callable[..., T]:
    def patient(*arguments: Any, **named: Any) -> T:
        return patience(partial(call, *arguments, **named))

    return patient
