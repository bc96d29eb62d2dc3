"""A comparison as one HTML file: verdict, charts, tables, targets, and how the figures were got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoprec.files import write_atomic
from autoprec.records import ComparedPlan, PlanComparison
from autoprec.report.compared import Row, figure_rows, target_titles, trained_rows
from autoprec.report.comparedchart import plans_chart, seeds_chart
from autoprec.report.comparedhead import answer_of, fastest_kept
from autoprec.report.figures import origins
from autoprec.report.html import whole_page
from autoprec.report.tables import Fact, PlainTable
from autoprec.report.trainingchart import training_charts

__all__ = ["comparison_page", "write_comparison"]


def write_comparison(path: Path, found: PlanComparison) -> None:
    """Write a comparison as a page, atomically.

    Raises:
        AutoprecError: the file cannot be written.
    """
    write_atomic(path, comparison_page(found))


def comparison_page(found: PlanComparison) -> str:
    """Return a comparison as HTML, about 5 MB, nearly all of it plotly's script.

    Not promised: that plans are told apart whose intervals meet; each was measured beside FP32.
    """
    rows = [found.reference, *found.plans]
    trained = [row for row in rows if row.trained is not None]
    known = origins(row.trained.loss.origin for row in trained if row.trained and row.trained.loss)
    training = list(training_charts([found.training], known)) if found.training else []
    plans, seeds = plans_chart(found), seeds_chart(found)
    size = [] if found.batches is None else [f"{found.batches} batches"]
    return whole_page(
        "comparison.html.j2",
        [chart for chart in (plans, seeds, *training) if chart is not None],
        title=f"Plans for {found.model_id}",
        subtitle=" · ".join([str(found.mode), f"on {found.device}", f"{len(found.plans)} plans beside FP32", *size]),
        source=f"a comparison on {found.device}",
        head=answer_of(found),
        plans_chart=plans,
        seeds_chart=seeds,
        training_charts=training,
        figures=_table(rows, figure_rows(found), _place(rows, fastest_kept(found))),
        trained=_table(trained, trained_rows(found), None) if trained else None,
        targets=_targets(found),
        reasons=[Fact(row.name, reason) for row in rows for reason in row.reasons],
        setting=_setting(found),
        origins=_origins(rows),
    )


def _place(rows: Sequence[ComparedPlan], best: ComparedPlan | None) -> int | None:
    return next((index for index, row in enumerate(rows) if row is best), None)


def _table(plans: Sequence[ComparedPlan], rows: Sequence[Row], marked: int | None) -> PlainTable:
    """Return a plan a row, with the figures that any plan has."""
    shown = [(title, say) for title, say in rows if any(say(plan) not in ("", "-") for plan in plans)]
    cells = tuple((plan.name, *(say(plan) for _, say in shown)) for plan in plans)
    words = int(bool(shown) and shown[0][0] == "units")  # which are no figures
    return PlainTable(("plan", *(title for title, _ in shown)), cells, range(1 + words, len(shown) + 1), marked)


def _targets(found: PlanComparison) -> PlainTable | None:
    titles = target_titles(found)
    if not titles:
        return None
    rows = tuple((row.name, *(str(target.outcome) for target in row.targets)) for row in found.plans)
    return PlainTable(("plan", *titles), rows, range(0))


def _setting(found: PlanComparison) -> list[Fact]:
    facts = [Fact("device", found.device), Fact("model", found.model_id), Fact("a step", str(found.mode))]
    if found.training is not None:
        one = found.training
        facts.append(Fact("training", f"{one.steps} steps, {one.seeds} seeds, learning rate {one.learning_rate:g}"))
        facts += [Fact("training", note) for note in one.notes]
    facts += [Fact("plan", f"{row.name}: {row.source}") for row in found.plans]
    facts.append(Fact("command", found.command or "from Python: compare_plans(…)"))
    released = ", ".join(f"{name} {release}" for name, release in sorted(found.versions.items()))
    return [*facts, Fact("versions", released or "not recorded"), *(Fact("note", note) for note in found.notes)]


def _origins(rows: Sequence[ComparedPlan]) -> PlainTable:
    """Return where each kind of figure comes from."""
    asked = {
        "drop": ([row.drop for row in rows], "against the FP32 run on the same batches, over examples"),
        "step time, speedup": ([row.step_ms for row in rows], "against the FP32 step, as a ratio"),
        "memory": ([row.peak_bytes for row in rows], "of one step"),
        "task metric": ([row.task_metric for row in rows], "over examples, the change paired by example"),
        "low-precision share": ([row.low_share for row in rows], "of the time of matmuls, attention and convolutions"),
        "trained": ([row.trained.loss for row in rows if row.trained], "over seeds, the change paired by seed"),
    }
    found = []
    for name, (figures, how) in asked.items():
        known = [figure.origin for figure in figures if figure is not None]
        if known:
            found.append((name, f"{origins(known)}: {how}"))
    return PlainTable(("figure", "origin"), tuple(found), range(0))
