"""Times of units, each by itself: one call of each shape, in every format, formats taking turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from autoprec.formats import Format
from autoprec.probe.calls import Call
from autoprec.probe.clock import Clock
from autoprec.probe.payoff import why_not
from autoprec.probe.rates import median_interval
from autoprec.probe.sites import in_format
from autoprec.probe.timers import Work, timer_of
from autoprec.records import Estimate, ModelProfile, Origin, UnitTime

__all__ = ["SETTLED", "Shape", "time_shapes", "unit_times"]

#: a format this many times slower than FP32 after a first run is settled
SETTLED = 3.0
#: rounds of every shape that are made first
_FIRST_ROUNDS = 4
#: of a step: what all shapes' intervals together may still be off, when it is enough
_ENOUGH = 0.01


@dataclass(slots=True, eq=False)
class Shape:
    """A call that stands for all of its shape, with its seconds by format and round: forward, and both ways."""

    call: Call
    works: dict[Format, tuple[Work, Work | None]] = field(default_factory=dict)
    forward: dict[Format, list[float]] = field(default_factory=dict)
    total: dict[Format, list[float]] = field(default_factory=dict)
    #: calls of this shape in a step
    count: int = 0

    def round(self, backwards: bool) -> None:
        """Time each format once, in one order or the other."""
        order = list(self.works)
        for choice in reversed(order) if backwards else order:
            forward, both = self.works[choice]
            self.forward.setdefault(choice, []).append(forward.seconds())
            self.total.setdefault(choice, []).append(both.seconds() if both else self.forward[choice][-1])

    def settle(self) -> None:
        """Time no longer what is far slower than FP32."""
        for choice in list(self.works):
            if self.ratio(choice).value > SETTLED:
                del self.works[choice]

    def ratio(self, choice: Format) -> Estimate:
        """Return the seconds in a format over those in FP32, of the same rounds."""
        own, wide = self.total[choice], self.total[Format.FP32]
        middle, low, high = median_interval([a / b for a, b in zip(own, wide, strict=False)])
        return Estimate(middle, low, high, Origin.MEASURED)

    def doubt(self) -> float:
        """Return by how many seconds of a step this shape may be off, in the format that saves the most of it."""
        wide = statistics.median(self.total[Format.FP32])
        spreads = [self.ratio(f) for f in self.works if f is not Format.FP32]
        return max((self.count * wide * (r.high - r.low) / 2 for r in spreads), default=0.0)


def time_shapes(
    calls: Sequence[Call],
    low: Sequence[Format],
    modules: Mapping[str, nn.Module],
    ambient: Format,
    notes: list[str],
    clock: Clock,
    *,
    training: bool,
) -> dict[str, Shape]:
    """Time one call of each shape: all of them some rounds, then those that leave most in doubt while there is time."""
    shapes: dict[str, Shape] = {}
    for call in calls:
        shape = shapes.setdefault(call.shape, Shape(call))
        shape.count += call.count
    for shape in shapes.values():
        make = timer_of(next(shape.call.site.module.parameters()).device, notes)
        for choice in (Format.FP32, *(f for f in low if f in shape.call.site.swaps)):
            around = partial(_in_format, shape.call, choice, modules, ambient)
            shape.works[choice] = (
                make(shape.call.forward, around),
                make(shape.call.both, around) if training else None,
            )
        shape.round(False)
        shape.settle()
    for number in range(1, _FIRST_ROUNDS):
        for shape in shapes.values():
            shape.round(number % 2 == 1)
    step = sum(s.count * statistics.median(s.total[Format.FP32]) for s in shapes.values())
    while clock.elapsed < clock.allowed and sum(s.doubt() for s in shapes.values()) > _ENOUGH * step:
        most = max(shapes.values(), key=Shape.doubt)
        most.round(len(most.total[Format.FP32]) % 2 == 1)
    return shapes


@contextlib.contextmanager
def _in_format(call: Call, choice: Format, modules: Mapping[str, nn.Module], ambient: Format) -> Iterator[None]:
    """Put a call's unit into a format; in FP32 it runs as in the reference."""
    with contextlib.nullcontext() if choice is Format.FP32 else in_format(call.site, choice, modules, ambient):
        yield


def unit_times(
    profile: ModelProfile,
    calls: Sequence[Call],
    shapes: Mapping[str, Shape],
    low: Sequence[Format],
    device: torch.device,
    *,
    training: bool,
) -> Iterator[UnitTime]:
    """Yield a row for each unit and format: the sum over its sites, each as its shape was timed."""
    for unit in profile.units:
        own = [(shapes[call.shape], call) for call in calls if call.site.unit == unit.name]
        for choice in (Format.FP32, *low):
            if not own or not all(choice in shape.total for shape, _ in own):
                continue
            wide = [call.count * statistics.median(shape.total[Format.FP32]) for shape, call in own]
            ratios = [shape.ratio(choice) for shape, _ in own]
            value, lower, upper = (
                sum(w * end for w, end in zip(wide, ends, strict=True)) / sum(wide)
                for ends in zip(*((r.value, r.low, r.high) for r in ratios), strict=True)
            )
            both = 1e3 * value * sum(wide)
            forward = 1e3 * sum(c.count * statistics.median(s.forward[choice]) for s, c in own)
            ratio = Estimate(value, lower, upper, Origin.MEASURED)
            yield UnitTime(
                unit=unit.name,
                format=choice,
                shape=" + ".join(sorted({call.shape for _, call in own})),
                forward_ms=min(forward, both) if training else both,
                backward_ms=max(both - forward, 0.0) if training else None,
                ratio=ratio,
                reason=None if choice is Format.FP32 else why_not(profile, unit, choice, ratio, device),
            )
