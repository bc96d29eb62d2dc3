"""A study in a database that several machines work on: signs of life, what the dead were at, and turns.

All by Optuna's own means: a heartbeat for each running trial, on the database's clock; a trial whose heartbeat stopped
fails, and is asked for once more. Optuna beats only inside `Study.optimize`, so here a thread of the search's does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from autoprec.study.patience import Patience

__all__ = ["MEASURING", "Machines", "open_database"]

#: attribute of a trial that says who is at it, and at what
MEASURING = "measuring"

BEAT_SECONDS = 15
#: more than a search waits for a storage that is away, and a beat: after that nobody alive is taken for dead
GRACE_SECONDS = 180
#: between looks at whether it is one's turn
_LOOK_SECONDS = 1.0
#: to make the tables, while others do so too
_TRIES, _PAUSE_SECONDS = 5, 0.5
#: of libpq: a server that is off the network is told from one that is slow before a search's patience ends
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


def open_database(url: str) -> RDBStorage:
    """Return the Optuna storage of a database, with heartbeats; its tables are made where it has none.

    Raises:
        ImportError: the database's driver is not installed.
        SQLAlchemyError, StorageInternalError, ValueError: it cannot be opened.
    """
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):  # by the driver that the extra `postgres` installs
        scheme, url = "postgresql", f"postgresql+psycopg://{rest}"
    settings: dict[str, Any] = {"pool_pre_ping": True}
    if scheme.startswith("postgresql"):
        settings["connect_args"] = _LIBPQ
    for left in reversed(range(_TRIES)):
        try:
            with _unsaid():
                return RDBStorage(
                    url,
                    engine_kwargs=settings,
                    heartbeat_interval=BEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=_once_more,
                )
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            at_once = isinstance(cause, IntegrityError | ProgrammingError) or "already exists" in str(cause)
            if not left or not at_once:
                raise
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")


def _once_more(study: optuna.Study, trial: FrozenTrial) -> None:
    """Ask once more for what a trial without a sign of life was to measure; a turn is not taken again."""
    if trial.params:
        trial.user_attrs = {k: v for k, v in trial.user_attrs.items() if k != MEASURING}
        with _unsaid():
            RetryHeartbeatStaleTrialCallback(max_retry=1)(study, trial)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Hold back that heartbeats are experimental, and meant for `Study.optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        yield


class Machines:
    """One search among those on a study: it shows that it lives, and sees to the trials of those that do not.

    Args:
        study: on `storage`, whose calls are tried again.
        storage: with heartbeats.
        patience: with the storage.
    """

    def __init__(self, study: optuna.Study, storage: RDBStorage, patience: Patience) -> None:
        self.study, self._storage, self._patience = study, storage, patience
        #: who this is, for people
        self.name = f"{socket.gethostname()}, process {os.getpid()}"
        self._held: set[int] = set()
        #: when running trials that say of nobody were first seen, as `time.monotonic` counts
        self._unclaimed: dict[int, float] = {}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def close(self) -> None:
        """Give no more signs of life, and leave no connection open."""
        self._over.set()
        self._heart.join(BEAT_SECONDS)  # a beat on its way, no longer than one is worth
        self._storage.engine.dispose()

    def ask(self, study: optuna.Study | None = None) -> Trial:
        """Return a new trial, whose choices are still to be made, and beat for it."""
        with _unsaid():
            trial = (study or self.study).ask()
        self._patience(self._storage.record_heartbeat, trial._trial_id)
        self._held.add(trial._trial_id)
        return trial

    def claim(self, trial: Trial, **what: Any) -> None:
        """Say in a trial who is at it, and at what."""
        trial.set_user_attr(MEASURING, {"by": self.name, **what})

    def let_go(self, trial: Trial) -> None:
        """Beat no more for a trial."""
        self._held.discard(trial._trial_id)

    def holds(self, trial: FrozenTrial) -> bool:
        """Say whether this search is at a trial."""
        return trial._trial_id in self._held

    def clear(self, study: optuna.Study | None = None) -> None:
        """Fail trials that nobody is at any more: no heartbeat for a while, or killed before the first."""
        study = study or self.study
        with _unsaid():
            fail_stale_trials(study)
        now = time.monotonic()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if MEASURING in trial.user_attrs or self.holds(trial):
                continue
            seen = self._unclaimed.setdefault(trial._trial_id, now)
            if now - seen > GRACE_SECONDS:
                with contextlib.suppress(UpdateFinishedTrialError):
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    @contextlib.contextmanager
    def turn(self, wait: Callable[[str], None]) -> Iterator[None]:
        """Do what one machine does for all; who waits takes the place of one that goes.

        Args:
            wait: called about once a second with who is at it; may raise.
        """
        turns = optuna.create_study(
            study_name=f"{self.study.study_name}-turns", storage=self.study._storage, load_if_exists=True
        )
        own = self._place(turns)
        try:
            while True:
                self.clear(turns)
                running = {t.number: t for t in turns.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
                if own.number not in running:  # this machine slept, and was taken for dead
                    own = self._place(turns)
                elif own.number == min(running):
                    break
                else:
                    first = running[min(running)]
                    wait(first.user_attrs.get(MEASURING, {}).get("by", "another machine"))
                    time.sleep(_LOOK_SECONDS)
            yield
        finally:
            self.let_go(own)
            with contextlib.suppress(UpdateFinishedTrialError):
                turns.tell(own.number, 0.0, skip_if_finished=True)

    def _place(self, turns: optuna.Study) -> Trial:
        own = self.ask(turns)
        self.claim(own)
        return own

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for trial_id in tuple(self._held):
                # one that fails is made good by the next, or by the grace that others give
                with contextlib.suppress(SQLAlchemyError, StorageInternalError, OSError):
                    self._storage.record_heartbeat(trial_id)
