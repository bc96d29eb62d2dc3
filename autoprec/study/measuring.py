"""One measurement of a search: carried out where the search measures, with what becomes of it when it cannot be."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

from autoprec.errors import DeviceError, MeasurementError, PlanError
from autoprec.measurement import DeviceFailed, Request, evaluate
from autoprec.records import Measurement
from autoprec.study.budget import Budget
from autoprec.study.worker import Worker, WorkerLost

__all__ = ["Outcome", "measure", "outcome_of"]


class Outcome(NamedTuple):
    """What came of a request, how long it took, and whether it could not be carried out at all."""

    found: Measurement
    seconds: float
    fault: bool


def outcome_of(request: Request, worker: Worker | None, budget: Budget) -> Outcome:
    """Carry out a request; a plan's fault is a measurement with its reason. May run in a thread of its worker's.

    Raises:
        DeviceFailed, MeasurementError, DeviceError, PlanError: nothing can be measured any more, in this process or of
            the reference.
    """
    begun = time.monotonic()
    try:
        return Outcome(measure(request, worker, budget), time.monotonic() - begun, False)
    except DeviceFailed:  # in this process nothing can be measured any more
        raise
    except (DeviceError, PlanError, MeasurementError) as error:
        fault = isinstance(error, MeasurementError)
        # of the reference, it is not this plan's fault; nor in this process, where a reference that fails now fails
        if request.reference_ms is None or (worker is None and fault):
            raise
        found = Measurement(name=request.name, assignment=request.plan.assignment, reason=str(error))
        return Outcome(found, time.monotonic() - begun, fault)


def measure(request: Request, worker: Worker | None, budget: Budget) -> Measurement:
    """Measure in the worker, or without one in this process; where somebody killed the worker, once more.

    Raises:
        WorkerLost: the worker process was lost over it.
        MeasurementError, DeviceError, PlanError: as `evaluate`.
    """
    if worker is None:
        return evaluate(request)
    worker.expected_seconds = budget.each_seconds
    worker.last_call = budget.last_call()
    try:
        return worker.evaluate(request)
    except WorkerLost as error:
        lost = error
    if not lost.killed or worker.given_up or not budget.has_time():
        raise lost
    worker.last_call = budget.last_call()
    try:
        found = worker.evaluate(request)
    except WorkerLost as error:
        raise WorkerLost(f"{lost}, twice" if str(error) == str(lost) else f"{lost}; then {error}") from None
    return replace(found, reason="; ".join(filter(None, (found.reason, f"measured again: {lost}"))))
