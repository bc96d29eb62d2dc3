"""The wall clock of a search, and what its measurements are expected to take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from dataclasses import dataclass

from autoprec.errors import MeasurementError, StudyError, first_line
from autoprec.probe.compare import compare, summarise
from autoprec.probe.readout import ReadoutKind
from autoprec.probe.steps import Stepper, device_of, kept_state, plain_fp32, timed
from autoprec.probe.turns import Turns
from autoprec.probe.workload import Workload
from autoprec.quantities import duration_text
from autoprec.records import Mode

__all__ = ["Budget", "FirstLook", "first_look"]

#: so many measurements tell what the next one will take
_LEARNT_FROM = 5
#: a measurement near the end of the budget may take this many times what is expected, and a fresh worker's start
_PATIENT, _LEAST_SECONDS = 1.5, 2.0


class Budget:
    """A budget of wall-clock seconds that runs from `started` (as `time.monotonic` counts)."""

    def __init__(self, seconds: float, started: float) -> None:
        self.seconds, self.started = seconds, started
        #: what a measurement is expected to take
        self.each_seconds = 0.0
        self._took: deque[float] = deque(maxlen=_LEARNT_FROM)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds until the end; 0 after it."""
        return max(0.0, self.seconds - self.elapsed)

    def has_time(self, reserve: float = 0.0) -> bool:
        """Say whether another measurement is expected to end within the budget, less what is kept back."""
        return self.elapsed + self.each_seconds + reserve <= self.seconds

    def learn(self, seconds: float) -> None:
        """Learn from what a measurement took: the median of the last few, so that a single slow one is forgotten."""
        self._took.append(seconds)
        self.each_seconds = statistics.median(self._took)

    def last_call(self) -> float:
        """Return when a measurement that begins now ends at the latest, as `time.monotonic` counts.

        One that hangs costs the budget no more than one measurement.
        """
        now = time.monotonic()
        return max(self.started + self.seconds + self.each_seconds, now + _PATIENT * self.each_seconds + _LEAST_SECONDS)

    def expect(self, look: FirstLook, measurements: int, *, timed: bool) -> None:
        """Learn from a first look what a measurement takes, and refuse a budget that cannot hold `measurements`.

        Args:
            timed: steps are timed, as on a device that is here.

        Raises:
            StudyError: what it would take, and what to try.
        """
        self.each_seconds = look.drop_seconds + (look.timing_seconds if timed else 0.0)
        need = self.elapsed + measurements * self.each_seconds
        if need > self.seconds:
            raise StudyError(
                f"a budget of {duration_text(self.seconds)} is too short: the baselines alone take about "
                f"{duration_text(need)} (a reference step takes {look.step_seconds * 1e3:.0f} ms). Try --budget "
                f"{duration_text(2 * need)}, or fewer --batches, a smaller --batch-size or --seq-len."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLook:
    """What one reference step took, what a measurement made of such steps will take, and what the model puts out."""

    step_seconds: float
    drop_seconds: float
    timing_seconds: float
    kind: ReadoutKind
    scale: float  #: what 100 % of drop is, of the first batch


def first_look(workload: Workload) -> FirstLook:
    """Run the reference a few times; the model is left as it was.

    Raises:
        MeasurementError: the reference cannot be run.
    """
    stepper, device = Stepper(workload), device_of(workload.model)
    training, batch = workload.mode is Mode.TRAIN, workload.batches[0]
    try:
        with (
            Turns(device).computing() as turns,
            turns.timing(),
            kept_state(workload.model, weights=training),
            plain_fp32(device.type),
        ):
            workload.model.train(training)
            first, raw = timed(device, lambda: stepper.run(batch))
            read = workload.readout(batch, raw)
            read = dataclasses.replace(read, predictions=read.predictions.detach())
            summary = summarise(read.kind, [compare(read, read)])
            # the first step sets up kernels; the least of a few is the machine's own speed, unless steps are long
            again = [timed(device, lambda: stepper.run(batch))[0] for _ in range(1 if first > 2.0 else 5)]
    except RuntimeError as error:
        raise MeasurementError(
            f"the FP32 reference cannot be run: {first_line(error)}. Check that the model takes these "
            "batches; where memory is short, try a smaller --batch-size or --seq-len."
        ) from error
    step = min(first, *again)
    # drop: both sides of every batch; time: the pairs beyond those; a training step is about 3 forwards
    batches = len(workload.batches)
    forwards = 2 * batches * step / (3 if training else 1)
    gradients = 4 * step if training else 0.0
    pairs = 2 * step * (8 if training else max(0, 8 - batches))
    return FirstLook(
        step_seconds=step,
        drop_seconds=1.2 * (forwards + gradients),
        timing_seconds=1.2 * (pairs + 4 * step),
        kind=read.kind,
        scale=max(summary.reference_loss or 0.0, summary.reference_entropy or 0.0) or 1.0,
    )
