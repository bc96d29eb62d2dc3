"""Device kernels of a step by name, and the units that launched them.

PyTorch's profiler links a kernel to the operator that launched it, and a backward operator to the sequence number of
the autograd node it evaluates. Ranges around the leaves of units, opened by hooks on no module, say whose it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity

from autoprec.records import KernelRow

__all__ = ["kernel_rows", "kernels_of", "unit_ranges"]

_RANGE = "autoprec unit: "


def kernels_of(step: Callable[[], Any], owners: Mapping[int, str]) -> tuple[KernelRow, ...]:
    """Run a step under the profiler and return its CUDA kernels, longest first.

    Args:
        step: forward and backward.
        owners: unit of each leaf, by the leaf's `id`.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        with unit_ranges(owners):
            step()
        torch.cuda.synchronize()
    return kernel_rows(profile.events() or ())


@contextmanager
def unit_ranges(owners: Mapping[int, str]) -> Iterator[None]:
    """Open a named range of the profiler around every call of a unit's leaf."""
    opened: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in owners:
            opened.append(torch.profiler.record_function(_RANGE + owners[id(module)]))
            opened[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in owners:
            opened.pop().__exit__(None, None, None)

    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kernel_rows(events: Iterable[Any]) -> tuple[KernelRow, ...]:
    """Return the kernels of profiler events (`FunctionEvent`), summed up by unit and name, longest first."""
    ordered = sorted(events, key=lambda event: event.time_range.start)
    # the latest operator that starts with a sequence number is the one whose node got it
    nodes = {e.sequence_nr: unit for e in ordered if e.sequence_nr >= 0 and (unit := _range(e)) is not _ENGINE}
    sums: dict[tuple[str | None, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in ordered:
        for kernel in event.kernels:
            entry = sums[_owner(event, nodes), kernel.name]
            entry[0] += 1
            entry[1] += kernel.duration / 1e3  # microseconds
    rows = [KernelRow(unit=unit, name=name, calls=int(n), ms=ms) for (unit, name), (n, ms) in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.ms))


_ENGINE = "autograd::engine"


def _range(event: Any) -> str | None:
    """Return the unit whose range an event is in; None outside units, the engine's name in a backward pass."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return str(event.name.removeprefix(_RANGE))
        if event.name.startswith(_ENGINE):
            return _ENGINE
        event = event.cpu_parent
    return None


def _owner(event: Any, nodes: Mapping[int, str | None]) -> str | None:
    unit = _range(event)
    if unit is not _ENGINE:
        return unit
    while not event.name.startswith(_ENGINE):
        event = event.cpu_parent
    return nodes.get(event.sequence_nr)
