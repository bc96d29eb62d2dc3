"""Matmul rates per format, and copy bandwidth, measured on a device that is here.

Method: at each size, all formats that run are timed in rounds; the order turns round from one round to the next, so a
drift of the clock or a busy neighbour hits all of them alike. A timing repeats the matmul until it takes some
milliseconds. The rate is the median over rounds, and the comparison with FP32 is the median of the ratios within
rounds, each with a 95 % interval from order statistics (with fewer than six rounds: from the smallest to the largest).
FP32 is timed with TF32 and every other shortcut off. FP8 goes through `torch._scaled_mm`, once per scaling recipe;
its rate leaves out the cost of finding scales and casting, as the others' leave out their casts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from autoprec.errors import first_line
from autoprec.formats import Fp8Family, Fp8Recipe
from autoprec.records import Estimate, Origin

__all__ = [
    "Trial",
    "copy_rate",
    "fault_text",
    "gemm_trials",
    "launch_time",
    "matmuls",
    "median_interval",
    "strict_fp32",
]

#: one timing should be long against the clock and the launch of a kernel
_SPAN_SECONDS = {"cpu": 0.002, "mps": 0.01}
_DEFAULT_SPAN_SECONDS = 0.004
_MAX_ROUNDS = 25
#: values from which on ranks of a binomial are those of a normal distribution, to one; its 97.5 % point
_MANY, _NORMAL_95 = 200, 1.96
#: a matmul far below any launch's time, how often it is launched in a row, and how often that is timed
_SMALL, _LAUNCHES, _LAUNCH_ROUNDS = 64, 200, 10


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to multiply, at one size: its seconds a matmul by round, and FP32's time over its own by round."""

    way: str
    size: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def tflops(self) -> tuple[float, float, float]:
        """Rate in TFLOP/s: median, low, high."""
        return median_interval([2 * self.size**3 / s / 1e12 for s in self.seconds])

    @property
    def gain(self) -> tuple[float, float, float]:
        """How many times FP32's rate: median, low, high."""
        return median_interval(self.ratios)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its distribution-free 95 % interval; below six values, the whole range."""
    ordered = sorted(values)
    low = max(0, _rank(len(ordered)) - 1)
    return statistics.median(ordered), ordered[low], ordered[len(ordered) - 1 - low]


@cache
def _rank(count: int) -> int:
    """Return the largest k with P(Binomial(count, 1/2) < k) <= 2.5 %; of many, by the normal distribution."""
    if count > _MANY:
        return math.floor((count + 1 - _NORMAL_95 * math.sqrt(count)) / 2)
    below, cumulated = 0, 0.0
    while (cumulated := cumulated + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    return below


def matmuls(device: torch.device, family: Fp8Family | None) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Return the ways to multiply that are worth trying, by name; each builds a call for square operands of a size."""
    ways: dict[str, Callable[[int], Callable[[], Any]]] = {
        "fp32": lambda n: _plain(device, n, torch.float32),
        "bf16": lambda n: _plain(device, n, torch.bfloat16),
        "fp16": lambda n: _plain(device, n, torch.float16),
    }
    if device.type == "cuda":
        ways["tf32"] = lambda n: _with_tf32(_plain(device, n, torch.float32))
    if family is not None:
        ways |= {f"fp8-{r}": partial(_scaled, device, family=family, recipe=r) for r in Fp8Recipe}
    return ways


def gemm_trials(
    ways: Mapping[str, Callable[[int], Callable[[], Any]]],
    sizes: Sequence[int],
    device: torch.device,
    seconds: float,
) -> tuple[dict[str, str], list[Trial]]:
    """Time each way at each size within about `seconds`; `ways` must have 'fp32'.

    Returns:
        (the error of each way that does not run, the trials by size). A way that was slower than FP32 at the size
        before, and of which one matmul would take more than an eighth of the time, is not timed at that size.
    """
    failed: dict[str, str] = {}
    trials: list[Trial] = []
    slow: set[str] = set()
    for share, size in zip(_shares(len(sizes)), sizes, strict=True):
        calls: dict[str, Callable[[], Any]] = {}
        for name, build in ways.items():
            if name in failed or name in slow:
                continue
            try:
                calls[name] = build(size)
                calls[name]()
                _wait(device)
            except Exception as fault:  # whatever a backend raises is the answer we look for
                failed[name] = fault_text(fault)
                calls.pop(name, None)
        found = _rounds(calls, device, seconds * share)
        for name, times in found.items():
            ratios = tuple(a / b for a, b in zip(found["fp32"], times, strict=False))
            trials.append(trial := Trial(name, size, tuple(times), ratios))
            if trial.gain[0] < 0.8 and statistics.median(times) * _growth(sizes, size) > seconds / 8:
                slow.add(name)
    return failed, trials


