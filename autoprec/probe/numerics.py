"""What formats do to activations and gradients: ranges, what is lost at their ends, and how far weight gradients turn.

A unit's weight gradient is computed again in each format from the same input and the same incoming gradient. What a
unit's error does to the gradients of other units, through what it hands on, is not in these figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from autoprec.formats import FP16, Format, Fp8Recipe, NumberFormat, layout
from autoprec.probe.batches import Batch
from autoprec.probe.replay import floats
from autoprec.probe.sites import Site, in_format
from autoprec.probe.workload import Workload
from autoprec.records import ModelProfile, UnitNumerics

__all__ = ["GradientNumerics", "gradient_numerics", "watched"]

#: room left above the largest gradient seen: other batches have larger ones
_HEADROOM = 8.0
_LARGEST_SCALE = 2.0**24


@contextmanager
def watched(profile: ModelProfile, modules: Mapping[str, nn.Module], largest: dict[str, float]) -> Iterator[None]:
    """Note for each unit the largest |value| that goes into or comes out of any of its layers, within a block."""

    def look(unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for value in floats((args, kwargs, output)):
                if value.numel():
                    largest[unit] = max(largest.get(unit, 0.0), float(value.detach().abs().amax()))

        return hook

    handles = [
        modules[name].register_forward_hook(look(unit.name), with_kwargs=True)
        for unit in profile.units
        for name in unit.modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Sums:
    """Of one unit in one format: weight gradients compared, and values of the incoming gradient counted."""

    distance: float = 0.0
    product: float = 0.0
    size: float = 0.0
    own_size: float = 0.0
    values: int = 0
    under: int = 0
    over: int = 0


@dataclass(frozen=True, slots=True)
class GradientNumerics:
    """Per unit and format, and the loss scale at which the largest gradient seen keeps clear of FP16's maximum."""

    rows: tuple[UnitNumerics, ...]
    loss_scale: float | None


def gradient_numerics(
    workload: Workload,
    profile: ModelProfile,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    formats: Sequence[Format],
    ambient: Format,
    batch: Batch,
) -> GradientNumerics:
    """Run one training step's forward and backward on a batch and replay every unit's backward in each format.

    FP16 gradients are taken at the loss scale that is suggested. Call inside `kept_state`: weights get gradients.

    Raises:
        DataError: there is nothing to train towards.
    """
    run = _Run(profile, modules, formats, ambient)
    run.handles = [site.module.register_forward_hook(run.tap(site), with_kwargs=True) for site in sites]
    try:
        with torch.enable_grad():
            loss = workload.training_loss(batch, workload.forward(batch))
        # two passes: the scale must be known before gradients are replayed in FP16
        loss.backward(retain_graph=True)
        run.scale = run.suggested(workload.model)
        whole = sum(_size(p.grad) for p in workload.model.parameters() if p.grad is not None)
        for parameter in workload.model.parameters():
            parameter.grad = None
        loss.backward()
    finally:
        for handle in run.handles:  # hooks and nodes of the graph hold each other
            handle.remove()
    return GradientNumerics(tuple(run.rows(whole)), run.scale)


@dataclass(slots=True, eq=False)
class _Run:
    profile: ModelProfile
    modules: Mapping[str, nn.Module]
    formats: Sequence[Format]
    ambient: Format
    scale: float | None = None
    largest: float = 0.0
    replaying: bool = False
    sums: dict[tuple[str, Format], _Sums] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def tap(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs = [value for value in floats(output) if value.requires_grad]
            if self.replaying or not outputs:
                return
            # copies: some models change in place what a block was given
            held = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, (args, kwargs))
            arrived = partial(self._arrived, site, held)
            self.handles.append(register_multi_grad_hook(outputs, arrived, mode="all"))

        return hook

    def _arrived(self, site: Site, held: Any, grads: Sequence[Tensor | None]) -> None:
        found = [g for g in grads if g is not None]
        if self.scale is None:
            for g in found:
                self.largest = max(self.largest, float(g.abs().amax()) if g.numel() else 0.0)
            return
        exact = self._weight_gradients(site, held, grads, None, 1.0)
        for choice in self.formats:
            if choice not in site.swaps:
                continue
            sums = self.sums.setdefault((site.unit, choice), _Sums())
            scale = self.scale if choice is Format.FP16 else 1.0
            for g in found:
                _count(sums, g * scale, layout(choice, gradient=True, recipe=Fp8Recipe.TENSORWISE))
            low = self._weight_gradients(site, held, grads, choice, scale)
            for a, b in zip(exact, low, strict=True):
                sums.distance += _size(a - b)
                sums.product += float((a.double() * b.double()).sum())
                sums.size += _size(a)
                sums.own_size += _size(b)

    def _weight_gradients(
        self, site: Site, held: Any, grads: Sequence[Tensor | None], choice: Format | None, scale: float
    ) -> list[Tensor]:
        """Return the unit's weight gradients at a site, in FP32 and unscaled."""
        names = self.profile.unit(site.unit).modules if site.whole else (site.path,)
        weights = [p for name in names for p in self.modules[name].parameters(recurse=False) if p.requires_grad]
        if not weights:
            return []
        self.replaying = True
        around = in_format(site, choice, self.modules, self.ambient) if choice else nullcontext()
        try:
            with torch.enable_grad(), around:
                output = site.module(*held[0], **held[1])
        finally:
            self.replaying = False
        pairs = [
            (y, (g * scale).to(y.dtype))
            for y, g in zip([v for v in floats(output) if v.requires_grad], grads, strict=False)
            if g is not None
        ]
        found = torch.autograd.grad([y for y, _ in pairs], weights, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(w) if g is None else g.float() / scale for w, g in zip(weights, found, strict=True)]

    def suggested(self, model: nn.Module) -> float:
        """Return a power of two that keeps the largest gradient below FP16's maximum, with room."""
        weights = [float(p.grad.abs().amax()) for p in model.parameters() if p.grad is not None and p.grad.numel()]
        largest = max([self.largest, *weights], default=0.0)
        if not 0 < largest < math.inf:
            return 1.0
        return min(max(2.0 ** math.floor(math.log2(FP16.max / (_HEADROOM * largest))), 1.0), _LARGEST_SCALE)

    def rows(self, whole: float) -> list[UnitNumerics]:
        return [
            UnitNumerics(
                unit=unit,
                format=choice,
                grad_error=_finite(s.distance / whole) if s.size > 0 and whole > 0 else None,
                cosine=_finite(s.product / math.sqrt(s.size * s.own_size)) if s.size > 0 and s.own_size > 0 else None,
                underflow=s.under / max(s.values, 1),
                overflow=s.over / max(s.values, 1),
            )
            for (unit, choice), s in self.sums.items()
        ]


def _count(sums: _Sums, gradient: Tensor, numbers: NumberFormat) -> None:
    """Count the non-zero values of a gradient that round to 0 or pass the largest; FP8 is scaled to its maximum."""
    size = gradient.abs().float()
    if numbers.bits == 8 and size.numel() and float(size.amax()) > 0:
        size = size * (numbers.max / float(size.amax()))
        size.clamp_(max=numbers.max)
    present = size > 0
    sums.values += int(present.sum())
    sums.under += int((present & (size <= numbers.smallest_subnormal / 2)).sum())
    sums.over += int((size > numbers.max).sum())


def _size(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
