"""Optimizers for weights that are stored in BF16: FP32 master copies around any optimizer, or stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoprec.errors import DeviceError

__all__ = ["MasterWeights", "stochastic_adamw"]


class MasterWeights(Optimizer):
    """An optimizer whose 16-bit parameters have FP32 copies, which it updates and then rounds into the parameters.

    The copies take 4 bytes a parameter. The weights of a layer that runs once a step take the same steps, bit for bit,
    as FP32 weights that are cast at each use: a gradient stored in BF16 is what the cast would have given. Where
    gradients are accumulated, or a table is looked up several times, sums are rounded to BF16 as they grow.

    Args:
        params: as for any optimizer: parameters, or groups of them.
        originals: `Applied.originals`, the FP32 bits that parameters had before they were stored low. They become the
            copies, at no further memory, and `remove()` gives the trained copies back. Without them copies start from
            the rounded weights.
        make: makes the optimizer that does the work, such as `torch.optim.AdamW`.
        options: passed to `make`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        make: Callable[..., Optimizer] = torch.optim.AdamW,
        originals: Mapping[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self._originals = originals or {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._inner = make(
            [group | {"params": [self._master(p) for p in group["params"]]} for group in groups], **options
        )
        super().__init__(groups, self._inner.defaults)
        # schedulers write the learning rate into the groups
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update({key: value for key, value in inner.items() if key != "params"})

    def _master(self, parameter: Tensor) -> Tensor:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        wide = self._originals.get(parameter)
        master = (parameter.detach().float() if wide is None else wide.detach()).requires_grad_()
        self._pairs.append((parameter, master))
        return master

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the copies by the parameters' gradients and round them into the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({key: value for key, value in own.items() if key != "params"})
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._inner.step()
        for parameter, master in self._pairs:
            parameter.copy_(master)
            master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the copies."""
        return self._inner.state_dict() | {"masters": [master.detach().clone() for _, master in self._pairs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        state = dict(state_dict)
        masters = state.pop("masters")
        self._inner.load_state_dict(state)
        with torch.no_grad():
            for (parameter, master), saved in zip(self._pairs, masters, strict=True):
                master.copy_(saved)
                parameter.copy_(master)
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update({key: value for key, value in inner.items() if key != "params"})


def stochastic_adamw(params: Iterable[Any], **options: Any) -> Optimizer:
    """Return torchao's AdamW whose updates of BF16 weights are rounded up or down at random, right on average.

    It is compiled by torch.compile at its first step. Its learning rate is a tensor; schedulers of torch write into it.

    Raises:
        DeviceError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise DeviceError("stochastic rounding needs torchao; pip install 'autoprec[fp8]'")
    from torchao.optim import _AdamW

    made: Optimizer = _AdamW(params, bf16_stochastic_round=True, **options)
    return made
