"""Timing of short work on a device: the wall clock on CPUs, kernels and their launches on CUDA.

A CUDA kernel of some microseconds takes less than launching it does. Kernels alone are timed by events around replays
of a captured graph; launches by the clock, until the last one is out. An eager step waits for whichever is longer (on
an H200 with a slow host BF16 blocks of 0.14 ms of kernels took 0.4 ms, FP8 ones of 0.5 ms 2 ms), so that is what counts
here. What cannot be captured (data-dependent shapes, syncs) is timed with its launches alone, and that is noted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from autoprec.errors import first_line
from autoprec.probe.steps import timed

__all__ = ["Work", "timer_of"]

#: one timing should be long against the clock
_SPAN_SECONDS = 0.002
_MOST_REPEATS = 200
#: runs before a capture, on a stream of its own, as PyTorch asks for
_WARM_UPS = 3
#: runs launched in one go: a queue takes about 1,000 kernels before the host has to wait, a block's FP8 step some 100
_LAUNCHES = 4


class Work(Protocol):
    """Something to be timed again and again."""

    #: whether launching its kernels takes longer than they do
    launch_bound: bool

    def seconds(self) -> float:
        """Return the seconds of one run, over as many as the clock needs."""


Around = Callable[[], AbstractContextManager[Any]]


def timer_of(device: torch.device, notes: list[str]) -> Callable[[Callable[[], Any], Around], Work]:
    """Return what makes `Work` of a function and the context it runs in, which is not timed; it is warmed up."""
    if device.type == "cuda":
        return lambda run, around: _Graph(run, around, torch.cuda, notes)
    return lambda run, around: _Wall(run, around, device)


class _Wall:
    """Runs between two looks at the clock; the device is waited for."""

    launch_bound = False

    def __init__(self, run: Callable[[], Any], around: Around, device: torch.device) -> None:
        self._run, self._around, self._device, self._repeats = run, around, device, 1
        with around():
            self._time()  # sets up kernels, which may be most of it
            self._repeats = _repeats(self._time())

    def seconds(self) -> float:
        with self._around():
            return self._time()

    def _time(self) -> float:
        return timed(self._device, self._runs)[0] / self._repeats

    def _runs(self) -> None:
        for _ in range(self._repeats):
            self._run()


class _Graph:
    """Replays of a captured run between two events, or its launches where they take longer; `cuda` is `torch.cuda`."""

    def __init__(
        self,
        run: Callable[[], Any],
        around: Around,
        cuda: Any,
        notes: list[str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run, self._around, self._cuda, self._clock = run, around, cuda, clock
        self._repeats = 1
        self._replay: Callable[[], Any] | None = None
        with around():
            side = cuda.Stream()
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            cuda.current_stream().wait_stream(side)
            graph = cuda.CUDAGraph()
            try:
                with cuda.graph(graph):
                    run()
                self._replay = graph.replay
            except RuntimeError as error:
                notes.append(f"timed with its launches, since no graph could be captured: {first_line(error)}")
        if self._replay:
            self._repeats = _repeats(self._kernels())
        self.launch_bound = False

    def seconds(self) -> float:
        with self._around():
            self._run()  # the first one under a plan that was just attached takes longer
            launched = self._launched()
        if self._replay is None:
            return launched
        kernels = self._kernels()
        self.launch_bound = launched > kernels
        return max(launched, kernels)

    def _launched(self) -> float:
        """Return the seconds from the first launch of a run to the last one's; with no graph, until all have run."""
        self._cuda.synchronize()
        begun = self._clock()
        for _ in range(_LAUNCHES):
            self._run()
        if self._replay is None:
            self._cuda.synchronize()
        taken = (self._clock() - begun) / _LAUNCHES
        self._cuda.synchronize()
        return taken

    def _kernels(self) -> float:
        assert self._replay is not None
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._repeats):
            self._replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self._repeats


def _repeats(once: float) -> int:
    return min(max(1, math.ceil(_SPAN_SECONDS / max(once, 1e-7))), _MOST_REPEATS)
