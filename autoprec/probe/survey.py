"""The passes of a probe: as many as the time allowed holds, the second anchor among them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autoprec.errors import MeasurementError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.batches import Batch, batch_rows, joined, separable
from autoprec.probe.clock import Clock
from autoprec.probe.compare import Comparison, compare
from autoprec.probe.directions import draw_direction
from autoprec.probe.estimation import Scores, predict
from autoprec.probe.numerics import watched
from autoprec.probe.pairs import one_example
from autoprec.probe.passes import Tally, check_finite, first_bad_unit
from autoprec.probe.readout import Readout
from autoprec.probe.replay import Replayer
from autoprec.probe.scales import batch_scales, largest_inputs
from autoprec.probe.selection import Selection, has_one_output, select, thinned
from autoprec.probe.sites import Site, find_sites
from autoprec.probe.workload import Workload
from autoprec.quantities import duration_text
from autoprec.records import ModelProfile, Progress
from autoprec.report.grouping import few
from autoprec.runtime.attach import applied

__all__ = ["Survey", "pass_forwards"]

#: allowed by default: what so many passes over all batches take, so that a deep model costs no more for each unit than
#: a shallow one; of few units, no more than a share of what measuring them one by one would take
_SWEEPS, _FEW_UNITS, _SHARE = 4.0, 24, 0.12
#: of the time allowed: passes end here, and the rest is for direct measurements, where it holds one at all; and so much
#: is for the second anchor
_PASSES, _ALL, _ANCHOR = 0.85, 0.98, 0.1
#: floating-point operations of a forward below which batches are put together
_SMALL_WORK = 2e9
#: in forwards: a pass without replays, and a replay in one format (MiniLM: 2.1 to 2.8, and 0.8 to 1.1 as the mean of
#: bf16 and an emulated format)
_GRADIENT, _REPLAY = 2.5, 1.0
#: a forward with one unit in another format over the plain one; and from what share of it on what is done around it
#: is not small
_WITH_CASTS, _MUCH_AROUND = 1.05, 0.1
#: relative standard error of a typical unit below which no further pass is made
_ENOUGH = 0.04
#: examples chosen are thinned where time is short by more than a slack, once a share of them was replayed from which
#: the pace can be told (by the first batch alone a probe on a busy machine was seen to keep 29 of 81)
_TELLING, _SLACK = 0.2, 1.1
#: of a classifier: below this a selection says too little
_FEWEST_EXAMPLES = 48
_NOTHING_COUNTS = "no position counts: every label is -100 or masked. Give batches with labels to predict."


def pass_forwards(formats: int) -> float:
    """Return about how many forwards a pass takes: one, a backward, and replays in so many formats."""
    return _GRADIENT + _REPLAY * formats


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
    #: loss and entropy of batches that were only run, not replayed
    reference: list[Comparison] = field(default_factory=list)
    #: what one unit in one format would take, measured directly on all batches
    each_seconds: float = 0.0
    step_seconds: float = 0.0  #: a forward of a batch as given
    steps: int = 0  #: batches as given
    _around: float = 0.0  #: seconds of putting a plan on and of comparing, a batch
    _rows_given: list[int] = field(default_factory=list)  #: examples of each batch as given
    _largest: list[dict[str, torch.Tensor]] = field(default_factory=list)  #: what went into layers, by batch
    _examples: npt.NDArray[np.intp] = field(
        default_factory=lambda: np.empty(0, dtype=np.intp)
    )  #: numbers of those chosen
    #: by unit, of the first batch
    activation_max: dict[str, float] = field(default_factory=dict)
    #: whether an example has one output and can be replayed without the others of its batch
    one_output: bool = False

    def run(self) -> None:
        """Look, pass over the batches once, take the second anchor, and go on until it is enough.

        Raises:
            MeasurementError: the reference is not finite, nothing counts, or the time is too short for one pass.
        """
        self._first_look()
        self._join_small_batches()
        replayer = self._find_sites()
        self._select_examples()
        order = list(range(len(self.workload.batches)))
        random.Random(self.seed).shuffle(order)
        begun = self.clock.elapsed
        self.tally.draw(replayer, self.workload, order[0], self.formats, self.seed)
        slowest = self.clock.elapsed - begun
        if math.isinf(self.clock.allowed):
            self.clock.allowed = self._allowance(slowest)
        if self.tally.stands_for:
            order = self._sweep_selected(replayer, order, slowest)
        else:
            slowest = self._sweep(replayer, order[1:], slowest, 1 - _ANCHOR)
            self._second_anchor(replayer, [i for i in order if i in self.tally.draws], slowest)
        while self.clock.fits(slowest, self._passes) and not self._is_enough():
            self._sweep(replayer, order, slowest, self._passes)
        if not any(weight.sum() > 0 for weight in self.tally.weights.values()):
            raise MeasurementError(_NOTHING_COUNTS)
        if len(self.tally.draws) < len(order) and not self.tally.stands_for:
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
            with watched(self.profile, self.modules, self.activation_max):
                self._reference(0)  # sets up kernels, too
            begun = time.monotonic()
            read = self._reference(0)
            step = time.monotonic() - begun
            check_finite(read, partial(first_bad_unit, self.workload, self.workload.batches[0]), 0)
            begun = time.monotonic()
            compare(read, read)
            with applied(self.workload.model, self.base.replace(self._one_low()), self.emulate):
                self._around = time.monotonic() - begun
                if self._around > _MUCH_AROUND * step:  # then its scopes, too, take time beside a forward
                    self._reference(0)
                    self._around = time.monotonic() - begun - step
        self.steps = len(self.workload.batches)
        self._rows_given = [batch_rows(batch) for batch in self.workload.batches]
        self._step_takes(step)
        self.one_output = has_one_output(read) and all(map(separable, self.workload.batches))
        least = self._replay_seconds(step)
        if self.clock.elapsed + least > self.clock.allowed:
            raise MeasurementError(
                f"{duration_text(self.clock.allowed)} is too short for one pass: a forward, a backward and a replay in "
                f"{len(self.formats)} formats take about {least:.2g} s here, after {self.clock.elapsed:.2g} s to get "
                f"ready. Allow {math.ceil(self.clock.elapsed + 2 * least)} s or more, or use smaller batches."
            )

    def _step_takes(self, seconds: float) -> None:
        """Note what a forward of a batch takes, and with it what one unit measured directly on all batches would."""
        self.step_seconds = seconds
        self.each_seconds = (_WITH_CASTS * seconds + self._around) * self.steps

    def _one_low(self) -> dict[str, Format]:
        """Return one unit in the last format that a unit takes."""
        pairs = [(u.name, f) for f in reversed(self.formats) for u in self.profile.units if f in u.formats]
        return dict(pairs[:1])

    def _allowance(self, slowest: float) -> float:
        """Return the seconds allowed from the start on, given what the first pass took."""
        total = self.clock.elapsed + slowest * (_SWEEPS * len(self.workload.batches) - 1)
        return max(min(self._share(), total), self.clock.elapsed)

    def _share(self) -> float:
        """Return what models of few units may take in all: a share of what measuring one by one would."""
        if len(self.profile.units) >= _FEW_UNITS:
            return math.inf
        pairs = sum(len([f for f in self.formats if f in u.formats]) for u in self.profile.units)
        return _SHARE * pairs * self.each_seconds

    def _reference(self, index: int) -> Readout:
        batch = self.workload.batches[index]
        return self.workload.readout(batch, self.workload.forward(batch))

    @property
    def _passes(self) -> float:
        """Return the share of the time allowed at which passes end."""
        return _PASSES if (1 - _PASSES) * self.clock.allowed > self.each_seconds else _ALL

    def _select_examples(self) -> None:
        """Where there is no time to replay all examples of a classifier, choose those that matter."""
        batches = self.workload.batches
        count = sum(batch_rows(batch) for batch in batches)
        allowed = min(self.clock.allowed, self._share())
        if not self.one_output or math.isinf(allowed):
            return
        if self.clock.elapsed + self._replay_seconds(self.step_seconds) * self.steps < _ALL * allowed:
            return
        begun = self.clock.elapsed
        with torch.no_grad():
            reads = [self._noted(index) for index in range(len(batches))]
        taken = self.clock.elapsed - begun
        if len(batches) == self.steps:  # not put together: then these are the forwards that measuring would take
            self._step_takes(taken / self.steps)
        each, allowed = self._replay_seconds(taken / count), min(self.clock.allowed, self._share())
        fitting = max(int((_ALL * allowed - self.clock.elapsed) / each), min(_FEWEST_EXAMPLES, count))
        for index, read in enumerate(reads):
            check_finite(read, partial(first_bad_unit, self.workload, batches[index]), index)
        if fitting >= count:
            return
        chosen = select(batches, reads, fitting, self.seed)
        self.reference = [compare(read, read) for read in reads]
        self.workload = self.workload.with_batches(joined(chosen.batches, self._rows_together(chosen.batches)))
        kept = len(chosen.examples)
        # each counts alike in the mean: what it stands for is in its effect
        self._examples = chosen.examples
        self._note_selection(0, chosen, count / kept, chosen.examples)
        self.notes.append(f"of {count} examples {kept} were chosen for replay, drawn by the curvature at their output")

    def _noted(self, index: int) -> Readout:
        """Run the reference and note what goes into layers that FP8 scales by their whole batch."""
        with largest_inputs(self.sites, self.modules, batch_rows(self.workload.batches[index])) as found:
            read = self._reference(index)
        self._largest.append(found)
        return read

    def _note_selection(self, first: int, chosen: Selection, weight: float, examples: npt.NDArray[np.intp]) -> None:
        """Note of the batches from the `first` on what their examples stand for, and which of all they are."""
        rows = [batch_rows(batch) for batch in self.workload.batches[first:]]
        scales = batch_scales(self._largest, self._rows_given, examples, rows)
        self.tally.scales |= dict(enumerate(scales, first))
        stands_for = np.split(np.concatenate(chosen.stands_for), np.cumsum(rows)[:-1])
        self.tally.stands_for |= dict(enumerate(stands_for, first))
        self.tally.weights |= {i: np.full(len(s), weight) for i, s in enumerate(stands_for, first)}

    def _replay_seconds(self, forward: float) -> float:
        """Return about what a pass takes: a forward, a backward, a replay in each format, emulated ones at twice that.

        A layer that is replayed within its block takes that block's other layers along.
        """
        return forward * pass_forwards(len(self.formats))

    def _sweep_selected(self, replayer: Replayer, order: Sequence[int], first: float) -> list[int]:
        """Replay all examples chosen, given what the first batch took; the rest is thinned where time is too short.

        Returns the batches replayed.
        """
        done, rest = [order[0]], sorted(order[1:])
        total, taken, spent = len(self._examples), self._rows(done), max(first, 1e-9)  # a clock may be coarse
        thin = False
        while rest:
            fitting = int((_ALL * self.clock.allowed - self.clock.elapsed) * taken / spent)
            if not thin and taken > _TELLING * total and fitting * _SLACK < self._rows(rest):
                rest, thin = self._thinned(rest, max(fitting, 1)), True
            begun, index = self.clock.elapsed, rest.pop(0)
            self.tally.draw(replayer, self.workload, index, self.formats, self.seed)
            taken, spent = taken + self._rows([index]), spent + self.clock.elapsed - begun
            done.append(index)
        self._say(f"{self.tally.passes} passes made")
        return done

    def _thinned(self, rest: Sequence[int], count: int) -> list[int]:
        """Draw some examples of batches that were chosen, and return the batches of those."""
        batches, tally = self.workload.batches, self.tally
        fewer = thinned([batches[i] for i in rest], [tally.stands_for[i] for i in rest], count, self.seed)
        ends = np.cumsum([batch_rows(batch) for batch in batches])[:-1]
        examples = np.concatenate([np.split(self._examples, ends)[i] for i in rest])[fewer.examples]
        weight = tally.weight(rest) / len(examples)
        self.workload = self.workload.with_batches((*batches, *fewer.batches))
        self._note_selection(len(batches), fewer, weight, examples)
        return list(range(len(batches), len(self.workload.batches)))

    def _rows(self, indices: Sequence[int]) -> int:
        return sum(batch_rows(self.workload.batches[i]) for i in indices)

    def _rows_together(self, batches: Sequence[Batch]) -> int:
        work = 2 * self.profile.parameters * max(self.workload.tokens(batches[0]), 1)
        return int(_SMALL_WORK / work * batch_rows(batches[0]))

    def _join_small_batches(self) -> None:
        """Replay small batches together: of a small model most of a pass is the interpreter's work, whatever its rows.

        Not where an output depends on what else is in its batch, as in contrastive models.
        """
        batches = self.workload.batches
        together = joined(batches, self._rows_together(batches))
        if len(together) == len(batches):
            return
        first, second = one_example(batches[0]), one_example(batches[1])
        both = joined([first, second], 2 * batch_rows(first))[0]
        with torch.no_grad():
            alone = self.workload.readout(first, self.workload.forward(first)).predictions
            among = self.workload.readout(both, self.workload.forward(both)).predictions
        # the order of sums differs with the batch's size; another example beside it would change far more than this
        alike = alone.shape[1:] == among.shape[1:] and torch.allclose(
            among[: len(alone)], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())
        )
        if alike:
            self.workload = self.workload.with_batches(together)
            rows, every = [batch_rows(batch) for batch in together], np.arange(sum(self._rows_given))
            self.tally.scales |= dict(enumerate(batch_scales([], self._rows_given, every, rows)))

    def _find_sites(self) -> Replayer:
        """Find the sites and replay each as it ran, on one example; what keeps state is taken apart, or left out."""
        apart: frozenset[str] = frozenset()
        example = one_example(self.workload.batches[0])
        while True:
            self.sites = find_sites(
                self.profile, self.modules, self.formats, self.ambient, emulated=self.emulate, apart=apart
            )
            replayer = Replayer(self.workload, self.sites, self.modules, self.ambient)
            effects, _ = replayer.run(example, [], lambda read: draw_direction(read, self.seed), check=True)
            whole = {s.unit for s in self.sites if s.path in effects.restless and s.whole}
            if not whole:
                break
            apart |= whole
        if apart:
            self.notes.append(f"replayed layer by layer, since they keep state between calls: {few(sorted(apart))}")
        self.sites = [s for s in self.sites if s.path not in effects.restless]
        return Replayer(self.workload, self.sites, self.modules, self.ambient)

    def _sweep(self, replayer: Replayer, order: Sequence[int], slowest: float, share: float) -> float:
        """Draw each batch once more, the least drawn first, while there is time; return what the slowest took."""
        seen = 0.0
        for index in sorted(order, key=lambda index: self.tally.draws.get(index, 0)):
            if not self.clock.fits(seen or slowest, share):
                break
            begun = self.clock.elapsed
            self.tally.draw(replayer, self.workload, index, self.formats, self.seed)
            seen = max(seen, self.clock.elapsed - begun)
        self._say(f"{self.tally.passes} passes made")
        return seen or slowest

    def _second_anchor(self, replayer: Replayer, order: Sequence[int], slowest: float) -> None:
        """Run some batches with every unit low. One costs about as much as a pass for each format."""
        each = slowest * (1 + len(self.formats)) / 2
        room = min(_ANCHOR * self.clock.allowed, self.clock.allowed - self.clock.elapsed)
        count = min(len(order), max(1, len(self.workload.batches) // 4), int(room / max(each, 1e-9)))
        if count < 1:
            self.notes.append("no second anchor: the time allowed is too short for it")
        for index in order[:count]:
            for choice in self.formats:
                self.tally.slope(replayer, self.workload, index, choice)
        self._say("second anchor")

    def _is_enough(self) -> bool:
        if self.tally.spread == 0.0:
            return True  # nothing is drawn, so another pass would give the same
        errors = sorted(p.sampling for f in self.formats for p in predict(self.scores(f)).values() if p.value > 0)
        return not errors or errors[len(errors) // 2] < _ENOUGH

    def _say(self, message: str) -> None:
        left = max(self.clock.allowed - self.clock.elapsed, 0.0)
        self.tell(Progress(stage="probe", message=message, elapsed_seconds=self.clock.elapsed, eta_seconds=left))
