"""Turns on a device: while one process times, others neither time nor compute there.

A device has two lock files that the kernel frees with their process. Whoever computes holds `use` with others; whoever
times holds it alone. Who waits to be alone holds `gate`, which newcomers and long computations pass through, so that
a timing begins as soon as what is under way has come to its next batch. Locks bind processes that see one folder: in
containers without a common /tmp, or for another user, they bind nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch

__all__ = ["Turns"]

#: between two tries for a lock; a batch takes longer
_POLL_SECONDS = 0.02


class Turns:
    """One process's place among those that use a device, for one measurement.

    Args:
        device: what is used.
        deadline: as `time.monotonic` counts, after which nothing is waited for any more.
        beat: called now and then while waiting, so that a watchdog does not take it for a hang.
    """

    def __init__(
        self, device: torch.device, deadline: float = float("inf"), beat: Callable[[], None] = lambda: None
    ) -> None:
        self._deadline, self._beat = deadline, beat
        self._files: tuple[IO[bytes], IO[bytes]] | None = None
        self._mode = fcntl.LOCK_UN
        name = _slug(device)
        with contextlib.suppress(OSError):  # nowhere to lock is no reason not to measure
            folder = _folder()
            self._files = ((folder / f"{name}.use").open("ab"), (folder / f"{name}.gate").open("ab"))

    @contextlib.contextmanager
    def computing(self) -> Iterator[Turns]:
        """Use the device beside others, as for drops; its end is the end of all turns taken here."""
        try:
            self._through_the_gate()
            yield self
        finally:
            for file in self._files or ():
                file.close()
            self._files = None

    def let_pass(self) -> None:
        """Between two batches: step aside if somebody waits to be alone."""
        if self._files is None or self._mode != fcntl.LOCK_SH:
            return
        if self._try(1, fcntl.LOCK_SH):
            fcntl.flock(self._files[1], fcntl.LOCK_UN)
        else:
            self._lock(fcntl.LOCK_UN)
            self._through_the_gate()

    def alone_now(self) -> bool:
        """Have the device alone if nobody else uses it, to the end of the next timing; say whether."""
        self._lock(fcntl.LOCK_UN)
        if self._files is None or self._try(0, fcntl.LOCK_EX):
            self._mode = fcntl.LOCK_EX
            return True
        self._through_the_gate()
        return False

    @contextlib.contextmanager
    def timing(self) -> Iterator[bool]:
        """Have the device alone, as for timing, then share it again; yields False where the wait was cut."""
        if self._mode != fcntl.LOCK_EX:
            self._lock(fcntl.LOCK_UN)
        alone = self._mode == fcntl.LOCK_EX or self._get(fcntl.LOCK_EX)
        try:
            yield alone
        finally:
            self._lock(fcntl.LOCK_UN)
            self._through_the_gate()

    def _through_the_gate(self) -> None:
        """Use the device beside others, once nobody waits to be alone."""
        self._get(fcntl.LOCK_SH)

    def _get(self, mode: int) -> bool:
        """Take the lock through the gate; False where the deadline came first."""
        if self._files is None:
            return True
        got = self._wait(1, mode) and self._wait(0, mode)
        fcntl.flock(self._files[1], fcntl.LOCK_UN)
        self._mode = mode if got else fcntl.LOCK_UN
        return got

    def _lock(self, mode: int) -> None:
        if self._files is not None:
            fcntl.flock(self._files[0], mode)
        self._mode = mode

    def _wait(self, which: int, mode: int) -> bool:
        told = time.monotonic()
        while not self._try(which, mode):
            now = time.monotonic()
            if now >= self._deadline:
                return False
            if now - told > 1.0:
                told = now
                self._beat()
            time.sleep(_POLL_SECONDS)
        return True

    def _try(self, which: int, mode: int) -> bool:
        if self._files is None:
            return True
        try:
            fcntl.flock(self._files[which], mode | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _slug(device: torch.device) -> str:
    """Return a name of the device itself: an index means another one where CUDA_VISIBLE_DEVICES is set."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.type if device.index is None else f"{device.type}-{device.index}"


def _folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"autoprec-turns-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
