"""How far a plan's gradient is from the reference's, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprec.probe.pairs import as_reference
from autoprec.probe.steps import gradients
from autoprec.probe.workload import Workload
from autoprec.runtime.attach import Applied

__all__ = ["GradientError", "gradient_error"]


@dataclass(frozen=True, slots=True)
class GradientError:
    """‖g_plan − g_ref‖² / ‖g_ref‖² of the whole gradient; the limit is a tenth of the reference's own variance between
    batches over the same size. None with a reason where there is no such figure.
    """

    error: float | None
    limit: float | None
    reason: str | None


def gradient_error(workload: Workload, handle: Applied, count: int) -> GradientError:
    """Measure it on the first `count` batches of a workload, the plan's gradient beside the reference's."""
    error = size = 0.0
    first: list[Tensor] | None = None
    between = 0.0
    batches = workload.batches[:count]
    for batch in batches:
        with as_reference(handle):
            reference = gradients(workload, batch)
        found = gradients(workload, batch, handle.plan.grad_scaler)
        error += _squared_distance(found, reference)
        size += _squared_distance(reference, None)
        if first is None:
            first = reference
        else:
            # for two batches this is their unbiased variance; more are taken as pairs with the first
            between += _squared_distance(reference, first) / 2
    if not torch.tensor(error).isfinite():
        return GradientError(None, None, "the gradient is not finite at the initial loss scale")
    if size == 0.0:
        return GradientError(None, None, "the reference's gradient is zero")
    limit = 0.1 * between / (len(batches) - 1) / (size / len(batches)) if len(batches) > 1 else None
    return GradientError(error / size, limit, None)


def _squared_distance(a: list[Tensor], b: list[Tensor] | None) -> float:
    pairs: Iterator[Tensor] = (x - y for x, y in zip(a, b, strict=True)) if b is not None else iter(a)
    # .double() per tensor would double the memory of the largest; norms are summed in FP64 instead
    return float(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in pairs))
