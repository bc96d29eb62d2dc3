"""What a comparison comes to: the fastest of the plans that keep the quality people commonly ask for."""

from __future__ import annotations

from collections.abc import Iterable

from autoprec.records import ComparedPlan, Figure, PlanComparison, Target, TargetName, TargetOutcome, TrainingVerdict
from autoprec.report.figures import figure_text, number, value_text
from autoprec.report.headline import Headline, Tile

__all__ = ["answer_of", "drop_target", "fastest_kept"]


def drop_target(found: PlanComparison) -> Target | None:
    """Return the limit that drops were held against; None where there is none."""
    every = (target for row in found.plans for target in row.targets if target.name is TargetName.DROP)
    return next(every, None)


def fastest_kept(found: PlanComparison) -> ComparedPlan | None:
    """Return the fastest plan that is faster than FP32 and whose drop is within the limit, both with whole intervals.

    None where there is no such plan. One that training showed to be worse is none.
    """
    kept = [row for row in found.plans if _is_kept(row) and row.speedup is not None and _low(row.speedup) > 1.0]
    return max(kept, key=lambda row: row.speedup.value if row.speedup else 0.0, default=None)


def answer_of(found: PlanComparison) -> Headline:
    """Return the verdict of a comparison, with the figures it rests on."""
    best, target = fastest_kept(found), drop_target(found)
    limit = f"{target.limit:g} {target.unit}" if target else "the limit"
    if best is None:
        text = (
            f"No plan compared is faster than FP32 with a drop under {limit}, both with their whole intervals: none of "
            "them is shown to be worth its drop here."
        )
        return Headline(badge="Stay with FP32", tone="do-nothing", text=text)
    assert best.speedup is not None and best.drop is not None
    text = (
        f"{best.name} is the fastest of those whose drop is under {limit} with its whole interval: "
        f"{_said(best.speedup)} as fast as FP32, drop {_said(best.drop)}."
    )
    alike = [row.name for row in found.plans if row is not best and _is_kept(row) and _meets(row, best)]
    if alike:
        text += f" Within noise {' and '.join(alike)} {'is' if len(alike) == 1 else 'are'} as fast."
    return Headline(badge=f"Use {best.name}", tone="use-plan", text=text, tiles=tuple(_tiles(best)))


def _is_kept(row: ComparedPlan) -> bool:
    worse = row.trained is not None and row.trained.verdict is TrainingVerdict.WORSE
    return not worse and any(t.name is TargetName.DROP and t.outcome is TargetOutcome.MET for t in row.targets)


def _meets(one: ComparedPlan, other: ComparedPlan) -> bool:
    """Say whether the intervals of two speedups meet."""
    if one.speedup is None or other.speedup is None:
        return False
    return _low(one.speedup) <= _high(other.speedup) and _low(other.speedup) <= _high(one.speedup)


def _low(figure: Figure) -> float:
    return figure.ci95[0] if figure.ci95 else figure.value


def _high(figure: Figure) -> float:
    return figure.ci95[1] if figure.ci95 else figure.value


def _said(figure: Figure) -> str:
    return f"{figure_text(figure)} ({figure.origin})"


def _tiles(best: ComparedPlan) -> Iterable[Tile]:
    trained = best.trained
    named = {
        "times as fast as FP32": best.speedup,
        "step time": best.step_ms,
        "memory at the peak": best.peak_bytes,
        "memory saved": best.memory_saved,
        "drop": best.drop,
        "loss after training, less FP32's": trained.loss_change if trained else None,
    }
    for name, figure in named.items():
        if figure is not None:
            ends = figure.ci95
            note = f"{number(ends[0])} to {number(ends[1])} at 95 %, " if ends else ""
            yield Tile(name, value_text(figure), f"{note}{figure.origin}")
