"""The worker process of a search, seen from the search: what it is asked, and what is made of its end.

A crash, a hang, a failed device or a lack of memory ends the worker and fails the one request it was at. The next
request starts a fresh worker, which loads the workload and runs its reference a few times before anything is measured.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any, TypeVar

import torch

from autoprec import errors
from autoprec.errors import AutoprecError, MeasurementError
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.measurement import Request
from autoprec.plan import Plan
from autoprec.probe.workload import Workload
from autoprec.quantities import duration_text
from autoprec.records import (
    DeviceProfile,
    Measurement,
    ModelProfile,
    Progress,
    SensitivityProfile,
    SpeedProfile,
    TrainingConfirmation,
    TrainingPace,
)
from autoprec.study.budget import FirstLook
from autoprec.study.protocol import Hopeless, Loading, Opened, Order

__all__ = ["Worker", "WorkerLost"]

T = TypeVar("T")

#: a worker that is silent this many times as long as a measurement is expected to take hangs; never sooner than that,
#: because a format without hardware is slow, and kernels are set up on first use
_SILENT_TIMES, SILENT_SECONDS = 10.0, 60.0
#: loading a model, from a disk that is slow or over a network
_LOAD_SECONDS = 1800.0
#: between the end of what a worker says and its own
_END_SECONDS = 10.0
#: of what a worker wrote before its end
_LAST_LINES = 20


class WorkerLost(MeasurementError):
    """The worker process has ended, or was ended, in the middle of a request; `killed`: by somebody else."""

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


class Worker:
    """A process that measures a workload; its methods stand for the functions of the same names in this process.

    Use it as a context. It starts at once, so that it imports while the search loads; `open` has it load.

    Args:
        loading: how it makes its workload.
        threads: that it computes with; None: as many as this process.
    """

    def __init__(self, loading: Loading, threads: int | None = None) -> None:
        self.loading, self._threads = loading, threads
        self._tell: Callable[[Progress], None] = lambda news: None
        #: what a measurement is expected to take
        self.expected_seconds = 0.0
        #: as `time.monotonic` counts, when the longest measurement ends whatever it is doing
        self.last_call = float("inf")
        #: seconds that the last request took beyond the worker's own
        self.overhead_seconds = 0.0
        #: whether nothing it may still say is wanted
        self.given_up = False
        self._away: DeviceProfile | None = None
        self._numbers: dict[int, int] = {}
        self._seen: list[int] = []
        self._identity: Opened | None = None
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, whole: Workload, seen: Workload, away: DeviceProfile | None) -> Opened:
        """Load the workload, whose batches this process knows too.

        Args:
            whole: all its batches.
            seen: those that plans are measured on.
            away: the device to search for, where it is not here.

        Raises:
            WorkerLost: it cannot be loaded there.
        """
        self._numbers = {id(batch): index for index, batch in enumerate(whole.batches)}
        self._seen, self._away = self._indices(seen), away
        self._identity = self._twice(self._open)
        return self._identity

    # the functions of this process that a worker stands for

    def first_look(self) -> FirstLook:
        """Run the reference a few times, which warms the worker up."""
        return self._do(FirstLook, "look", _LOAD_SECONDS, batches=self._seen)

    def probe_device(self, device: str, *, seconds: float) -> DeviceProfile:
        """Measure the device that the workload is on."""
        return self._do(DeviceProfile, "device", self._patience(seconds), seconds=seconds)

    def probe_sensitivity(
        self, workload: Workload, formats: Sequence[Format | str], *, seconds: float, seed: int, units: ModelProfile,
        progress: Callable[[Progress], None],
    ) -> SensitivityProfile:  # fmt: skip
        """As `autoprec.probe_sensitivity`."""
        asked = {"formats": [str(f) for f in formats], "seconds": seconds, "seed": seed, "units": as_json(units)}
        with self._heard_by(progress):
            return self._do(SensitivityProfile, "sensitivity", self._patience(seconds), batches=self._seen, **asked)

    def probe_speed(
        self,
        workload: Workload,
        formats: Sequence[Format | str],
        *,
        seconds: float,
        progress: Callable[[Progress], None],
    ) -> SpeedProfile:
        """As `probe_speed` of this process."""
        asked: dict[str, Any] = {"formats": [str(f) for f in formats], "seconds": seconds}
        with self._heard_by(progress):
            return self._do(SpeedProfile, "speed", self._patience(seconds), batches=self._seen, **asked)

    def training_pace(self, workload: Workload, plan: Plan, *, emulate: bool, seconds: float) -> TrainingPace:
        """As `training_pace` of this process, on all batches; `seconds`: what it may take."""
        patience = max(SILENT_SECONDS, 2 * seconds)
        return self._do_once(TrainingPace, "pace", patience, plan=plan.to_json(), emulate=emulate)

    def confirm_training(
        self,
        workload: Workload,
        plans: dict[str, Plan],
        *,
        steps: int,
        seeds: int,
        emulate: bool,
        tell: Callable[[str], None],
        seconds: float,
    ) -> TrainingConfirmation:
        """As `confirm_training` of this process, on all batches; `seconds`: what it may take."""
        given = {name: plan.to_json() for name, plan in plans.items()}
        patience = max(SILENT_SECONDS, 2 * seconds)
        with self._heard_by(lambda news: tell(news.message)):
            return self._do_once(
                TrainingConfirmation, "train", patience, plans=given, steps=steps, seeds=seeds, emulate=emulate
            )

    def evaluate(self, request: Request) -> Measurement:
        """As `autoprec.measurement.evaluate`.

        Raises:
            WorkerLost: the worker was lost over it.
            AutoprecError: what `evaluate` raised there.
        """
        left = request.deadline - time.monotonic()
        order = Order(
            plan=request.plan.to_json(),
            name=request.name,
            batches=tuple(self._indices(request.workload)),
            emulate=request.emulate,
            forecast=request.forecast is not None,
            reference_ms=request.reference_ms,
            timing_seconds=request.timing_seconds,
            stop_slower=request.stop_slower,
            left_seconds=None if left == float("inf") else left,
            hopeless=request.is_hopeless if isinstance(request.is_hopeless, Hopeless) else None,
            drop_only=request.drop_only,
        )
        return self._do_once(Measurement, "evaluate", self._patience(0.0), until=self.last_call, order=as_json(order))

    def give_up(self) -> None:
        """End what it is at, from whatever thread."""
        self.given_up, process = True, self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):  # what was not read yet
                self._requests.close()
            self._answers.close()
            self._ear.join()
            self._process = None

    # underneath

    @contextlib.contextmanager
    def _heard_by(self, tell: Callable[[Progress], None]) -> Iterator[None]:
        """Pass on what the worker tells while it is at something."""
        self._tell, before = tell, self._tell
        try:
            yield
        finally:
            self._tell = before

    def _indices(self, workload: Workload) -> list[int]:
        return [self._numbers[id(batch)] for batch in workload.batches]

    def _patience(self, seconds: float) -> float:
        return max(SILENT_SECONDS, _SILENT_TIMES * max(seconds, self.expected_seconds))

    def _start(self) -> None:
        down, up = os.pipe(), os.pipe()
        command = [sys.executable, "-P", "-m", "autoprec.study.serving", str(down[0]), str(up[1]), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(down[0], up[1]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # what this process can import, the worker can
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
        except OSError as error:
            raise MeasurementError(f"a process to measure in cannot be started: {error.strerror}.") from None
        finally:
            os.close(down[0])
            os.close(up[1])
        self._requests, self._answers = os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb", buffering=0)
        self._pending = b""
        self._written: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        assert self._process.stdout is not None
        self._ear = threading.Thread(target=_listen, args=(self._process.stdout, self._written), daemon=True)
        self._ear.start()

    def _open(self) -> Opened:
        if self._process is None:
            self._start()
        away = None if self._away is None else as_json(self._away)
        asked = {"loading": as_json(self.loading), "threads": self._threads or torch.get_num_threads(), "away": away}
        return self._call(Opened, "open", time.monotonic() + _LOAD_SECONDS, _LOAD_SECONDS, asked)

    def _twice(self, action: Callable[[], T]) -> T:
        """Return what an action returns; where somebody killed the worker over it, of a second one."""
        lost = ""
        for _ in range(2):
            try:
                return action()
            except WorkerLost as error:
                if not error.killed or self.given_up:
                    raise
                lost = str(error)
        raise WorkerLost(
            f"{lost}, twice in a row. What was measured is kept: go on with --resume; where memory lacks, with a "
            "smaller --batch-size or --seq-len.",
            killed=True,
        )

    def _do(self, kind: type[T], what: str, patience: float, **asked: Any) -> T:
        """As `_do_once`, and once more where somebody killed the worker over it."""
        return self._twice(lambda: self._do_once(kind, what, patience, **asked))

    def _do_once(self, kind: type[T], what: str, patience: float, until: float = float("inf"), **asked: Any) -> T:
        """Have a fresh or the same worker do something, and return its answer."""
        if self._process is None:
            if self._open() != self._identity:
                raise MeasurementError(
                    f"{self.loading.model} has other weights or data than when this search began. Begin another with "
                    "--out, or put them back and go on with --resume."
                )
            if what != "look":
                self.first_look()
        return self._call(kind, what, until, patience, asked)

    def _call(self, kind: type[T], what: str, until: float, patience: float, asked: dict[str, Any]) -> T:
        """Ask and wait.

        Args:
            until: as `time.monotonic` counts, when waiting ends at the latest.
            patience: seconds of silence that are waited for.
        """
        begun = time.monotonic()
        self._count += 1
        try:
            with contextlib.suppress(BrokenPipeError):  # its end is met at the answer
                self._requests.write(json.dumps({"id": self._count, "do": what, "with": asked}).encode() + b"\n")
                self._requests.flush()
            while True:
                answer = self._answer(min(until, time.monotonic() + patience), begun)
                if "news" in answer:
                    self._tell(from_json(Progress, answer["news"], what="news"))
                elif "beat" not in answer:
                    break
        except BaseException:  # Ctrl-C too: what it was at is of no use any more
            self.close()
            raise
        if "lost" in answer:
            self.close()
            raise WorkerLost(answer["lost"])
        if "error" in answer:
            raise getattr(errors, answer["error"]["kind"], AutoprecError)(answer["error"]["message"])
        if answer["ends"]:
            self.close()
        found = from_json(kind, answer["done"], what=f"a worker's answer to {what}", error=MeasurementError)
        self.overhead_seconds = time.monotonic() - begun - float(answer["seconds"])
        return found

    def _answer(self, until: float, begun: float) -> dict[str, Any]:
        """Return the next document of the worker.

        Raises:
            WorkerLost: it has ended, or said nothing until then.
        """
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                took = duration_text(time.monotonic() - begun)
                raise WorkerLost(f"no answer after {took}: the worker process hung and was ended")
            chunk = self._answers.read(1 << 16)
            if not chunk:
                raise self._ended()
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> WorkerLost:
        """Say how the process came to its end."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerLost("the worker process has stopped to answer")
        self._ear.join(timeout=1.0)
        if code >= 0:
            last = next((line for line in reversed(self._written) if line.strip()), "nothing said")
            return WorkerLost(f"the worker process ended with code {code}: {last.strip()[:300]}")
        name = signal.Signals(-code).name
        hint = ", as the kernel does where memory lacks" if name == "SIGKILL" else ""
        # others are a crash of its own, which comes again
        return WorkerLost(f"the worker process was ended by {name}{hint}", killed=name in ("SIGKILL", "SIGTERM"))


def _listen(stream: IO[bytes], written: collections.deque[str]) -> None:
    """Keep the last of what a worker writes: the user's own prints, and a crash's last words."""
    with stream:
        for line in stream:
            written.append(line.decode(errors="replace"))
            if os.environ.get("AUTOPREC_DEBUG"):
                sys.stderr.write(written[-1])
