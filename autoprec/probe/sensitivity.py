"""`probe_sensitivity`: the drop every unit would cause alone in every format, from one kind of backward pass.

Passes over the batches, until sampling no longer matters or the time is spent, predict all drops at once (`survey`,
`replay`, `estimation`); what is then least certain and matters most is measured by running the model (`direct`). Units
that no gradient comes back to, because their kernels have none, are measured in groups that are halved.

The time allowed is that of a few passes over all batches, and for small models a share of what measuring one by one
would take (`survey`), unless the caller says what it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from autoprec import __version__
from autoprec.errors import MeasurementError, UsageError, first_line
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.probe.cache import ResultCache
from autoprec.probe.clock import Clock
from autoprec.probe.compare import Ratio, summarise
from autoprec.probe.device import device_name
from autoprec.probe.direct import halved, measured_drops, one_example_of, weight_errors
from autoprec.probe.findings import Finding, Findings, vetoes_of
from autoprec.probe.numerics import GradientNumerics, gradient_numerics
from autoprec.probe.replay import frozen, repeatable
from autoprec.probe.steps import device_of, kept_state, plain_fp32
from autoprec.probe.survey import Survey
from autoprec.probe.turns import Turns
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import Mode, ModelProfile, Progress, SensitivityProfile, UnitDrop
from autoprec.runtime.fp8 import fp8_missing
from autoprec.runtime.identity import canonical_modules, weights_digest
from autoprec.runtime.target import products_in_fp32

__all__ = ["probe_sensitivity"]

News = Callable[[Progress], None]


def probe_sensitivity(
    workload: Workload,
    formats: Sequence[Format | str] = ("bf16", "fp8"),
    *,
    seconds: float | None = None,
    seed: int = 0,
    cache: bool = True,
    units: ModelProfile | None = None,
    progress: News | None = None,
) -> SensitivityProfile:
    """Return for each unit and format the drop it would cause alone, with its 95 % interval and how it was got.

    Args:
        workload: model and batches, on the device to probe on. Dropout is off; in train mode what formats do to
            gradients is probed, too.
        formats: low formats. FP8 that the device lacks is emulated.
        seconds: time allowed; None: about four passes over all batches, but for a model of less than 24 units no more
            than an eighth of what measuring one by one would take.
        seed: of the directions that are drawn, and of the order of batches.
        cache: read and write the user's cache of results, by weights, data, torch, device, time allowed
            and format; not where the workload has a loss or outputs function of its own.
        units: the model's units where they are cut otherwise than `probe_units` does, as a search space's `profile`.
        progress: called with news as they come.

    Returns:
        drops in nats (for models of values a relative squared error) for data like these batches. Not promised: that
        they add up where they are large, and anything of units named in `never_ran`.

    Raises:
        MeasurementError: the reference cannot be run, its output is not finite (the unit is named), nothing counts,
            or the time is too short for one pass.
        UsageError: no such format.
    """
    clock, wanted = Clock(time.monotonic()), _parse(formats)
    if seconds is not None:
        clock.allowed = seconds
    units = units or probe_units(workload.model, model_id=workload.model_id)
    kept = ResultCache.of(workload, units, seconds, seed) if cache else None
    known = kept.read() if kept else None
    if known is not None:  # kept by what decides the arithmetic; the name is that of the device's profile
        known = dataclasses.replace(known, device=device_name(device_of(workload.model)))
    missing = [f for f in wanted if known is None or f not in known.formats]
    if known is not None and not missing:
        return _only(known, wanted)
    with Turns(device_of(workload.model)).computing() as turns, products_in_fp32():

        def tell(news: Progress) -> None:
            turns.let_pass()
            if progress is not None:
                progress(news)

        found = _probe(workload, missing, units, clock, seed, kept, tell)
    whole = found if known is None else _joined(known, found)
    return _only(kept.keep(whole) if kept else whole, wanted)


def _parse(formats: Sequence[Format | str]) -> tuple[Format, ...]:
    try:
        found = dict.fromkeys(Format(f) for f in formats)
    except ValueError as error:
        raise UsageError(f"{error}. Choose from {', '.join(f for f in Format if f is not Format.FP32)}.") from None
    low = tuple(f for f in found if f is not Format.FP32)
    if not low:
        raise UsageError("there is no low format to probe: fp32 is the reference. Choose from bf16, fp16, fp8.")
    return low


def _probe(
    workload: Workload,
    formats: Sequence[Format],
    profile: ModelProfile,
    clock: Clock,
    seed: int,
    kept: ResultCache | None,
    tell: News,
) -> SensitivityProfile:
    model, device = workload.model, device_of(workload.model)
    modules = canonical_modules(model)
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    ambient = Format.FP16 if old else Format.BF16
    emulate = fp8_missing(device) is not None
    wide = {u.name: Format.FP32 for u in profile.units}
    base = Plan.assign(profile, wide, ambient=ambient, mode=workload.mode)
    survey = Survey(workload, profile, modules, formats, ambient, emulate, clock, seed, base, tell)
    try:
        with kept_state(model, weights=False), repeatable(model), plain_fp32(device.type):
            model.eval()
            with frozen(model):
                survey.run()
            numerics = _gradients(survey) if workload.mode is Mode.TRAIN else GradientNumerics((), None)
            findings = {f: Findings.of(survey, f) for f in formats}
            around = _measure(workload, survey, findings)
    except RuntimeError as error:
        raise MeasurementError(
            f"the FP32 reference cannot be probed: {first_line(error)}. Check that the model takes these batches; "
            "where memory is short, try a smaller --batch-size or --seq-len."
        ) from error
    drops = [
        row for f in formats for row in _shares(findings[f].drops(survey, emulated=emulate and f is Format.FP8), survey)
    ]
    kind, parts = survey.tally.kind, survey.reference or list(survey.tally.comparisons.values())
    summary = summarise(kind, parts)
    scale = max(summary.reference_loss or 0.0, summary.reference_entropy or 0.0) or 1.0
    return SensitivityProfile(
        model_id=workload.model_id,
        fingerprint=profile.fingerprint,
        weights_digest=kept.weights if kept else weights_digest(model),
        data_digest=kept.data if kept else workload.data_digest(),
        device=device_name(device),
        mode=workload.mode,
        ambient=ambient,
        formats=tuple(formats),
        drop_unit=kind.drop_unit,
        scale=scale,
        ambient_drop=around,
        replayed_positions=survey.tally.positions,
        drops=tuple(drops),
        activation_max=survey.activation_max,
        numerics=numerics.rows,
        vetoes=tuple(vetoes_of(profile, formats, survey.tally, survey.activation_max)),
        loss_scale=numerics.loss_scale,
        never_ran=tuple(u.name for u in profile.units if u.name not in survey.tally.ran),
        passes=survey.tally.passes,
        seconds=clock.elapsed,
        notes=tuple(survey.notes),
        versions={"autoprec": __version__, "torch": torch.__version__},
        seed=seed,
    )


def _gradients(survey: Survey) -> GradientNumerics:
    batch = survey.workload.batches[0]
    return gradient_numerics(
        survey.workload, survey.profile, survey.sites, survey.modules, survey.formats, survey.ambient, batch
    )


def _measure(workload: Workload, survey: Survey, findings: dict[Format, Findings]) -> float:
    """Run the model for the units that are least certain and matter most, and for those no gradient comes back to.

    Returns the drop of what the ambient format alone does: nought where all products are those of units.
    """
    base, clock, emulate = survey.base, survey.clock, survey.emulate
    around = _around(workload, survey)
    for choice, found in findings.items():
        cut = [u for u in survey.profile.units if choice in u.formats and u.name in survey.cut]
        if cut:
            found.weight_errors = errors = weight_errors(cut, survey.modules, choice)
            order = sorted(errors, key=errors.__getitem__)
            found.groups = halved(workload, base, order, choice, clock, emulate=emulate)
    rows = _chosen(findings, int((clock.allowed - clock.elapsed) / survey.each_seconds) - 1)
    plans = [base.replace({row.unit: row.format}) for row in rows]
    for row, drop in zip(rows, measured_drops(workload, plans, emulate=emulate) if plans else [], strict=True):
        row.direct = drop and _without(drop, around)
    return around


def _around(workload: Workload, survey: Survey) -> float:
    """Return the drop of the ambient format alone, on as many batches as there is time for, or one example."""
    example = one_example_of(workload)
    first = measured_drops(example, [survey.base], emulate=survey.emulate)[0]
    if first is not None and first.value == 0:
        return 0.0
    each = 2 * survey.each_seconds / survey.steps  # the reference, and the plan
    count = int((survey.clock.allowed - survey.clock.elapsed) / each)
    if count < 1:
        return first.value if first else 0.0
    more = measured_drops(workload.with_batches(workload.batches[:count]), [survey.base], emulate=survey.emulate)[0]
    return more.value if more else 0.0


def _without(drop: Ratio, around: float) -> Ratio:
    """Return a drop without what the ambient format does anyway; none is negative."""
    low, high = drop.ci95 or (drop.value, drop.value)
    value, low, high = (max(x - around, 0.0) for x in (drop.value, low, high))
    return Ratio(value, (low, high) if drop.ci95 else None)


def _chosen(findings: dict[Format, Findings], count: int) -> list[Finding]:
    """Return the `count` most doubtful findings, formats taking turns: their drops are orders of magnitude apart."""
    turns = itertools.zip_longest(*(found.doubtful() for found in findings.values()))
    return [row for turn in turns for row in turn if row is not None][: max(count, 0)]


def _shares(rows: Sequence[UnitDrop], survey: Survey) -> list[UnitDrop]:
    """Return the rows in the order of the units, with their share of the sum."""
    total = sum(row.drop.value for row in rows)
    order = {u.name: i for i, u in enumerate(survey.profile.units)}
    shared = [dataclasses.replace(row, share=row.drop.value / total if total > 0 else 0.0) for row in rows]
    return sorted(shared, key=lambda row: order[row.unit])


def _joined(known: SensitivityProfile, found: SensitivityProfile) -> SensitivityProfile:
    """Return what was known with the formats that were probed now."""
    vetoes = {(v.unit, v.format): v for v in (*known.vetoes, *found.vetoes)}
    return dataclasses.replace(
        found,
        formats=(*known.formats, *found.formats),
        drops=(*known.drops, *found.drops),
        numerics=(*known.numerics, *found.numerics),
        vetoes=tuple(vetoes.values()),
        passes=known.passes + found.passes,
        seconds=known.seconds + found.seconds,
        notes=tuple(dict.fromkeys((*known.notes, *found.notes))),
    )


def _only(profile: SensitivityProfile, formats: Sequence[Format]) -> SensitivityProfile:
    """Return a profile with some of its formats."""
    return dataclasses.replace(
        profile,
        formats=tuple(formats),
        drops=tuple(d for f in formats for d in profile.drops if d.format is f),
        numerics=tuple(n for n in profile.numerics if n.format in formats),
    )
