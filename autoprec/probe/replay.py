"""One forward and one backward of the reference with every unit replayed in other formats on the way.

At each site (see `sites`) the forward keeps what went in and what came out, y. In the backward, where g, the gradient
of the output's direction (see `labels`), arrives at y, the site runs again in a format on the same input, and
a = g · (y_format − y) is what the format does to that direction, by position. Nothing is kept but the sums of a:
memory is that of one backward, the inputs of the sites, and one replay.

A second anchor is a run in which every unit's error is added to its output: then the gradient is taken where the
low-precision run really is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from autoprec.formats import Format
from autoprec.probe.batches import Batch
from autoprec.probe.readout import Readout
from autoprec.probe.scales import BatchScales
from autoprec.probe.sites import Site, in_format
from autoprec.probe.workload import Workload
from autoprec.runtime.switches import FAST_ATTENTION_OFF
from autoprec.runtime.target import products_in_fp32

__all__ = ["Effects", "Key", "Replayer", "floats", "frozen", "repeatable"]

#: replayed as it ran, a site must give its own result again, up to the order of parallel sums
_SAME = 1e-5
#: a batch as given
_OWN = BatchScales()

Key = tuple[str, Format]


@dataclass(slots=True)
class Effects:
    """What formats did to the direction, per (unit, format): sums over positions by example [B], in FP64.

    `squares` sums a² over positions (of all layers of a unit and all its calls at a position), `wholes` is the sum of
    a over everything in an example. `lost` are units whose format gave what is not finite.
    """

    squares: dict[Key, Tensor] = field(default_factory=dict)
    wholes: dict[Key, Tensor] = field(default_factory=dict)
    #: sums of a⁴: how few positions carry the squares
    fourths: dict[Key, Tensor] = field(default_factory=dict)
    lost: set[Key] = field(default_factory=set)
    #: units whose sites ran, and those the gradient came back to
    ran: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    #: sites that did not give their own result again: they keep state
    restless: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of a site: its inputs, its float results, and the versions of both as they were.

    `inside`: what modules that stay as they ran gave in this call, by path.
    """

    site: Site
    args: Any
    kwargs: Any
    results: list[Tensor]
    versions: list[tuple[Tensor, int]]
    inside: Mapping[str, list[Any]]

    def written(self) -> bool:
        return any(tensor._version != version for tensor, version in self.versions)


