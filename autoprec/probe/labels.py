"""Random directions at the output whose second moment is the Hessian of the drop there.

With labels drawn from the model's own predictions p, the gradient of their log-likelihood has the covariance
diag(p) − p pᵀ, which is the Hessian of KL(reference ‖ plan) in the logits (the Fisher matrix). So half the expected
square of what an error does to that log-likelihood is the drop it causes, to second order. A single logit needs no
draw: ±√(p (1 − p)) has the same second moment and less spread. For values, random signs give the squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprec.probe.readout import Readout, ReadoutKind

__all__ = ["divergence_slope", "draw_direction", "second_order_factor", "spread_of_squares"]


def draw_direction(read: Readout, seed: int) -> Tensor:
    """Return a direction [B, P, C] in the dtype of the predictions, zero where a position does not count."""
    predictions = read.predictions.detach()
    generator = torch.Generator(predictions.device).manual_seed(seed)
    if read.kind is ReadoutKind.VALUES:
        direction = _signs(predictions, generator)
    elif read.kind is ReadoutKind.BINARY:
        p = predictions.float().sigmoid()
        direction = _signs(p, generator) * (p * (1 - p)).sqrt()
    else:
        p = _distribution(predictions, read.counted)
        rows = p.view(-1, p.shape[-1])
        drawn = _draw(rows, generator)
        direction = rows.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype)).view_as(p)
    return _where_counted(direction, read)


def divergence_slope(reference: Tensor, read: Readout) -> Tensor:
    """Return the gradient of the drop in the predictions [B, P, C] of `read`, given the reference's predictions.

    The drop is KL(reference ‖ this), for values the squared error, summed over counted positions.
    """
    predictions = read.predictions.detach()
    if read.kind is ReadoutKind.VALUES:
        slope = 2 * (predictions.float() - reference.float())
    elif read.kind is ReadoutKind.BINARY:
        slope = predictions.float().sigmoid() - reference.float().sigmoid()
    else:
        slope = _distribution(predictions, read.counted).sub_(_distribution(reference, read.counted))
    return _where_counted(slope, read)


def _draw(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one class a row [N, 1] by its cumulated probability; torch.multinomial draws a number for every class."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    cumulated = rows.cumsum(-1, dtype=wide)
    point = torch.rand(rows.shape[0], 1, generator=generator, device=rows.device).to(wide) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, point, right=True).clamp_(max=rows.shape[1] - 1)


def _distribution(logits: Tensor, counted: Tensor) -> Tensor:
    """Return the softmax in FP32; uniform where nothing counts, so that whatever padding holds does no harm."""
    if not bool(counted.all()):
        logits = torch.where(counted[..., None], logits, 0.0)
    return logits.softmax(-1, dtype=torch.float32)


def _where_counted(direction: Tensor, read: Readout) -> Tensor:
    if not bool(read.counted.all()):
        direction = torch.where(read.counted[..., None], direction, 0.0)
    return direction.to(read.predictions.dtype)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(torch.float32) * 2 - 1


def second_order_factor(kind: ReadoutKind) -> float:
    """Return what a mean square is to be multiplied by to be a drop: ½ for a divergence, 1 for a squared error."""
    return 1.0 if kind is ReadoutKind.VALUES else 0.5


def spread_of_squares(read: Readout) -> float:
    """Return the variance, relative to its squared mean, of a square summed over a whole example: 2 for a normal sum.

    It is 0 where an example has a single output whose direction is not drawn at all.
    """
    single = read.kind is ReadoutKind.BINARY and read.predictions.shape[1] == 1
    return 0.0 if single else 2.0
