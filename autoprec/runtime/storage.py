"""How weights are stored while a plan is in force, and giving the old bits back.

| storage | weights of the units it can hold low | what goes with it |
|---|---|---|
| `fp32` | FP32, cast at each use; a plan whose stream is low (`Plan.cast`) holds all low | nothing |
| `bf16` | in the format the unit computes in, BF16 or FP16: no cast at any call | inference only |
| `bf16-master` | BF16; the optimizer holds FP32 copies | `optimizers.MasterWeights` around the optimizer |
| `bf16-stochastic` | BF16, and nothing else | `optimizers.stochastic_adamw` (torchao) |

A weight can be held low where every unit that uses it computes in that format: a head tied to an embedding stays FP32
unless the embedding's values are rounded to the same format. So no result changes by a bit for being stored low.
Experts in 3-D parameters and `nn.MultiheadAttention` stay FP32: autocast does not know all of their products.

The FP32 tensors are kept until the plan is removed or settled: until then the model takes 1.5 times its FP32 memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from autoprec.errors import PlanError
from autoprec.formats import Format, layout
from autoprec.plan import Plan
from autoprec.records import Mode
from autoprec.runtime.emulate import torch_dtype

__all__ = ["LoweredStorage", "Storage", "lower_storage"]

_LOW = (Format.BF16, Format.FP16)


class Storage(StrEnum):
    """How the weights of low units are stored while a plan is in force."""

    FP32 = "fp32"  #: FP32, cast at each use
    BF16 = "bf16"  #: in the unit's own format; for inference
    MASTER = "bf16-master"  #: BF16, with FP32 copies in the optimizer
    STOCHASTIC = "bf16-stochastic"  #: BF16 alone, updates rounded at random


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

    def originals(self) -> dict[Tensor, Tensor]:
        """Return the wide bits of each tensor."""
        return {item.tensor: item.wide for item in self.held}

    def settle(self) -> None:
        """Let the wide bits go: what is stored low stays so."""
        self.held.clear()


def lower_storage(
    model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module], storage: Storage = Storage.FP32
) -> LoweredStorage | None:
    """Return the storage of all FP32 tensors of `model` that are to be held low; None where there are none.

    Raises:
        PlanError: the plan's mode does not go with the storage, or its stream is low already.
    """
    if storage is not Storage.FP32:
        _check(plan, storage)
        chosen = _low_weights(plan, modules, storage)
    elif plan.stream is Format.FP32:
        return None
    else:
        kept = {
            id(t) for u in plan.units if u.format is not plan.stream for n in u.modules for t in modules[n].parameters()
        }
        chosen = [(t, torch_dtype(layout(plan.stream))) for t in _floats(model) if id(t) not in kept]
    return LoweredStorage([_Held(t, t.data, t.data.to(dtype), t._version) for t, dtype in chosen])


def _check(plan: Plan, storage: Storage) -> None:
    if plan.stream is not Format.FP32:
        raise PlanError(f"the plan stores everything in {plan.stream} already; leave storage='{storage}' out")
    inference = storage is Storage.BF16
    if inference is (plan.mode is Mode.TRAIN):
        use = "'bf16-master' or 'bf16-stochastic'" if inference else "'bf16'"
        raise PlanError(
            f"storage='{storage}' is for {'inference' if inference else 'training'}, and the plan was made for mode "
            f"'{plan.mode}'. Use {use}, or leave it out."
        )


def _low_weights(plan: Plan, modules: Mapping[str, nn.Module], storage: Storage) -> list[tuple[Tensor, torch.dtype]]:
    """Return the weights that all their users compute with in one low format, each with its dtype."""
    users: dict[int, set[Format | None]] = {}
    tensors: dict[int, Tensor] = {}
    placed = {name: unit.format for unit in plan.units for name in unit.modules}
    allowed = _LOW if storage is Storage.BF16 else (Format.BF16,)
    for name, module in modules.items():
        choice = placed.get(name)
        simple = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or _is_conv1d(module)
        for tensor in module._parameters.values():
            if tensor is not None:
                tensors[id(tensor)] = tensor
                users.setdefault(id(tensor), set()).add(choice if simple and choice in allowed else None)
    chosen = []
    for key, formats in users.items():
        if len(formats) == 1 and (choice := next(iter(formats))) and tensors[key].dtype is torch.float32:
            chosen.append((tensors[key], torch_dtype(layout(choice))))
    return chosen


def _is_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _floats(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.float32:
            yield tensor