class Replayer:
    """Runs batches of a workload with taps on its sites; the model is left as it was."""

    def __init__(
        self, workload: Workload, sites: Sequence[Site], modules: Mapping[str, nn.Module], ambient: Format
    ) -> None:
        self.workload, self.sites, self.modules, self.ambient = workload, sites, modules, ambient
        self._copied: set[str] = set()  # sites whose inputs or results are changed in place after the call
        self._sums: dict[Key, dict[tuple[int, ...], Tensor]] = {}  # by shape of what a layer gives
        self._waiting: list[RemovableHandle] = []
        self._replaying = False
        self._scales = _OWN

    def run(
        self,
        batch: Batch,
        formats: Sequence[Format],
        direction: Callable[[Readout], Tensor],
        *,
        anchor: Format | None = None,
        check: bool = False,
        scales: BatchScales = _OWN,
    ) -> tuple[Effects, Readout]:
        """Return what `formats` do to the direction at the output of one batch, and that output.

        Args:
            direction: from the readout to a gradient of the predictions' shape; may raise.
            anchor: the format whose errors are added at every unit; None: the reference itself.
            check: replay every site as it ran, too, and name those that do not give the same.
            scales: where the examples come from.
        """
        self._scales = scales
        try:
            while True:
                effects, calls, read = self._forward(batch, formats, anchor, check)
                written = {call.site.path for call in calls if call.written()} - self._copied
                if not written:
                    break
                self._copied |= written
                self._forget()
            slope = direction(read)
            if read.predictions.requires_grad:
                # of the very tensor that a backward begins at, a hook on several tensors is told nothing
                read.predictions.view_as(read.predictions).backward(slope)
            _sum_up(effects, self._sums, read.counted.shape[0])
        finally:
            self._forget()
        return effects, dataclasses.replace(read, predictions=read.predictions.detach())

    def _forget(self) -> None:
        """Let go of the graph: hooks and nodes hold each other, and only the garbage collector would part them."""
        for handle in self._waiting:
            handle.remove()
        self._waiting, self._sums = [], {}

    def _forward(
        self, batch: Batch, formats: Sequence[Format], anchor: Format | None, check: bool
    ) -> tuple[Effects, list[_Call], Readout]:
        effects, calls = Effects(), list[_Call]()
        self._sums = {}
        gave: dict[str, list[Any]] = {path: [] for site in self.sites for path in site.kept}
        begun: dict[str, dict[str, int]] = {}  # how often each had given, when the call of a site began

        def enter(site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any) -> None:
                if not self._replaying:
                    begun[site.path] = {path: len(gave[path]) for path in site.kept}

            return hook

        def tap(site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if self._replaying:
                    return None
                effects.ran.add(site.unit)
                inside = {path: gave[path][begun[site.path][path] :] for path in site.kept}
                call = self._tapped(site, args, kwargs, output, inside)
                calls.append(call)
                if call.results:
                    sources, output = _sources(output)
                    arrived = partial(self._arrived, effects, call, formats=formats, check=check)
                    self._waiting.append(register_multi_grad_hook(sources, arrived, mode="all"))
                    output = self._shifted(call, output, anchor)
                if site.path in gave:
                    gave[site.path].append(tree_map(self._keeper(site, call.versions), output))
                return output

            return hook

        handles = [site.module.register_forward_hook(tap(site), with_kwargs=True) for site in self.sites]
        handles += [site.module.register_forward_pre_hook(enter(site)) for site in self.sites if site.kept]
        try:
            with torch.enable_grad():
                raw = self.workload.forward(batch)
                return effects, calls, self.workload.readout(batch, raw)
        finally:
            for handle in handles:
                handle.remove()

    def _tapped(self, site: Site, args: Any, kwargs: Any, output: Any, inside: Mapping[str, list[Any]]) -> _Call:
        held: list[tuple[Tensor, int]] = []
        keep = self._keeper(site, held)
        kept_args, kept_kwargs = tree_map(keep, args), tree_map(keep, kwargs)
        results = [keep(value) for value in floats(output)]
        return _Call(site, kept_args, kept_kwargs, results, held, inside)

    def _keeper(self, site: Site, held: list[tuple[Tensor, int]]) -> Callable[[Any], Any]:
        """Return what cuts a value from the graph and notes its version in `held`, or copies it."""
        copy = site.path in self._copied

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if copy:
                return value.detach().clone()
            held.append((value, value._version))
            return value.detach()

        return keep

    def _shifted(self, call: _Call, output: Any, anchor: Format | None) -> Any:
        """Return the output with the anchor's error added, which no gradient sees."""
        if anchor is None or anchor not in call.site.swaps:
            return output
        low = self._replay(call, anchor)
        if not all(bool(x.isfinite().all()) for x in low):
            return output
        moved = iter([(x - y).to(y.dtype) for x, y in zip(low, call.results, strict=True)])
        flat, tree = tree_flatten(output)
        return tree_unflatten([v + next(moved) if _is_float(v) else v for v in flat], tree)

    def _replay(self, call: _Call, choice: Format | None) -> list[Tensor]:
        """Run a site again on what went in, in a format, or as it ran (None); return its float results in FP32."""
        self._replaying = True
        around = (
            in_format(call.site, choice, self.modules, self.ambient, self._scales.of)
            if choice
            else contextlib.nullcontext()
        )
        try:
            # hooks of a backward run outside of the modes that are on where it was called
            with torch.no_grad(), products_in_fp32(), around, self._standing(call.inside):
                output = call.site.module(*call.args, **call.kwargs)
        finally:
            self._replaying = False
        return [value.float() for value in floats(output)]

    @contextlib.contextmanager
    def _standing(self, inside: Mapping[str, list[Any]]) -> Iterator[None]:
        """Let modules give again, call by call, what they gave, without running."""
        own = {path: vars(self.modules[path]).get("forward") for path in inside}
        for path, given in inside.items():
            vars(self.modules[path])["forward"] = partial(_next_of, iter(given))
        try:
            yield
        finally:
            for path, forward in own.items():
                if forward is None:
                    del vars(self.modules[path])["forward"]
                else:
                    vars(self.modules[path])["forward"] = forward

    def _arrived(
        self, effects: Effects, call: _Call, grads: Sequence[Tensor | None], formats: Sequence[Format], check: bool
    ) -> None:
        unit = call.site.unit
        effects.reached.add(unit)
        if check and not _same(self._replay(call, None), call.results):
            effects.restless.add(call.site.path)
            return
        feature = 1 if isinstance(call.site.module, nn.modules.conv._ConvNd) else -1
        for choice in formats:
            if choice not in call.site.swaps:
                continue
            low = self._replay(call, choice)
            sums = self._sums.setdefault((unit, choice), {})
            for g, x, y in zip(grads, low, call.results, strict=True):
                if g is None:
                    continue
                error = (x - y).mul_(g)  # not in place: a module may hand on what it was given
                effect = _by_example(error, feature)
                if not bool(effect.isfinite().all()):
                    effects.lost.add((unit, choice))
                shape = tuple(effect.shape)
                sums[shape] = sums[shape] + effect if shape in sums else effect


def _next_of(given: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    return next(given)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def floats(output: Any) -> list[Tensor]:
    """Return the floating tensors in nested containers, scalars left out."""
    return [value for value in tree_flatten(output)[0] if _is_float(value)]


def _sources(output: Any) -> tuple[list[Tensor], Any]:
    """Return the float tensors of an output as parts of a graph; where there is none yet, it begins here.

    Parameters are frozen, so the first sites of a model give what no gradient would come back to.
    """
    flat, tree = tree_flatten(output)
    sources: list[Tensor] = []
    for index, value in enumerate(flat):
        if _is_float(value):
            if not value.requires_grad:
                flat[index] = value.detach().requires_grad_().clone()  # a leaf itself could not be changed in place
            sources.append(flat[index])
    return sources, tree_unflatten(flat, tree)


def _same(again: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    for x, y in zip(again, results, strict=False):
        if x.shape != y.shape:
            return False
        limit = _SAME * float(y.abs().amax()) if y.numel() else 0.0
        if not bool(((x - y).abs() <= limit).all()):
            return False
    return len(again) == len(results)


def _by_example(error: Tensor, feature: int) -> Tensor:
    """Sum over features: [rows, ..., C] to [rows, positions] in FP64."""
    if error.dim() == 1:
        error = error[:, None]
    if error.device.type == "mps":  # which has no FP64
        summed = error.sum(feature).cpu().double()
    else:
        summed = error.sum(feature, dtype=torch.float64)
    return summed.reshape(summed.shape[0], -1) if summed.dim() > 1 else summed[:, None]


def _sum_up(effects: Effects, sums: Mapping[Key, Mapping[tuple[int, ...], Tensor]], examples: int) -> None:
    """Bring every unit's effects to examples; rows that are no multiple of them count as one whole."""
    for key, by_shape in sums.items():
        squares = torch.zeros(examples, dtype=torch.float64)
        whole = torch.zeros(examples, dtype=torch.float64)
        fourth = torch.zeros(examples, dtype=torch.float64)
        for effect in by_shape.values():
            rows = _rows(effect.cpu(), examples)
            square = rows.square()
            squares += square.sum(1)
            fourth += square.square().sum(1)
            whole += rows.sum(1)
        effects.squares[key], effects.wholes[key], effects.fourths[key] = squares, whole, fourth


def _rows(effect: Tensor, examples: int) -> Tensor:
    """Return effects [rows, positions] as [examples, positions]."""
    rows, positions = effect.shape
    if rows != examples and positions == examples:
        return effect.t()  # time first, as nn.Transformer has it
    if rows % examples == 0:
        return effect.reshape(examples, -1)
    spread = torch.zeros(examples, effect.numel(), dtype=effect.dtype)
    spread[0] = effect.reshape(-1)
    return spread


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of weights for the length of a block."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Let every module give the same when it runs again, for the length of a block.

    Models of Transformers keep no keys and values: a block replayed would find its own in the cache. Packed layers of
    bitsandbytes do not repack their weights for a CPU kernel that has no backward, which nothing would undo. PyTorch's
    encoder layers do not take their fast path without gradients, on which no scope runs.
    """
    undo: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for owner, name in ((getattr(module, "config", None), "use_cache"), (module, "support_avx512bf16_for_cpu")):
            if owner is not None and getattr(owner, name, False):
                undo.append((owner, name, getattr(owner, name)))
                setattr(owner, name, False)
    try:
        with FAST_ATTENTION_OFF:
            yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)
