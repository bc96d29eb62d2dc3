"""The passes of a probe: as many as the time allowed holds, the second anchor among them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from autoprec.errors import MeasurementError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.batches import batch_tensors, joined
from autoprec.probe.estimation import Scores, predict
from autoprec.probe.passes import Clock, Tally, check_finite, first_bad_unit
from autoprec.probe.readout import Readout
from autoprec.probe.replay import Replayer
from autoprec.probe.sites import Site, find_sites
from autoprec.probe.workload import Workload
from autoprec.quantities import duration_text
from autoprec.records import ModelProfile, Progress
from autoprec.runtime.attach import applied

__all__ = ["Survey"]

#: allowed by default: what so many passes over all batches take, so that a deep model costs no more for each unit than
#: a shallow one; of few units, no more than a share of what measuring them one by one would take
_SWEEPS, _FEW_UNITS, _SHARE = 3.0, 24, 0.11
#: of the time allowed: passes end here, the rest is for direct measurements; and so much is for the second anchor
_PASSES, _ANCHOR = 0.8, 0.15
#: floating-point operations of a forward below which batches are put together
_SMALL_WORK = 4e9
#: a forward and the comparison of its output, over the forward; a pass over the first one, which checks every site
_WITH_COMPARING, _UNCHECKED = 1.3, 0.85
#: relative standard error of a typical unit below which no further pass is made
_ENOUGH = 0.04
_NOTHING_COUNTS = "no position counts: every label is -100 or masked. Give batches with labels to predict."


@dataclass(slots=True, eq=False)
class Survey:
    """Passes over a workload's batches; `tally` holds what they add up to. Call with weights frozen."""

    workload: Workload
    profile: ModelProfile
    modules: dict[str, nn.Module]
    formats: Sequence[Format]
    ambient: Format
    emulate: bool
    clock: Clock
    seed: int
    base: Plan  #: all units in FP32
    tell: Callable[[Progress], None]
    sites: list[Site] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    notes: list[str] = field(default_factory=list)
    #: what one unit in one format would take, measured directly on all batches
    each_seconds: float = 0.0

    def run(self) -> None:
        """Look, pass over the batches once, take the second anchor, and go on until it is enough.

        Raises:
            MeasurementError: the reference is not finite, nothing counts, or the time is too short for one pass.
        """
        self._first_look()
        self._join_small_batches()
        order = list(range(len(self.workload.batches)))
        random.Random(self.seed).shuffle(order)
        replayer, slowest = self._checked_pass(order[0])
        if math.isinf(self.clock.allowed):
            self.clock.allowed = self._allowance(slowest)
        slowest = self._sweep(replayer, order[1:], slowest, 1 - _ANCHOR)
        self._second_anchor(replayer, [i for i in order if i in self.tally.draws], slowest)
        while self.clock.fits(slowest, _PASSES) and not self._is_enough():
            self._sweep(replayer, order, slowest, _PASSES)
        if not any(part.weight.sum() > 0 for part in self.tally.comparisons.values()):
            raise MeasurementError(_NOTHING_COUNTS)
        if len(self.tally.draws) < len(order):
            self.notes.append(f"{len(self.tally.draws)} of {len(order)} batches were replayed in the time allowed")

    def scores(self, choice: Format) -> dict[str, Scores]:
        """Return the scores of all units in a format, by unit."""
        return self.tally.scores(choice, {u.name: str(u.role) for u in self.profile.units})

    @property
    def cut(self) -> frozenset[str]:
        """The units that ran and to which no gradient came back, or which cannot be replayed."""
        seen = {s.unit for s in self.sites}
        return frozenset(u for u in self.tally.ran if u not in self.tally.reached or u not in seen)

    def _first_look(self) -> None:
        """Run the reference on one batch, learn what a step takes, and see that there is something to probe."""
        with torch.no_grad():
            self._reference(0)  # sets up kernels
            begun = time.monotonic()
            read = self._reference(0)
            step = time.monotonic() - begun
            check_finite(read, lambda: first_bad_unit(self.workload, self.workload.batches[0]), 0)
            begun = time.monotonic()
            with applied(self.workload.model, self.base):
                apply = time.monotonic() - begun
        self.each_seconds = (_WITH_COMPARING * step + apply) * len(self.workload.batches)
        least = step * (3 + 2 * len(self.formats))
        if self.clock.elapsed + least > self.clock.allowed:
            raise MeasurementError(
                f"{duration_text(self.clock.allowed)} is too short for one pass: a forward, a backward and a replay in "
                f"{len(self.formats)} formats take about {least:.2g} s here, after {self.clock.elapsed:.2g} s to get "
                f"ready. Allow {math.ceil(self.clock.elapsed + 2 * least)} s or more, or use smaller batches."
            )

    def _allowance(self, checked: float) -> float:
        """Return the seconds allowed from the start on, given what the first pass took, which checks every site."""
        total = _SWEEPS * _UNCHECKED * checked * len(self.workload.batches)
        if len(self.profile.units) < _FEW_UNITS:
            pairs = sum(len([f for f in self.formats if f in u.formats]) for u in self.profile.units)
            total = min(total, _SHARE * pairs * self.each_seconds)
        return self.clock.elapsed - checked + total

    def _reference(self, index: int) -> Readout:
        batch = self.workload.batches[index]
        return self.workload.readout(batch, self.workload.forward(batch))

    def _join_small_batches(self) -> None:
        """Replay small batches together: of a small model most of a pass is the interpreter's work, whatever its rows.

        Not where an output depends on what else is in its batch, as in contrastive models.
        """
        batches = self.workload.batches
        work = 2 * self.profile.parameters * max(self.workload.tokens(batches[0]), 1)
        together = joined(batches, int(_SMALL_WORK / work * len(batch_tensors(batches[0])[0][1])))
        if len(together) == len(batches):
            return
        with torch.no_grad():
            alone = self._reference(0).predictions
            among = self.workload.readout(together[0], self.workload.forward(together[0])).predictions
        alike = alone.shape[1:] == among.shape[1:] and torch.allclose(
            among[: len(alone)], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())
        )
        if alike:
            self.workload = self.workload.with_batches(together)

    def _checked_pass(self, index: int) -> tuple[Replayer, float]:
        """Make the first pass, which replays each site as it ran, too; what keeps state is taken apart, or left out."""
        apart: frozenset[str] = frozenset()
        while True:
            self.sites = find_sites(
                self.profile, self.modules, self.formats, self.ambient, emulated=self.emulate, apart=apart
            )
            replayer = Replayer(self.workload, self.sites, self.modules, self.ambient)
            begun = self.clock.elapsed
            self.tally.draw(replayer, self.workload, index, self.formats, self.seed, check=True)
            took = self.clock.elapsed - begun
            whole = {s.unit for s in self.sites if s.path in self.tally.restless and s.whole}
            if not whole:
                break
            apart |= whole
            self.tally = Tally()
        if apart:
            self.notes.append(f"replayed layer by layer, since they keep state between calls: {_few(sorted(apart))}")
        if self.tally.restless:
            self.sites = [s for s in self.sites if s.path not in self.tally.restless]
            replayer = Replayer(self.workload, self.sites, self.modules, self.ambient)
        return replayer, took

    def _sweep(self, replayer: Replayer, order: Sequence[int], slowest: float, share: float) -> float:
        """Draw each batch once more, as long as there is time; return what the slowest took."""
        seen = 0.0
        for index in order:
            if not self.clock.fits(seen or slowest, share):
                break
            begun = self.clock.elapsed
            self.tally.draw(replayer, self.workload, index, self.formats, self.seed, check=False)
            seen = max(seen, self.clock.elapsed - begun)
        self._say(f"{self.tally.passes} passes made")
        return seen or slowest

    def _second_anchor(self, replayer: Replayer, order: Sequence[int], slowest: float) -> None:
        """Run some batches with every unit low. One costs about as much as a pass for each format."""
        each = slowest * (1 + len(self.formats)) / 2
        room = min(_ANCHOR * self.clock.allowed, self.clock.allowed - self.clock.elapsed)
        count = min(len(order), max(1, len(self.workload.batches) // 4), int(room / each))
        if count < 1:
            self.notes.append("no second anchor: the time allowed is too short for it")
        for index in order[:count]:
            for choice in self.formats:
                self.tally.slope(replayer, self.workload, index, choice)
        self._say("second anchor")

    def _is_enough(self) -> bool:
        errors = sorted(p.sampling for f in self.formats for p in predict(self.scores(f)).values() if p.value > 0)
        return not errors or errors[len(errors) // 2] < _ENOUGH

    def _say(self, message: str) -> None:
        left = max(self.clock.allowed - self.clock.elapsed, 0.0)
        self.tell(Progress(stage="probe", message=message, elapsed_seconds=self.clock.elapsed, eta_seconds=left))


def _few(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
