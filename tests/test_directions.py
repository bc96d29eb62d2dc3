"""Directions whose second moment is the Hessian of the drop, and the slope of the drop itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoprec.probe.compare import compare
from autoprec.probe.directions import divergence_slope, draw_direction, second_order_factor, spread_of_squares
from autoprec.probe.readout import Readout, ReadoutKind


def readout(kind: ReadoutKind, predictions: Tensor, counted: Tensor | None = None) -> Readout:
    everywhere = torch.ones(predictions.shape[:2], dtype=torch.bool)
    return Readout(kind, predictions, everywhere if counted is None else counted, None)


def shape_of(kind: ReadoutKind) -> tuple[int, int, int]:
    return (2, 3, 1) if kind is ReadoutKind.BINARY else (2, 3, 5)


def drop(kind: ReadoutKind, reference: Tensor, other: Tensor) -> float:
    """Return what `compare` calls the drop, summed over positions (for values: the squared error)."""
    return float(compare(readout(kind, reference), readout(kind, other)).drop.sum())


@pytest.mark.parametrize("kind", ReadoutKind)
@pytest.mark.parametrize("classes", [5, 40])  # signs in the basis of eigenvectors, and of classes
def test_the_second_moment_is_the_curvature_of_the_drop(kind: ReadoutKind, classes: int) -> None:
    shape = (2, 3, classes) if kind is not ReadoutKind.BINARY else shape_of(kind)
    logits = torch.randn(shape)
    error = 1e-3 * torch.randn(shape)
    draws = 4000
    squares = torch.stack(
        [(draw_direction(readout(kind, logits), seed) * error).sum(-1).square().sum() for seed in range(draws)]
    )
    estimate = second_order_factor(kind) * float(squares.double().mean())
    # five standard errors of the mean of the draws
    width = 5 * second_order_factor(kind) * float(squares.double().std()) / draws**0.5
    assert estimate == pytest.approx(drop(kind, logits.double(), (logits + error).double()), abs=width + 1e-10)


def test_a_single_logit_is_not_drawn_but_for_its_sign() -> None:
    logits = torch.tensor([[[0.3]], [[-2.0]]])
    read = readout(ReadoutKind.BINARY, logits)
    sizes = {tuple(draw_direction(read, seed).abs().ravel().tolist()) for seed in range(9)}
    p = logits.sigmoid()
    assert len(sizes) == 1
    assert torch.tensor(sizes.pop()) == pytest.approx((p * (1 - p)).sqrt().ravel())
    assert spread_of_squares(read) == 0.0
    assert spread_of_squares(readout(ReadoutKind.LOGITS, torch.zeros(1, 4, 3))) == 2.0


def test_of_two_classes_nothing_is_drawn_but_a_sign() -> None:
    read = readout(ReadoutKind.LOGITS, torch.tensor([[[0.4, -0.3]], [[2.0, -1.0]]]))
    p = read.predictions.softmax(-1)[..., 0]
    for seed in range(5):
        size = draw_direction(read, seed)[..., 0].abs()
        assert torch.allclose(size, (p * (1 - p)).sqrt(), atol=1e-6)


def test_of_few_classes_all_turns_together_are_the_curvature_exactly() -> None:
    logits, error = torch.randn(3, 2, 6), 1e-3 * torch.randn(3, 2, 6)
    read = readout(ReadoutKind.LOGITS, logits)
    squares = [(draw_direction(read, 7, turn).double() * error).sum(-1).square() for turn in range(8)]
    p = logits.double().softmax(-1)
    bend = (p * error**2).sum(-1) - (p * error).sum(-1) ** 2
    assert torch.allclose(torch.stack(squares).mean(0), bend, rtol=1e-5)
    assert not torch.allclose(squares[0], bend, rtol=1e-2)


def test_a_direction_leaves_the_sum_of_probabilities_alone() -> None:
    direction = draw_direction(readout(ReadoutKind.LOGITS, torch.randn(4, 5, 7)), seed=3)
    # a constant added to all logits changes no prediction, so no direction may see it
    assert float(direction.sum(-1).abs().max()) < 1e-6


def test_what_does_not_count_has_no_direction_whatever_it_holds() -> None:
    logits = torch.randn(2, 3, 5)
    logits[0, 1] = torch.nan
    logits[1, 2] = torch.inf
    counted = torch.ones(2, 3, dtype=torch.bool)
    counted[0, 1] = counted[1, 2] = False
    for kind in (ReadoutKind.LOGITS, ReadoutKind.VALUES):
        direction = draw_direction(readout(kind, logits, counted), seed=0)
        slope = divergence_slope(logits, readout(kind, logits, counted))
        for found in (direction, slope):
            assert bool(found.isfinite().all())
            assert not bool(found[~counted].any())


def test_a_masked_class_stays_out() -> None:
    logits = torch.tensor([[[0.0, -torch.inf, 1.0]]])
    direction = draw_direction(readout(ReadoutKind.LOGITS, logits), seed=0)
    assert float(direction[0, 0, 1]) == 0.0
    assert float(direction.sum()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ReadoutKind)
def test_the_slope_is_that_of_the_drop(kind: ReadoutKind) -> None:
    reference = torch.randn(shape_of(kind))
    here = reference + 0.1 * torch.randn(shape_of(kind))
    towards = torch.randn(shape_of(kind))
    slope = float((divergence_slope(reference, readout(kind, here)).double() * towards).sum())
    step = 1e-4
    ends = [drop(kind, reference.double(), here.double() + s * step * towards) for s in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ReadoutKind)
def test_seeds_give_the_same_direction_again(kind: ReadoutKind) -> None:
    read = readout(kind, torch.randn(shape_of(kind)))
    assert torch.equal(draw_direction(read, 1), draw_direction(read, 1))
    assert not torch.equal(draw_direction(read, 1), draw_direction(read, 2))
