"""Watching one step of a model with a plan in force: what each unit's layers hand on, and what gradients come back.

For each leaf the largest |result|, for each gradient that arrives at a result its largest |value| and the part of it
that lies under the format's normal range. Largest values are of every element, because one is enough to overflow;
shares are of at most 256 rows, evenly spaced. Nothing waits for the device before `readings` is called.

Not seen: what happens between the layers of a unit (attention scores, products with a gate), but by what comes of it.
Compiled models run eagerly while they are watched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.formats import Format, Fp8Recipe, NumberFormat, layout
from autoprec.plan import Plan, PlanUnit

__all__ = ["Reading", "Watch"]

#: rows of a gradient that are looked at for shares
_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was seen of a unit in one step; infinite where a value was not finite, None where no gradient came."""

    unit: str
    format: Format
    largest_output: float
    largest_gradient: float | None
    underflow: float | None  #: part of the gradient's sum of |values| in values under the normal range of the format
    overflow: float | None  #: share of the gradient's values over the format's largest, after scaling
    order: int  #: when its first value that was not finite came, counted over the layers run


@dataclass(eq=False, slots=True)
class _Seen:
    """Tensors still on the device, one entry a call."""

    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    gradients: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class Watch:
    """Hooks on the leaves of a plan's units, for the length of a `with` block."""

    def __init__(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        self._plan, self._modules = plan, modules
        self._seen = {unit.name: _Seen() for unit in plan.units}
        self._calls = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not call the hooks
            for unit in self._plan.units:
                for name in unit.modules:
                    handle = self._modules[name].register_forward_hook(self._look(unit))
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def readings(self) -> tuple[Reading, ...]:
        """Return what was seen of each unit that ran; waits for the device once.

        Where processes train together each gets the largest of all, so that all come to the same decision.
        """
        ran = [(unit, seen) for unit in self._plan.units if (seen := self._seen[unit.name]).outputs]
        return tuple(_reading(unit, *row) for (unit, _), row in zip(ran, _rows([s for _, s in ran]), strict=True))

    def _look(self, unit: PlanUnit) -> Callable[[nn.Module, Any, Any], None]:
        seen, recipe = self._seen[unit.name], self._plan.fp8_recipe
        values = layout(unit.format, gradient=True, recipe=recipe or Fp8Recipe.TENSORWISE)
        scaled = recipe if unit.format is Format.FP8 else None

        def back(gradient: Tensor) -> None:
            seen.gradients.append(_looked_at(gradient.detach(), values, scaled))

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
                seen.outputs.append((self._calls, _largest(result.detach())))
                self._calls += 1
                if result.requires_grad:
                    result.register_hook(back)

        return hook


def _largest(x: Tensor) -> Tensor:
    """Return max |x|, infinite where x is not finite; one pass without a copy.

    Two million values take 0.23 ms on one core so; the norm that says the same takes 5.6 (torch 2.13), |x| and its
    largest 0.65.
    """
    least, most = torch.aminmax(x)
    return torch.maximum(-least, most).float().nan_to_num(nan=math.inf, posinf=math.inf)


def _looked_at(gradient: Tensor, values: NumberFormat, recipe: Fp8Recipe | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return max |gradient|, the share of its sum of |values| under the normal range, and of its count over the top."""
    largest = _largest(gradient)
    rows = gradient.reshape(-1, gradient.shape[-1]) if gradient.dim() else gradient.reshape(1, 1)
    size = rows[:: math.ceil(len(rows) / _ROWS)].float().abs()
    smallest: float | Tensor = values.smallest_normal
    if recipe is not None:  # FP8 is scaled so that the largest value stands at the format's maximum
        top = size.amax(1, keepdim=True) if recipe is Fp8Recipe.ROWWISE else largest
        smallest = values.smallest_normal * top / values.max
    over = ~(size <= values.max) if recipe is None else ~size.isfinite()
    finite = size.nan_to_num(nan=0.0, posinf=0.0)
    # a share of the sum and not of the count: a head's gradient has thousands of tiny values that make no difference
    under = (finite * (finite < smallest)).sum() / finite.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return largest, under, over.float().mean()


def _rows(seen: list[_Seen]) -> Iterator[tuple[float, ...]]:
    """Yield largest output, order, largest gradient, underflow and overflow of each; -1 where there was no gradient."""
    if not seen:
        return
    never = math.inf
    rows = []
    for entry in seen:
        outputs = torch.stack([value for _, value in entry.outputs])
        calls = torch.tensor([float(call) for call, _ in entry.outputs], device=outputs.device)
        # as a negative number, so that the largest over all processes is the earliest
        first = torch.where(outputs.isinf(), -calls, -never).amax()
        gradient = [torch.stack(values).amax() for values in zip(*entry.gradients, strict=True)]
        rows.append(torch.stack([outputs.amax(), first, *(gradient or 3 * [outputs.new_tensor(-1.0)])]))
    table = torch.stack(rows)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX)
    yield from map(tuple, table.tolist())


def _reading(unit: PlanUnit, largest: float, first: float, gradient: float, under: float, over: float) -> Reading:
    return Reading(
        unit=unit.name,
        format=unit.format,
        largest_output=largest,
        largest_gradient=None if gradient < 0 else gradient,
        underflow=None if gradient < 0 else under,
        overflow=None if gradient < 0 else over,
        order=-1 if math.isinf(first) else int(-first),
    )
