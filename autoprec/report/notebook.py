"""How results, plans and recommendations show themselves in a notebook: the report's parts, without its script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from autoprec.plan import Plan
from autoprec.records import SearchResult
from autoprec.report.figures import drop_unit
from autoprec.report.grid import Grid, grid_of_assignment, grid_of_plan
from autoprec.report.headline import headline_of
from autoprec.report.plans import fact_lines, settings
from autoprec.report.tables import Fact, PlainTable, front_table
from autoprec.report.templates import asset, fill

__all__ = ["record_html"]


@runtime_checkable
class Recommended(Protocol):
    """A plan with what is said beside it; the recommender is above this floor."""

    @property
    def plan(self) -> Plan: ...

    def to_json(self) -> dict[str, Any]: ...


def record_html(record: Any) -> str:
    """Return a `SearchResult`, `Plan` or `Recommendation` as a piece of HTML, for `_repr_html_`.

    Raises:
        TypeError: another record.
    """
    if isinstance(record, SearchResult):
        return _result(record)
    if isinstance(record, Plan):
        return _page(record.model.id, _about(record), grid_of_plan(record), facts=_settings(record))
    if isinstance(record, Recommended):
        return _recommendation(record)
    raise TypeError(f"a {type(record).__name__} has no page")


def _result(result: SearchResult) -> str:
    best = None if result.chosen is None else result.front[result.chosen]
    unit = drop_unit((*result.baselines, *result.front))
    about = f"{result.mode} on {result.device}, limit {result.max_drop}, {result.trials} trials"
    grid = grid_of_assignment(best.assignment) if best and best.assignment else None
    folder = [Fact("run folder", result.folder)] if result.folder else []
    table = front_table(result.front, unit, result.chosen)
    return _page(result.model_id, about, grid, head=headline_of(result), table=table, facts=folder)


def _recommendation(record: Recommended) -> str:
    plan, document = record.plan, record.to_json()
    facts = [Fact("why", reason) for reason in document["reasons"]]
    facts += [Fact("memory (predicted)", "; ".join(fact_lines(_plain(document["memory"]))))]
    facts += [Fact("expected", line) for line in fact_lines(document["expected"])]
    return _page(plan.model.id, f"recommended: {_about(plan)}", grid_of_plan(plan), facts=[*_settings(plan), *facts])


def _plain(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is single figures and words; tables of memory are the command line's."""
    return {k: v for k, v in memory.items() if not isinstance(v, dict | list)}


def _about(plan: Plan) -> str:
    where = "any device" if plan.device.name == "any" else f"{plan.device.name} ({plan.device.origin})"
    return f"{plan.model.class_name}, {plan.mode}, for {where}"


def _settings(plan: Plan) -> list[Fact]:
    return [Fact(name, text) for name, text in settings(plan).items()]


def _page(
    title: str,
    about: str,
    grid: Grid | None,
    *,
    head: Any = None,
    table: PlainTable | None = None,
    facts: list[Fact] | None = None,
) -> str:
    return fill(
        "notebook.html.j2",
        title=title,
        about=about,
        head=head,
        table=table,
        grid=grid,
        facts=facts or [],
        style=asset("style.css"),
    )
