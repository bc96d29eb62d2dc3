"""Drops measured by running the model: of one unit in a format, or of groups that are halved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoprec.formats import Format, Fp8Recipe, layout
from autoprec.plan import Plan
from autoprec.probe.clock import Clock
from autoprec.probe.compare import Comparison, Ratio, compare, summarise
from autoprec.probe.pairs import one_example
from autoprec.probe.readout import ReadoutKind
from autoprec.probe.workload import Workload
from autoprec.records import Unit
from autoprec.runtime.attach import applied
from autoprec.runtime.emulate import fp8_quantize, round_to

__all__ = ["Group", "halved", "measured_drops", "one_example_of", "weight_errors"]


def measured_drops(workload: Workload, plans: Sequence[Plan], *, emulate: bool) -> list[Ratio | None]:
    """Run all batches under FP32 and under each plan, and return the drops; None where an output is not finite.

    One batch's reference output is held at a time.
    """
    parts: list[list[Comparison]] = [[] for _ in plans]
    kind = ReadoutKind.LOGITS
    with torch.no_grad():
        for batch in workload.batches:
            read = workload.readout(batch, workload.forward(batch))
            # a copy: a model may write its next output where it wrote the last
            reference = dataclasses.replace(read, predictions=read.predictions.clone())
            kind = reference.kind
            for plan, own in zip(plans, parts, strict=True):
                with applied(workload.model, plan, emulate):
                    own.append(compare(reference, workload.readout(batch, workload.forward(batch))))
    return [summarise(kind, own).drop if all(part.finite for part in own) else None for own in parts]


def one_example_of(workload: Workload) -> Workload:
    """Return the workload on one example: enough to see whether something has any effect."""
    return workload.with_batches([one_example(workload.batches[0])])


@dataclass(frozen=True, slots=True)
class Group:
    """Units measured together in one format; `drop` None where their output was not finite."""

    units: tuple[str, ...]
    drop: Ratio | None


def halved(
    workload: Workload, base: Plan, units: Sequence[str], choice: Format, clock: Clock, *, emulate: bool
) -> list[Group]:
    """Measure units together, then halves of whichever group has the largest drop, until single or out of time.

    Args:
        base: the plan with all units in FP32.
        units: in order of their weights' rounding error, so that a half holds what is alike.
    """
    # a pooler whose result nobody asked for: one example tells
    first = _group(one_example_of(workload), base, tuple(units), choice, emulate)
    if first.drop is not None and first.drop.value == 0.0:
        return [first]
    groups = [_group(workload, base, tuple(units), choice, emulate)]
    while True:
        before = clock.elapsed
        wide = [g for g in groups if len(g.units) > 1]
        if not wide or not clock.fits(0.0):
            return groups
        worst = max(wide, key=lambda g: float("inf") if g.drop is None else g.drop.value)
        if worst.drop is not None and worst.drop.value == 0.0:
            return groups
        middle = len(worst.units) // 2
        groups.remove(worst)
        for half in (worst.units[:middle], worst.units[middle:]):
            groups.append(_group(workload, base, half, choice, emulate))
        if not clock.fits(clock.elapsed - before):
            return groups


def _group(workload: Workload, base: Plan, units: tuple[str, ...], choice: Format, emulate: bool) -> Group:
    plan = base.replace(dict.fromkeys(units, choice))
    return Group(units, measured_drops(workload, [plan], emulate=emulate)[0])


def weight_errors(units: Iterable[Unit], modules: Mapping[str, torch.nn.Module], choice: Format) -> dict[str, float]:
    """Return for each unit ‖round(W) − W‖² / ‖W‖² of its floating weights; packed weights count as exact."""
    return {unit.name: _weight_error(list(_matrices(unit.modules, modules)), choice) for unit in units}


def _matrices(names: Sequence[str], modules: Mapping[str, torch.nn.Module]) -> Iterator[torch.Tensor]:
    for name in names:
        for parameter in modules[name]._parameters.values():
            if parameter is not None and parameter.dim() > 1 and parameter.is_floating_point():
                yield parameter.detach()


def _weight_error(matrices: Sequence[torch.Tensor], choice: Format) -> float:
    error = size = 0.0
    for weight in matrices:
        if choice is Format.FP8:
            rounded, scale = fp8_quantize(weight, layout(choice, recipe=Fp8Recipe.TENSORWISE))
            low = rounded / scale
        else:
            low = round_to(weight.float(), layout(choice))
        error += float(np.square(torch.linalg.vector_norm(low - weight, dtype=torch.float64).item()))
        size += float(np.square(torch.linalg.vector_norm(weight, dtype=torch.float64).item()))
    return error / size if size > 0 else 0.0
