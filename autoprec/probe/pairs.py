"""Pairs of steps, reference and plan, run one after the other on one model.

The order alternates from pair to pair, because a shared machine's speed drifts: only ratios within pairs mean anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoprec.errors import MeasurementError, first_line
from autoprec.probe.batches import Batch, picked
from autoprec.probe.compare import median_ci95
from autoprec.probe.steps import Stepper, device_of, timed
from autoprec.probe.workload import Workload
from autoprec.runtime.attach import Applied

__all__ = ["LONG_STEP_SECONDS", "Pairs", "as_reference", "first_ratio", "one_example", "out_of_memory"]

#: steps longer than this are not repeated without need
LONG_STEP_SECONDS = 2.0
#: an interval of the ratio no wider than this is narrow: two times within 2 % count as the same
_NARROW = 0.02


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds of paired steps, as they come in."""

    reference_s: list[float] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)

    def pair(self, handle: Applied, reference: Callable[[], Any], plan: Callable[[], Any]) -> tuple[Any, Any]:
        """Run and time both sides, the order alternating from pair to pair, and return what they returned."""
        device, results = device_of(handle.model), [None, None]
        for side in (0, 1) if len(self.plan_s) % 2 == 0 else (1, 0):
            if side == 0:
                with as_reference(handle):
                    seconds, results[0] = timed(device, reference)
                self.reference_s.append(seconds)
            else:
                seconds, results[1] = timed(device, plan)
                self.plan_s.append(seconds)
        return results[0], results[1]

    def ratio(self) -> tuple[float, tuple[float, float] | None]:
        """Return the median of reference / plan within pairs, with its interval."""
        return median_ci95(r / p for r, p in zip(self.reference_s, self.plan_s, strict=True))

    def is_narrow(self) -> bool:
        """Say whether more pairs would tell nothing that matters."""
        median, interval = self.ratio()
        return interval is not None and interval[1] - interval[0] <= _NARROW * median


@contextmanager
def as_reference(handle: Applied) -> Iterator[None]:
    """Run a block without the plan; a fault in it is not the plan's, save that memory may lack because of it.

    Raises:
        MeasurementError: the reference cannot be run.
    """
    with handle.suspended():
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) or out_of_memory(error):
                raise
            raise MeasurementError(
                f"the FP32 reference cannot be run: {first_line(error)}. Check that the model takes these batches."
            ) from error


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_ratio(workload: Workload, handle: Applied, batch: Batch) -> float:
    """Return the plan's step time over the reference's, each the smaller of two unless the first was long already."""
    device, sides = device_of(handle.model), []
    for stepper, pause in (
        (Stepper(workload), as_reference(handle)),
        (Stepper(workload, handle.plan.grad_scaler), nullcontext()),
    ):
        with pause:
            seconds = timed(device, partial(stepper.run, batch))[0]
            if seconds < LONG_STEP_SECONDS:  # a short first step is mostly the set-up of kernels: look twice
                seconds = min(seconds, timed(device, partial(stepper.run, batch))[0])
        sides.append(seconds)
    return sides[1] / sides[0]


def one_example(batch: Batch) -> Batch:
    """Return the first example of a batch of named tensors, enough to see that a format is far too slow."""
    if not isinstance(batch, dict):
        return batch
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0}
    if len(sizes) != 1:
        return batch
    return picked(batch, torch.tensor([0]))
