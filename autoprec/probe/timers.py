"""Timing of short work on a device: the wall clock on CPUs, events around replayed graphs on CUDA.

A CUDA kernel of some microseconds takes less than launching it does, so its launches are captured once as a graph and
replayed; what cannot be captured (data-dependent shapes, syncs) is launched again each time, and that is noted.
"""

from __future__ import annotations

import math
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


class Work(Protocol):
    """Something to be timed again and again."""

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
    """Replays of a captured run between two events; `cuda` is `torch.cuda`."""

    def __init__(self, run: Callable[[], Any], around: Around, cuda: Any, notes: list[str]) -> None:
        self._cuda, self._around, self._repeats = cuda, around, 1
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
                self._replay: Callable[[], Any] = graph.replay
                self._captured = True
            except RuntimeError as error:
                notes.append(f"timed with its launches, since no graph could be captured: {first_line(error)}")
                self._replay, self._captured = run, False
            once = self._time()
        self._repeats = _repeats(once)

    def seconds(self) -> float:
        if self._captured:
            return self._time()
        with self._around():
            return self._time()

    def _time(self) -> float:
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._repeats):
            self._replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self._repeats


def _repeats(once: float) -> int:
    return min(max(1, math.ceil(_SPAN_SECONDS / max(once, 1e-7))), _MOST_REPEATS)
