"""Random directions at the output whose second moment is the Hessian of the drop there.

The Hessian of KL(reference ‖ plan) in the logits is the Fisher matrix F = diag(p) − p pᵀ of the predictions p. The
gradient of the log-likelihood of a label drawn from p has it as its covariance; so has √p ⊙ z − p (√p · z) with random
signs z, whose squares spread less: a confident prediction gives a small direction always, and not a large one now and
then. Of few classes the signs are those of the eigenvectors of F: where two classes are all that matters, nothing is
left to chance. A single logit needs no draw but a sign: ±√(p (1 − p)). For values, random signs give the squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprec.probe.readout import Readout, ReadoutKind

__all__ = ["curvature", "divergence_slope", "draw_direction", "second_order_factor", "spread_of_squares"]

#: more classes than this, and eigenvectors of C by C matrices at each position are no longer little beside a forward
_FEW_CLASSES = 32
#: an eigenvalue below this is the nought of a constant added to all logits
_ROUNDING = 1e-14


def draw_direction(read: Readout, seed: int, turn: int = 0) -> Tensor:
    """Return a direction [B, P, C] in the dtype of the predictions, zero where a position does not count.

    Args:
        turn: how many were drawn with this seed before; of few classes all turns together leave less to chance.
    """
    predictions = read.predictions.detach()
    few = read.kind is ReadoutKind.LOGITS and predictions.shape[-1] <= _FEW_CLASSES
    # a prime, so that no batch of a later turn has the seed of another
    generator = torch.Generator(predictions.device).manual_seed(seed if few else seed + 1_000_003 * turn)
    if read.kind is ReadoutKind.VALUES:
        direction = _signs(predictions, generator)
    elif read.kind is ReadoutKind.BINARY:
        p = predictions.float().sigmoid()
        direction = _signs(p, generator) * (p * (1 - p)).sqrt()
    elif few:
        direction = _eigen_signs(_distribution(predictions, read.counted), generator, turn)
    else:
        p = _distribution(predictions, read.counted)
        direction = p.sqrt() * _signs(p, generator)
        direction -= p * direction.sum(-1, keepdim=True)
    return _where_counted(direction, read)


def _eigen_signs(p: Tensor, generator: torch.Generator, turn: int) -> Tensor:
    """Return Σ ±√λ v over the eigenvectors of the Fisher matrix of distributions [..., C].

    From turn to turn signs change as Walsh's functions do, the largest eigenvalues' first: the product of any two of
    them has as many signs of one kind as of the other, so what two directions have in common cancels.
    """
    wide = p.cpu().double()  # not every device has batches of small eigenproblems, nor FP64
    wide = wide / wide.sum(-1, keepdim=True)  # in FP32 the sum is 1 but for its rounding
    values, vectors = torch.linalg.eigh(torch.diag_embed(wide) - wide[..., :, None] * wide[..., None, :])
    ranks = range(p.shape[-1] - 1, -1, -1)  # eigenvalues rise
    walsh = torch.tensor([1.0 - 2.0 * ((turn & rank).bit_count() % 2) for rank in ranks])
    sizes = torch.where(values > _ROUNDING, values, 0.0).sqrt() * _signs(p, generator).cpu() * walsh
    direction: Tensor = (vectors * sizes[..., None, :]).sum(-1)
    return torch.where(wide > 0, direction, 0.0).to(p)


def curvature(read: Readout) -> Tensor:
    """Return the trace of the divergence's Hessian at each position [B, P] of logits."""
    if read.kind is ReadoutKind.BINARY:
        p = read.predictions.detach().float().sigmoid()
        return torch.where(read.counted, (p * (1 - p))[..., 0], 0.0)
    p = _distribution(read.predictions.detach(), read.counted)
    return torch.where(read.counted, 1 - p.square().sum(-1), 0.0)


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

    It is 0 where an example has a single logit, of which nothing is drawn, and small where it has one distribution.
    """
    if read.predictions.shape[1] > 1 or read.kind is ReadoutKind.VALUES:
        return 2.0
    return 0.0 if read.kind is ReadoutKind.BINARY else 0.5