def copy_rate(device: torch.device, seconds: float, *, mebibytes: int = 64) -> Estimate:
    """Return the bandwidth of a large copy in GB/s, reading and writing counted both."""
    source = torch.ones(mebibytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    target.copy_(source)
    _wait(device)
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < _MAX_ROUNDS):
        times.append(_time(lambda: target.copy_(source), 1 if device.type == "cpu" else 20, device))
    middle, low, high = median_interval([2 * source.nbytes / t / 1e9 for t in times])
    return Estimate(middle, low, high, Origin.MEASURED)


def launch_time(device: torch.device) -> Estimate:
    """Return the µs that launching a matmul takes whose kernel takes less: small models' eager steps consist of it."""
    left, right = _operands(device, _SMALL)
    each = [1e6 * _time(lambda: torch.mm(left, right), _LAUNCHES, device) for _ in range(_LAUNCH_ROUNDS)]
    middle, low, high = median_interval(each[1:])  # the first sets the kernel up
    return Estimate(middle, low, high, Origin.MEASURED)


def fault_text(fault: BaseException) -> str:
    """Return an error's name and first line, shortened."""
    text = f"{type(fault).__name__}: {first_line(fault)}"
    return text if len(text) <= 160 else text[:157] + "..."


@contextmanager
def strict_fp32() -> Iterator[None]:
    """Switch off TF32 and the like for FP32 matmuls; the switches are put back on leaving."""
    mkldnn: Any = torch.backends.mkldnn
    switches = [torch.backends.cuda.matmul, mkldnn.matmul]
    kept = [s.fp32_precision for s in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, kept, strict=True):
            switch.fp32_precision = value


def _growth(sizes: Sequence[int], size: int) -> float:
    """Return how many times more work a matmul of the next size is."""
    larger = [s for s in sizes if s > size]
    return (larger[0] / size) ** 3 if larger else 1.0


def _shares(count: int) -> list[float]:
    """Return the shares of the time by size: the largest decides, so it gets most."""
    weights = [2.0**i for i in range(count)]
    return [w / sum(weights) for w in weights]


def _rounds(calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Time all calls in rounds of alternating order until the time is used; at least three rounds.

    What is under half of FP32's rate after three rounds is settled, and leaves the time to the others.
    """
    span = _SPAN_SECONDS.get(device.type, _DEFAULT_SPAN_SECONDS)
    repeats = {name: max(1, math.ceil(span / max(_time(call, 1, device), 1e-7))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    stop = time.perf_counter() + seconds
    for done in range(_MAX_ROUNDS):
        if done >= 3 and time.perf_counter() > stop:
            break
        for name in order:
            times[name].append(_time(calls[name], repeats[name], device))
        order.reverse()
        if done == 2:
            limit = 2 * statistics.median(times["fp32"])
            order = [name for name in order if statistics.median(times[name]) <= limit]
    return times


def _time(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, over `repeats` of them."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _operands(device: torch.device, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random matrices without touching the process's random state."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    return left.to(device), right.to(device)


def _plain(device: torch.device, size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a product as a linear layer makes it: of the rows of both operands."""
    left, right = (t.to(dtype) for t in _operands(device, size))
    return partial(F.linear, left, right)


def _with_tf32(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    return run


def _scaled(device: torch.device, size: int, *, family: Fp8Family, recipe: Fp8Recipe) -> Callable[[], Any]:
    """Return an FP8 matmul of the recipe: E4M3 operands, the second column-major, result in BF16."""
    dtype = torch.float8_e4m3fn if family is Fp8Family.OCP else torch.float8_e4m3fnuz
    left, right = (t.to(dtype) for t in _operands(device, size))
    right = right.t().contiguous().t()
    shapes = ((), ()) if recipe is Fp8Recipe.TENSORWISE else ((size, 1), (1, size))
    scale_left, scale_right = (torch.ones(shape, device=device) for shape in shapes)
    return lambda: torch._scaled_mm(left, right, scale_left, scale_right, out_dtype=torch.bfloat16)
