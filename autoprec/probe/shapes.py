"""Times of units, each by itself: one call of each shape, in every format, formats taking turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from autoprec.formats import Format
from autoprec.probe.breakeven import break_even
from autoprec.probe.calls import Call
from autoprec.probe.clock import Clock
from autoprec.probe.payoff import SETTLED, pays, why_not
from autoprec.probe.rates import median_interval
from autoprec.probe.shapecache import KeptRatio, ShapeCache
from autoprec.probe.sites import in_format
from autoprec.probe.steps import timed
from autoprec.probe.timers import Work, timer_of
from autoprec.records import Estimate, ModelProfile, Origin, UnitTime

__all__ = ["Shape", "time_shapes", "unit_times"]

#: makes what puts a unit into a format
Way = Callable[[], AbstractContextManager[None]]

#: rounds of every shape that are made first
_FIRST_ROUNDS = 4
#: runs below this are timed with all others; and setting up kernels takes no more than this
_SHORT_SECONDS, _LONG_SECONDS = 0.02, 0.5
#: of the time, what rounds may take; the rest is for what does not pay
_ROUNDS_SHARE = 0.8
#: of a step: what all shapes' intervals together may still be off, when it is enough
_ENOUGH = 0.01


@dataclass(slots=True, eq=False)
class Shape:
    """A call that stands for all of its shape, with its seconds by format and round: forward, and both ways.

    `kept`: formats that were timed before, and are not timed again.
    """

    call: Call
    kept: Mapping[Format, KeptRatio]
    works: dict[Format, tuple[Work, Work | None]] = field(default_factory=dict)
    forward: dict[Format, list[float]] = field(default_factory=dict)
    total: dict[Format, list[float]] = field(default_factory=dict)
    #: calls of this shape in a step
    count: int = 0
    #: by format that does not pay: what `break_even` found
    even: dict[Format, tuple[int, bool]] = field(default_factory=dict)

    def round(self, backwards: bool, *only: Format) -> None:
        """Time each format once, or some of them, in one order or the other."""
        order = list(only or self.works)
        for choice in reversed(order) if backwards else order:
            forward, both = self.works[choice]
            self.forward.setdefault(choice, []).append(forward.seconds())
            self.total.setdefault(choice, []).append(both.seconds() if both else self.forward[choice][-1])

    def is_hopeless(self, choice: Format, way: Way, device: torch.device, *, training: bool) -> bool:
        """Say whether a format is long and far slower than FP32, which was timed before; its seconds are kept then.

        A short run is repeated, because the first one sets up kernels; what is short even so is mostly launching, and
        cheap to time as all others. FP16 on CPUs: only the backward tells (a head's took 40 times FP32's).
        """
        if choice is Format.FP32:
            return False
        run = self.call.both if training else self.call.forward
        with way():
            seconds = timed(device, run)[0]
            if _SHORT_SECONDS < seconds < _LONG_SECONDS:
                seconds = min(seconds, timed(device, run)[0])
            if seconds < _SHORT_SECONDS or seconds <= SETTLED * self.total[Format.FP32][0]:
                return False
            self.total[choice] = [seconds]
            self.forward[choice] = [timed(device, self.call.forward)[0] if training else seconds]
        return True

    def ratio(self, choice: Format) -> Estimate:
        """Return the seconds in a format over those in FP32, of the same rounds."""
        if choice in self.kept:
            return self.kept[choice].step
        own, wide = self.total[choice], self.total[Format.FP32]
        middle, low, high = median_interval([a / b for a, b in zip(own, wide, strict=False)])
        return Estimate(middle, low, high, Origin.MEASURED)

    def forward_seconds(self, choice: Format) -> float:
        """Return the seconds of a forward in a format."""
        if choice in self.kept:
            return self.kept[choice].forward * statistics.median(self.forward[Format.FP32])
        return statistics.median(self.forward[choice])

    def is_launch_bound(self, choice: Format) -> bool:
        """Say whether launching its kernels took longer than they did, in the latest round of this probe."""
        forward, both = self.works.get(choice, (None, None))
        work = both or forward
        return work is not None and work.launch_bound

    @property
    def formats(self) -> set[Format]:
        """Formats that something is known of."""
        return {*self.total, *self.kept}

    def found(self) -> dict[Format, KeptRatio]:
        """Return what was found now and is worth keeping."""
        wide = statistics.median(self.forward[Format.FP32])
        ratios = {
            choice: KeptRatio(self.ratio(choice), self.forward_seconds(choice) / wide, self.even.get(choice))
            for choice in self.total
            if choice is not Format.FP32
        }
        return {choice: ratio for choice, ratio in ratios.items() if ratio.is_settled(SETTLED)}

    def doubt(self) -> float:
        """Return by how many seconds of a step this shape may be off, in the format that saves the most of it."""
        wide = statistics.median(self.total[Format.FP32])
        spreads = [r for f in self.works if f is not Format.FP32 and (r := self.ratio(f)).low <= SETTLED]
        return max((self.count * wide * (r.high - r.low) / 2 for r in spreads), default=0.0)


def time_shapes(
    calls: Sequence[Call],
    low: Sequence[Format],
    modules: Mapping[str, nn.Module],
    ambient: Format,
    device: torch.device,
    notes: list[str],
    clock: Clock,
    share: float,
    cache: ShapeCache | None,
    *,
    training: bool,
) -> dict[str, Shape]:
    """Time one call of each shape: all of them some rounds, then those that leave most in doubt while there is time.

    `share` of the time allowed is for that.
    """
    shapes: dict[str, Shape] = {}
    for call in calls:
        known = cache.ratios.get(call.shape, {}) if cache else {}
        kept = {f: known[f] for f in low if f in known and f in call.site.swaps}
        evens = {f: ratio.even for f, ratio in kept.items() if ratio.even}
        shape = shapes.setdefault(call.shape, Shape(call, kept, even=evens))
        shape.count += call.count
    make = timer_of(device, notes)
    for shape in shapes.values():
        ways = _ways(shape.call, modules, ambient)
        for choice in (Format.FP32, *(f for f in low if f in shape.call.site.swaps and f not in shape.kept)):
            if not shape.is_hopeless(choice, ways(choice), device, training=training):
                both = make(shape.call.both, ways(choice)) if training else None
                shape.works[choice] = (make(shape.call.forward, ways(choice)), both)
                shape.round(False, choice)
        for number in range(1, _FIRST_ROUNDS):
            shape.round(number % 2 == 1)
    step = sum(s.count * statistics.median(s.total[Format.FP32]) for s in shapes.values())
    while clock.fits(0.0, _ROUNDS_SHARE * share) and sum(s.doubt() for s in shapes.values()) > _ENOUGH * step:
        most = max(shapes.values(), key=Shape.doubt)
        most.round(len(most.total[Format.FP32]) % 2 == 1)
    until = max(share, clock.elapsed / clock.allowed + (1 - _ROUNDS_SHARE) * share)
    for shape in shapes.values():
        for choice in shape.works:
            if choice is not Format.FP32 and not pays(r := shape.ratio(choice)) and r.low <= SETTLED:
                ways = _ways(shape.call, modules, ambient)
                wide = statistics.median(shape.total[Format.FP32])
                found = break_even(
                    shape.call, choice, make, ways, partial(clock.fits, 0.0, until), wide, training=training
                )
                shape.even |= {choice: found} if found else {}
    if cache and (fault := cache.keep({name: shape.found() for name, shape in shapes.items()})):
        notes.append(fault)
    return shapes


def _ways(call: Call, modules: Mapping[str, nn.Module], ambient: Format) -> Callable[[Format], Way]:
    """Return by format what puts a call's unit into it; in FP32 it runs as in the reference."""

    def way(choice: Format) -> Way:
        wide = choice is Format.FP32
        return contextlib.nullcontext if wide else partial(in_format, call.site, choice, modules, ambient)

    return way


