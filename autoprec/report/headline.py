"""What stands on top of a page: the decision, its sentence, the figures it rests on, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass

from autoprec.records import Confirmed, Measurement, Origin, SearchResult, VerdictDecision
from autoprec.report.figures import bytes_text, drop_unit, interval, number
from autoprec.report.run import Run
from autoprec.report.tables import Fact

__all__ = ["Headline", "Tile", "headline", "headline_of"]

_BADGES = {
    VerdictDecision.USE_PLAN: "Use the plan",
    VerdictDecision.USE_UNIFORM: "Use one format throughout",
    VerdictDecision.DO_NOTHING: "Do nothing",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure with what it is, and its interval and origin."""

    name: str
    value: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The answer of a run; `tone` chooses its colour."""

    badge: str
    tone: str
    text: str
    tiles: tuple[Tile, ...] = ()
    steps: tuple[Fact, ...] = ()


def headline(run: Run) -> Headline:
    """Return the verdict of a run, or where it stands while its search has not ended."""
    if run.result is not None:
        return headline_of(run.result)
    count = sum(m.drop is not None for m in run.measured)
    text = f"This search has not ended: {count} plans are measured."
    if run.best is not None:
        text += f" The fastest so far within {run.limit} is {run.best.name}, not confirmed on unseen batches."
    elif run.limit is not None and count:
        text += f" None within {run.limit} is faster than FP32 so far."
    tiles = _tiles(run.best, run.reference, None, run.unit) if run.best else ()
    return Headline(badge="Not finished", tone="unfinished", text=text, tiles=tiles)


def headline_of(result: SearchResult) -> Headline:
    """Return the verdict of a search with the figures of what it chose."""
    best = None if result.chosen is None else result.front[result.chosen]
    confirmed = next((c for c in result.confirmed if best is not None and c.name == best.name), None)
    unit = drop_unit((*result.baselines, *result.front))
    steps = []
    if best is not None:
        steps.append(Fact("put it in force", f"autoprec.apply(model, autoprec.Plan.load({_name(best.plan)!r}))"))
    if result.confirm:
        steps.append(Fact(f"on {result.device}, to confirm", result.confirm))
    if result.verdict.break_even_hours is not None:
        steps.append(
            Fact("the search has paid for itself after", f"{number(result.verdict.break_even_hours)} hours of use")
        )
    return Headline(
        badge=_BADGES[result.verdict.decision],
        tone=str(result.verdict.decision),
        text=result.verdict.text,
        tiles=_tiles(best, result.reference, confirmed, unit) if best else (),
        steps=tuple(steps),
    )


def _name(plan: str | None) -> str:
    """Return a plan's file without the folders of whoever ran the search."""
    return (plan or "plan.json").replace("\\", "/").rpartition("/")[2]


def _tiles(
    best: Measurement, reference: Measurement | None, confirmed: Confirmed | None, unit: str
) -> tuple[Tile, ...]:
    origin, found = best.origin, list[Tile]()
    if best.speedup is not None:
        value = f"{number(best.speedup)}x"
        found.append(Tile("times as fast as FP32", value, _note(best.speedup_ci95, origin.step_ms)))
    if best.step_ms is not None:
        beside = f", FP32 {number(reference.step_ms)} ms" if reference and reference.step_ms else ""
        note = _note(best.step_ms_ci95, origin.step_ms) + beside
        found.append(Tile("step time", f"{number(best.step_ms)} ms", note))
    if best.drop_percent is not None and best.drop is not None:
        note = f"{interval(best.drop, best.drop_ci95)} {unit}, {origin.drop}"
        found.append(Tile("drop", f"{number(best.drop_percent, 2)} %", note))
    if confirmed is not None and confirmed.high is not None:
        note = f"{unit}, {origin.drop}, on {confirmed.batches} unseen batches: {confirmed.answer}"
        found.append(Tile("drop confirmed, at most", number(confirmed.high), note))
    if best.peak_bytes is not None:
        beside = f", FP32 {bytes_text(reference.peak_bytes)}" if reference and reference.peak_bytes else ""
        found.append(Tile("peak memory", bytes_text(best.peak_bytes), f"{origin.peak_bytes}{beside}"))
    return tuple(found)


def _note(ci95: tuple[float, float] | None, origin: Origin | None) -> str:
    said = str(origin or "origin not recorded")
    return said if ci95 is None else f"{number(ci95[0])} to {number(ci95[1])} at 95 %, {said}"
