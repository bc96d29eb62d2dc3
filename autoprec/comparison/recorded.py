"""Plans of finished searches side by side, as those measured them: nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoprec.comparison.figures import metric_figures, row_of, targets
from autoprec.comparison.names import BY_NAME
from autoprec.errors import PlanError, UsageError
from autoprec.records import ComparedPlan, Figure, Measurement, PlanComparison, SearchResult

__all__ = ["Recorded", "recorded_plans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What was asked for: a run folder with its result, or a plan by name (then `result` is None)."""

    name: str
    result: SearchResult | None


def recorded_plans(asked: Sequence[Recorded]) -> PlanComparison:
    """Return the chosen plans of runs, and plans by name that the first of them measured, with the figures they had.

    Origins are those of the runs: `measured` there and then. A search times no kernels, so that no share of
    low-precision time is known, and its peak on a CPU is that of the whole process.

    Raises:
        UsageError: no run among what is asked for.
        PlanError: runs of different models or modes, one that chose no plan, or that measured no plan of the name.
    """
    runs = [entry for entry in asked if entry.result is not None]
    if not runs:
        raise UsageError(
            "figures can be read from run folders only, and none is given; leave out --recorded to measure"
        )
    first = runs[0].result
    assert first is not None
    for run in runs[1:]:
        assert run.result is not None
        _check_alike(runs[0].name, first, run.name, run.result)
    reference = _row("fp32", runs[0].name, first, first.reference, None)
    rows = [
        _chosen(entry.name, entry.result) if entry.result is not None else _named(entry.name, runs[0].name, first)
        for entry in asked
        if entry.name != "fp32"
    ]
    found = [row.measurement for row in rows if row.measurement is not None]
    notes = [
        f"{run.name} is a search on {run.result.device}, read and not measured again" for run in runs if run.result
    ]
    return PlanComparison(
        model_id=first.model_id,
        device=", ".join(dict.fromkeys(run.result.device for run in runs if run.result)),
        mode=first.mode,
        batches=None,
        metric=next((name for m in found if (name := metric_figures(m, first.reference)[0])), None),
        reference=reference,
        plans=tuple(replace(row, targets=targets(row)) for row in rows),
        notes=tuple(notes),
        versions=_versions([run.result for run in runs if run.result]),
    )


def _versions(results: Sequence[SearchResult]) -> dict[str, str]:
    """Return the releases that runs were made with; of one that differs all are named."""
    found: dict[str, list[str]] = {}
    for result in results:
        for name, release in (result.setting.versions if result.setting else {}).items():
            found.setdefault(name, []).append(release)
    return {name: ", ".join(dict.fromkeys(releases)) for name, releases in found.items()}


def _check_alike(name: str, first: SearchResult, other_name: str, other: SearchResult) -> None:
    for what, mine, theirs in (
        ("model", first.model_id, other.model_id),
        ("mode", str(first.mode), str(other.mode)),
    ):
        if mine != theirs:
            raise PlanError(
                f"{name} and {other_name} are searches of different {what}s, {mine} and {theirs}: their figures say "
                "nothing about each other"
            )


def _chosen(name: str, result: SearchResult) -> ComparedPlan:
    if result.chosen is None:
        raise PlanError(f"the search of {name} chose no plan: {result.verdict.text}")
    return _row(name, name, result, result.front[result.chosen], result.reference)


def _named(name: str, run: str, result: SearchResult) -> ComparedPlan:
    """Return what a run measured of a plan by name."""
    known = f"cast {name.removeprefix('cast-')}" if name.startswith("cast-") else f"uniform {name}"
    found = next((m for m in (*result.baselines, *result.front) if m.name == known), None)
    if found is None:
        have = [n for n in BY_NAME if any(m.name in (f"uniform {n}", n.replace("-", " ")) for m in result.baselines)]
        raise PlanError(f"{run} measured no plan {name}; it has {', '.join(have) or 'none by name'}")
    return _row(name, run, result, found, result.reference)


def _row(
    name: str, source: str, result: SearchResult, found: Measurement, reference: Measurement | None
) -> ComparedPlan:
    before = None if reference is None else _peak(reference)
    return row_of(found, reference, _peak(found), before, name=name, source=source, device=result.device)


def _peak(found: Measurement) -> Figure | None:
    if found.peak_bytes is None or found.origin.peak_bytes is None:
        return None
    return Figure(value=found.peak_bytes, ci95=None, unit="bytes", origin=found.origin.peak_bytes)