def unit_times(
    profile: ModelProfile,
    calls: Sequence[Call],
    shapes: Mapping[str, Shape],
    low: Sequence[Format],
    device: torch.device,
    tokens: int,
    *,
    training: bool,
) -> Iterator[UnitTime]:
    """Yield a row for each unit and format: the sum over its sites, each as its shape was timed."""
    for unit in profile.units:
        own = [(shapes[call.shape], call) for call in calls if call.site.unit == unit.name]
        for choice in (Format.FP32, *low):
            if not own or not all(choice in shape.formats for shape, _ in own):
                continue
            wide = [call.count * statistics.median(shape.total[Format.FP32]) for shape, call in own]
            ratios = [shape.ratio(choice) for shape, _ in own]
            value, lower, upper = (
                sum(w * end for w, end in zip(wide, ends, strict=True)) / sum(wide)
                for ends in zip(*((r.value, r.low, r.high) for r in ratios), strict=True)
            )
            both = 1e3 * value * sum(wide)
            forward = 1e3 * sum(c.count * s.forward_seconds(choice) for s, c in own)
            ratio = Estimate(value, lower, upper, Origin.MEASURED)
            even = own[0][0].even.get(choice) if len(own) == 1 else None
            bound = any(shape.is_launch_bound(choice) for shape, _ in own)
            yield UnitTime(
                unit=unit.name,
                format=choice,
                shape=" + ".join(sorted({call.shape for _, call in own})),
                forward_ms=min(forward, both) if training else both,
                backward_ms=max(both - forward, 0.0) if training else None,
                ratio=ratio,
                reason=None
                if choice is Format.FP32
                else why_not(profile, unit, choice, ratio, device, even, tokens, launch_bound=bound),
            )
