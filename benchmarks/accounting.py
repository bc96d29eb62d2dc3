"""What a real step holds: tensors kept for the backward, and every allocation of the CPU allocator.

Both are counts of PyTorch itself, no formulas: `torch.autograd.graph.saved_tensors_hooks` names each tensor that
autograd keeps, and the profiler's memory events are the allocator's own, scratch space inside operators included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

__all__ = ["Kept", "kept_tensors", "peak_bytes", "storage_bytes"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A storage kept for the backward."""

    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    node: str


def kept_tensors(forward: Callable[[], Any], owned: Iterable[Tensor]) -> list[Kept]:
    """Return the storages that autograd keeps after `forward`, each once, those of `owned` tensors excluded."""
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found: dict[int, tuple[Kept, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in known and pointer not in found:
            kept = Kept(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), storage.nbytes(), "")
            found[pointer] = (kept, tensor.detach())  # held, so that no pointer is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return [kept for kept, _ in found.values()]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the most bytes that a step holds above what was allocated before it."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for _, size in sorted(events, key=lambda pair: pair[0]):
        held += size
        highest = max(highest, held)
    return highest
