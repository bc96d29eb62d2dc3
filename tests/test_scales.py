"""Examples replayed apart from their batch keep its scale, and what other units of a block gave stands meanwhile."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import bert_classifier
from torch import Tensor

from autoprec import Workload, probe_units
from autoprec.formats import Format
from autoprec.probe.batches import joined, picked
from autoprec.probe.directions import draw_direction
from autoprec.probe.readout import Readout
from autoprec.probe.replay import Effects, Replayer, frozen, repeatable
from autoprec.probe.scales import BatchScales, batch_scales, largest_inputs
from autoprec.probe.sites import Site, find_sites
from autoprec.runtime.fp8 import KeptScale
from autoprec.runtime.identity import canonical_modules

FORMATS = [Format.BF16, Format.FP8]


def workload() -> Workload:
    """A classifier on two batches, of which each has an example with larger values than the others."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(3, 32, (4, 12), generator=generator), "attention_mask": torch.ones(4, 12).long()}
        for _ in range(2)
    ]
    return Workload(bert_classifier(labels=2).eval(), batches, mode="infer", task="classification")


def replayer_of(given: Workload, sites: list[Site]) -> Replayer:
    return Replayer(given, sites, canonical_modules(given.model), Format.BF16)


def sites_of(given: Workload) -> list[Site]:
    modules = canonical_modules(given.model)
    return find_sites(probe_units(given.model), modules, FORMATS, Format.BF16, emulated=True)


def first_less_second(read: Readout) -> Tensor:
    """Return the same direction for every example."""
    return torch.tensor([1.0, -1.0]).expand_as(read.predictions)


def amax_of(kept: KeptScale, x: Tensor) -> list[float]:
    amax = kept.amax(x)
    assert amax is not None
    return amax.tolist()


def squares(effects: Effects) -> dict[tuple[str, Format], Tensor]:
    return {key: whole.square() for key, whole in effects.wholes.items()}


def test_batches_put_together_are_scaled_each_by_itself() -> None:
    given = workload()
    sites = sites_of(given)
    replayer, together = replayer_of(given, sites), joined(given.batches, 8)[0]
    scales = batch_scales([], [4, 4], np.arange(8), [8])[0]
    assert scales.parts == (4, 4)
    with repeatable(given.model), frozen(given.model):
        apart = [replayer.run(batch, [Format.FP8], first_less_second)[0].wholes for batch in given.batches]
        kept, plain = (
            replayer.run(together, [Format.FP8], first_less_second, scales=s)[0].wholes for s in (scales, BatchScales())
        )
    off = {"kept": 0.0, "plain": 0.0}
    for key in apart[0]:
        whole = torch.cat([part[key] for part in apart])
        for name, found in (("kept", kept), ("plain", plain)):
            off[name] = max(off[name], float((found[key] - whole).abs().max() / whole.abs().max()))
    # products of other row counts are summed in another order, which moves a rounding here and there
    assert off["kept"] < 0.05 < 0.5 < off["plain"]


def test_examples_taken_out_keep_the_scale_of_their_batch() -> None:
    given = workload()
    sites, modules = sites_of(given), canonical_modules(given.model)
    replayer, batch = replayer_of(given, sites), given.batches[0]
    with torch.no_grad(), largest_inputs(sites, modules, 4) as found:
        given.forward(batch)
    scales = batch_scales([found], [4], np.array([1, 2]), [2])[0]
    assert scales.parts == (2,) and len(scales.largest) > 4
    first = next(leaf for leaf in scales.largest if leaf.endswith("query"))
    own, of_batch = scales.largest[first]
    assert own.max() <= of_batch[0] == found[first].max()
    kept = scales.of(first)
    assert kept is not None
    x = torch.zeros(2, 12, 8)
    x[:, 0, 0] = own
    assert amax_of(kept, x) == of_batch.tolist()  # what went in is known
    x[0, 0, 0] *= 1.5
    assert amax_of(kept, x) == [float(x.max())] * 2  # it is not inside a unit
    with repeatable(given.model), frozen(given.model):
        some = picked(batch, torch.tensor([1, 2]))
        whole = squares(replayer.run(batch, FORMATS, lambda read: draw_direction(read, 0))[0])
        part = squares(replayer.run(some, FORMATS, lambda read: draw_direction(read, 0), scales=scales)[0])
    for key in whole:
        if key[0].endswith("attention") and key[1] is Format.BF16:
            assert part[key].tolist() == pytest.approx(whole[key][1:3].tolist(), rel=0.05)


def test_what_other_units_in_a_block_gave_stands() -> None:
    """BERT's feed-forward layers stand in a block beside its attention."""
    given = workload()
    sites = sites_of(given)
    assert any(site.kept for site in sites)
    plain = [dataclasses.replace(site, kept=()) for site in sites]
    with repeatable(given.model), frozen(given.model):
        for anchor in (None, Format.BF16):
            short, long = (
                squares(
                    replayer_of(given, found).run(
                        given.batches[0], [Format.BF16], lambda read: draw_direction(read, 0), anchor=anchor
                    )[0]
                )
                for found in (sites, plain)
            )
            ffn = next(key for key in short if key[0].endswith("ffn"))
            if anchor is None:
                assert all(torch.equal(short[key], long[key]) for key in short)
            else:  # run again, the attention would be without the anchor's error, and its lack be laid to the FFN
                assert not torch.equal(short[ffn], long[ffn])
