"""Storing a model's tensors in the stream's format, as `model.to(dtype)` does, and giving the old bits back.

Plans whose residual stream is lower than FP32 hold their weights so. Leaves of units that compute in another
format keep their FP32 weights. The FP32 tensors are kept until the plan is removed: for the life of the handle
the model takes 1.5 times its FP32 memory (its saving in activations and traffic is real all the same).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprec.formats import layout
from autoprec.plan import Plan
from autoprec.runtime.emulate import torch_dtype

__all__ = ["LoweredStorage", "lower_storage"]


@dataclass(eq=False, slots=True)
class _Held:
    """One tensor with its two sets of bits; `version` is its write count when one of them was last put in place."""

    tensor: Tensor
    wide: Tensor
    low: Tensor
    version: int

    def place(self, data: Tensor) -> None:
        gradient, self.tensor.grad = self.tensor.grad, None
        self.tensor.data = data
        if gradient is not None:
            self.tensor.grad = gradient.to(data.dtype)
        self.version = self.tensor._version

    def written(self, placed: Tensor) -> bool:
        """Say whether the tensor was written to, or given other storage, since `placed` was put in place."""
        return self.tensor._version != self.version or self.tensor.data_ptr() != placed.data_ptr()


@dataclass(eq=False)
class LoweredStorage:
    """The tensors a plan stores low, to be switched between their two forms."""

    held: list[_Held] = field(default_factory=list)

    def replaced(self, model: nn.Module) -> str | None:
        """Return the name of a tensor that stands in the model where one of these stood; None where all still do."""
        here = {id(t) for t in (*model.parameters(), *model.buffers())}
        if all(id(item.tensor) in here for item in self.held):
            return None
        known = {id(item.tensor) for item in self.held}
        return next((name for name, p in model.named_parameters() if id(p) not in known), "a parameter")

    def lower(self) -> None:
        """Put the low bits in place."""
        for item in self.held:
            if item.written(item.wide):  # trained or loaded while the plan was off
                item.wide = item.tensor.data
                item.low = item.wide.to(item.low.dtype)
            item.place(item.low)

    def restore(self) -> None:
        """Put the wide bits back; elements that changed while low come back as what they became."""
        for item in self.held:
            if item.written(item.low):
                item.low = item.tensor.data
                same = item.low == item.wide.to(item.low.dtype)
                item.wide.copy_(torch.where(same, item.wide, item.low.to(item.wide.dtype)))
            item.place(item.wide)


def lower_storage(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> LoweredStorage:
    """Return the storage of all FP32 tensors of `model` that the plan holds in its stream's format."""
    kept = {
        id(tensor)
        for unit in plan.units
        if unit.format is not plan.stream
        for name in unit.modules
        for tensor in modules[name].parameters()
    }
    dtype = torch_dtype(layout(plan.stream))
    floats = (t for t in _floats(model) if id(t) not in kept)
    return LoweredStorage([_Held(t, t.data, t.data.to(dtype), t._version) for t in floats])


def _floats(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.float32:
            yield tensor
