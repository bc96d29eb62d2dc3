"""One call of every site of a model, to be made again by itself: what goes in, and how often a step makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from autoprec.probe.batches import Batch
from autoprec.probe.replay import floats
from autoprec.probe.sites import Site
from autoprec.probe.workload import Workload
from autoprec.records import ModelProfile

__all__ = ["Call", "record_calls"]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The first call of a site in a step, and how many there are; calls of one `shape` take the same time."""

    site: Site
    args: Any
    kwargs: Any
    count: int
    shape: str
    #: gradients of the results, drawn once: along equal ones a softmax has none but rounding errors
    slopes: list[Tensor] = field(default_factory=list)

    def forward(self) -> Any:
        """Make the call again."""
        return self.site.module(*self.args, **self.kwargs)

    def both(self) -> Any:
        """Make the call and its backward: gradients of what went in and of the site's parameters."""
        output = self.forward()
        results = [value for value in floats(output) if value.requires_grad]
        given = [v for v in tree_flatten((self.args, self.kwargs))[0] if isinstance(v, Tensor) and v.requires_grad]
        wanted = [*given, *(p for p in self.site.module.parameters() if p.requires_grad)]
        if not results or not wanted:
            return output
        if not self.slopes:
            generator = torch.Generator().manual_seed(0)
            self.slopes.extend(torch.randn(r.shape, generator=generator).to(r.device) for r in results)
        slopes = [slope.to(r.dtype) for slope, r in zip(self.slopes, results, strict=True)]
        with torch.autocast(results[0].device.type, enabled=False):  # as a step has it: the forward alone is in a plan
            return torch.autograd.grad(results, wanted, slopes, allow_unused=True)


def record_calls(
    workload: Workload,
    batch: Batch,
    sites: Sequence[Site],
    profile: ModelProfile,
    modules: Mapping[str, nn.Module],
    *,
    gradients: bool,
) -> list[Call]:
    """Run one batch and return the first call of each site that ran.

    Args:
        gradients: keep which inputs ask for gradients.
    """
    firsts: dict[int, tuple[Any, Any]] = {}
    counts = [0] * len(sites)

    def tap(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            counts[index] += 1
            if index not in firsts:
                firsts[index] = tree_map(keep, (args, kwargs))

        return hook

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    handles = [s.module.register_forward_pre_hook(tap(i), with_kwargs=True) for i, s in enumerate(sites)]
    try:
        with torch.set_grad_enabled(gradients):
            workload.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    leaves = {unit.name: unit.modules for unit in profile.units}
    return [
        Call(site, *firsts[i], counts[i], _shape(site, leaves[site.unit], firsts[i], modules))
        for i, site in enumerate(sites)
        if i in firsts
    ]


def _shape(site: Site, leaves: Sequence[str], given: Any, modules: Mapping[str, nn.Module]) -> str:
    """Return all that a call's time depends on: classes, the unit's weights, and what goes in."""
    own = sorted(
        f"{type(modules[leaf]).__name__}{[list(p.shape) for p in modules[leaf].parameters(recurse=False)]}"
        for leaf in leaves
        if leaf == site.path or not site.path or leaf.startswith(f"{site.path}.")
    )
    inner = sum(p.numel() for p in site.module.parameters())
    inputs = [f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else "" for v in tree_flatten(given)[0]]
    return f"{type(site.module).__name__} {inner} {own} {inputs}"
