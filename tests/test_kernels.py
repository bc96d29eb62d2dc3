"""Kernels find the unit that launched them: operators of a real profile stand in for kernels, which a CPU has not."""

from __future__ import annotations

import torch
from test_matrix import case_of, plan_of
from torch.profiler import ProfilerActivity

from autoprec import applied
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.kernels import kernel_rows, unit_ranges

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def test_kernels_of_both_passes_belong_to_their_units() -> None:
    case = case_of("llama")
    plan = plan_of(case.model, "mixed")
    modules = canonical_modules(case.model)
    owners = {id(modules[name]): unit.name for unit in plan.units for name in unit.modules}
    with applied(case.model, plan, emulate=True), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        with unit_ranges(owners):
            case.loss(case.run()).backward()
    events = profile.events()
    assert events is not None
    for event in events:
        if event.name in _PRODUCTS:
            event.append_kernel(f"gemm of {event.name}", 0, 2000.0)
    rows = kernel_rows(events)
    calls = {unit.name: sum(r.calls for r in rows if r.unit == unit.name) for unit in plan.units}
    # one product forward and two backward a linear layer; lookups have none; the embedding's gradient is no product
    wanted = {u.name: 0 if u.role == "embedding" else 3 * len(u.modules) for u in plan.units}
    assert calls == wanted
    assert all(row.ms == 2.0 * row.calls for row in rows)


def test_ranges_close_when_a_leaf_fails() -> None:
    leaf = torch.nn.Linear(4, 4)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile, unit_ranges({id(leaf): "unit"}):
        try:
            leaf(torch.ones(2, 3))
        except RuntimeError:
            torch.ones(2, 2) @ torch.ones(2, 2)
    events = profile.events()
    assert events is not None
    for event in events:
        if event.name == "aten::mm":
            event.append_kernel("gemm", 0, 1000.0)
    assert [(row.unit, row.calls) for row in kernel_rows(events)] == [(None, 1)]
