"""Which examples of a classifier are replayed, and what each of them stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprec.probe.readout import Readout, ReadoutKind
from autoprec.probe.selection import Selection, select, thinned


def batches_and_reads() -> tuple[list[dict[str, torch.Tensor]], list[Readout]]:
    """Eight batches of eight examples, of which most are predicted with confidence."""
    generator = torch.Generator().manual_seed(0)
    batches, reads = [], []
    for index in range(8):
        batches.append({"x": torch.arange(8 * index, 8 * index + 8)})
        logits = 3 * torch.randn(8, 1, 1, generator=generator)
        reads.append(Readout(ReadoutKind.BINARY, logits, torch.ones(8, 1, dtype=torch.bool), None))
    return batches, reads


def estimate(chosen: Selection, values: np.ndarray) -> float:
    total = 0.0
    for batch, stands_for in zip(chosen.batches, chosen.stands_for, strict=True):
        assert isinstance(batch, dict)
        total += float((values[batch["x"].numpy()] * stands_for).sum())
    return total


def test_a_selection_is_unbiased_and_holds_what_matters() -> None:
    batches, reads = batches_and_reads()
    p = torch.cat([read.predictions for read in reads]).sigmoid().ravel().double().numpy()
    values = p * (1 - p)
    sums, even = [], []
    for seed in range(400):
        chosen = select(batches, reads, 24, seed)
        assert sum(len(s) for s in chosen.stands_for) in (23, 24, 25)
        sums.append(estimate(chosen, values))
        even.append(estimate(thinned(batches, [np.ones(8) for _ in batches], 24, seed), values))
        drawn = [int(x) for batch in chosen.batches if isinstance(batch, dict) for x in batch["x"]]
        assert drawn == chosen.examples.tolist()
    for found in (sums, even):
        # five standard errors of the mean of 400 draws
        assert np.mean(found) == pytest.approx(values.sum(), abs=5 * float(np.std(found)) / 20)
    assert np.std(sums) < np.std(even) / 3


def test_a_thinned_selection_stands_for_all_of_it() -> None:
    batches, reads = batches_and_reads()
    chosen = select(batches, reads, 40, 0)
    whole = sum(float(s.sum()) for s in chosen.stands_for)
    thin = [thinned(chosen.batches, chosen.stands_for, 10, seed) for seed in range(200)]
    assert all(sum(len(s) for s in t.stands_for) in (10, 11) for t in thin)
    sums = [sum(float(s.sum()) for s in t.stands_for) for t in thin]
    assert np.mean(sums) == pytest.approx(whole, abs=5 * float(np.std(sums)) / len(sums) ** 0.5)
