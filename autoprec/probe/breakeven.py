"""From which batch on a format pays at a unit where it does not at the batch given: the unit itself, with more rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoprec.formats import Format
from autoprec.probe.calls import Call
from autoprec.probe.pacing import SAME
from autoprec.probe.replay import floats
from autoprec.probe.timers import Work

__all__ = ["break_even"]

#: batches looked at, as multiples of the one given
_TIMES = (2, 4, 8, 16, 32)
#: rounds at each, and the longest call in FP32 that is looked at: what takes longer is not too small
_ROUNDS, _LONG_SECONDS = 3, 0.1


def break_even(
    call: Call,
    choice: Format,
    make: Callable[[Callable[[], Any], Callable[[], AbstractContextManager[Any]]], Work],
    around: Callable[[Format], Callable[[], AbstractContextManager[Any]]],
    has_time: Callable[[], bool],
    fp32_seconds: float,
    *,
    training: bool,
) -> tuple[int, bool] | None:
    """Return the first multiple of the batch at which a format is faster than FP32 by more than noise.

    With False: the largest multiple tried, at which it was not faster either. None: nothing could be tried, for want
    of time, because the call is long as it is, or because its inputs cannot be repeated.

    Args:
        make: times a function in a context, as `timer_of` gives it.
        around: the context that puts the unit into a format.
        fp32_seconds: what the call takes in FP32 as it is.
    """
    tried = None
    if not floats((call.args, call.kwargs)):  # a lookup multiplies nothing, at any size
        return None
    for times in _TIMES:
        if not has_time() or times * fp32_seconds > _LONG_SECONDS:
            break
        longer = _repeated(call, times)
        run = longer.both if training else longer.forward
        try:
            works = {f: make(run, around(f)) for f in (Format.FP32, choice)}
            seconds = {f: min(work.seconds() for _ in range(_ROUNDS)) for f, work in works.items()}
        except RuntimeError:  # a module that knows its batch, or memory that ends
            break
        if seconds[choice] * SAME < seconds[Format.FP32]:
            return times, True
        tried = times, False
    return tried


def _repeated(call: Call, times: int) -> Call:
    """Return the call with every tensor that has the batch's first dimension repeated along it."""
    rows = next((v.shape[0] for v in floats((call.args, call.kwargs)) if v.dim()), None)

    def longer(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            return value
        with torch.no_grad():
            return value.repeat(times, *(1 for _ in value.shape[1:])).requires_grad_(value.requires_grad)

    return dataclasses.replace(call, args=tree_map(longer, call.args), kwargs=tree_map(longer, call.kwargs), slopes=[])
