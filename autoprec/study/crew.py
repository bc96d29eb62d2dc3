"""The workers of a search, each with a thread that waits for it; the search itself stays in one thread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

from autoprec.study.worker import Worker

__all__ = ["Crew"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Crew(Generic[K, T]):
    """Hands tasks to workers that are free, and results back as they come; without workers all is done at once, here.

    Use it as a context: left by an error or Ctrl-C, it ends what its workers are at.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._idle: list[Worker | None] = list(workers) or [None]
        self.size = len(self._idle)
        self._workers = workers
        # one worker is asked from this thread, which Ctrl-C reaches
        self._pool = ThreadPoolExecutor(self.size) if self.size > 1 else None
        self._going: dict[Future[T], tuple[K, Worker | None]] = {}

    @property
    def free(self) -> bool:
        """Whether a task can be begun."""
        return bool(self._idle)

    def begin(self, task: Callable[[Worker | None], T], key: K) -> None:
        """Have a free worker do a task, which is told apart by its key."""
        worker = self._idle.pop(0)
        if self._pool is None:
            future: Future[T] = Future()
            future.set_result(task(worker))
        else:
            future = self._pool.submit(task, worker)
        self._going[future] = key, worker

    def next(self) -> tuple[K, T]:
        """Wait for a task to end; return its key and its result, or raise what it raised."""
        future = next(iter(wait(self._going, return_when=FIRST_COMPLETED).done))
        key, worker = self._going.pop(future)
        self._idle.append(worker)
        return key, future.result()

    def __enter__(self) -> Crew[K, T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            for worker in self._workers:
                worker.give_up()
        self._pool.shutdown(cancel_futures=True)
