"""Batch and precision together: what a plan saves in memory may buy a larger batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoprec.errors import AutoprecError
from autoprec.plan import Plan
from autoprec.predict.fitting import RESERVE, fit_batch
from autoprec.predict.memory import setup_of
from autoprec.probe.described import module_facts
from autoprec.probe.workload import Workload
from autoprec.records import DeviceProfile, Estimate, LargestBatch, Measurement, Origin
from autoprec.study.space import SearchSpace

__all__ = ["largest_batches"]


def largest_batches(
    workload: Workload,
    space: SearchSpace,
    device: DeviceProfile,
    measured: Mapping[str, tuple[Measurement, Plan]],
    batch_size: int,
    seq_len: int,
) -> Iterator[LargestBatch]:
    """Yield for each plan the largest batch that fits the device, and the tokens a second there, both predicted.

    Time is taken to grow in proportion to the batch: a larger one is rarely slower for each token, so `tokens_per_s` is
    a lower bound where the batch grows. Nothing is yielded where the device's memory is not known or the memory model
    does not know the model.

    Args:
        measured: plans by name, with what was measured of them at `batch_size`.
        seq_len: tokens an example.
    """
    if device.memory_bytes is None:
        return
    usable, facts = round((1 - RESERVE) * device.memory_bytes), module_facts(workload.model)
    for name, (found, plan) in measured.items():
        if found.step_ms is None or found.step_ms_ci95 is None:
            continue
        setup = setup_of(plan, 1, seq_len, workload.mode, device_kind=device.kind)
        try:
            fit = fit_batch(space.profile, plan, setup, facts, usable)
        except AutoprecError:
            return
        tokens = 1e3 * batch_size * seq_len
        low, high = found.step_ms_ci95
        yield LargestBatch(
            name=name,
            batch_size=fit.largest_micro_batch,
            total_bytes=fit.breakdown.total_bytes,
            accumulation=-(-batch_size // max(fit.largest_micro_batch, 1)),
            tokens_per_s=Estimate(tokens / found.step_ms, tokens / high, tokens / low, Origin.PREDICTED),
        )
