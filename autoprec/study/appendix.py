"""What a result says beside its measurements: how it was asked for, what holds the memory, times of units elsewhere."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import replace

from autoprec.errors import AutoprecError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.probe.described import module_facts
from autoprec.probe.versions import all_versions
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit
from autoprec.records import DeviceProfile, MemoryBreakdown, ModelProfile, SearchSetting, Support

__all__ = ["memory_of", "setting_of", "unit_times"]


def setting_of(
    workload: Workload,
    unseen: Workload | None,
    device: DeviceProfile,
    *,
    command: str | None,
    limit: DropLimit,
    budget_seconds: float,
    seed: int,
) -> SearchSetting:
    """Return how a search is asked for, now."""
    rows, length = workload.batch_shape
    kept = len(unseen.batches) if unseen else 0
    return SearchSetting(
        command=command,
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        max_drop=str(limit),
        budget_seconds=budget_seconds,
        seed=seed,
        batches=len(workload.batches) + kept,
        unseen_batches=kept,
        batch_size=rows,
        seq_len=length,
        data=workload.notes,
        versions={**all_versions(), **device.versions},
    )


def memory_of(
    workload: Workload, profile: ModelProfile, device: DeviceProfile, plans: Mapping[str, Plan]
) -> dict[str, MemoryBreakdown]:
    """Return what holds a step's memory under each plan, predicted; empty where the memory model lacks the model."""
    rows, length = workload.batch_shape
    facts, found = module_facts(workload.model), dict[str, MemoryBreakdown]()
    for name, plan in plans.items():
        setup = setup_of(plan, rows, length, workload.mode, device_kind=device.kind)
        try:
            found[name] = replace(predict_memory(profile, plan, setup, facts), units=())
        except AutoprecError:
            return {}
    return found


def unit_times(forecast: Forecast | None) -> dict[Format, dict[str, float]]:
    """Return the predicted milliseconds of each unit in each format of a device that is not here."""
    if forecast is None:
        return {}
    known = [f for f in Format if forecast.device.supports(f) is not Support.ABSENT]
    return {choice: dict(forecast.unit_ms(choice)) for choice in known}
