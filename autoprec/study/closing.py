"""A search from its first step to its end: what is chosen is tried on unseen batches, and the files are written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial

from optuna.storages import BaseStorage

from autoprec.errors import Interrupted
from autoprec.files import as_json
from autoprec.plan import Plan
from autoprec.quantities import duration_text
from autoprec.records import Explained, LargestBatch, Measurement, MemoryBreakdown, SearchResult
from autoprec.study.ahead import closing_seconds
from autoprec.study.appendix import memory_of, unit_times
from autoprec.study.baseline_runs import measure_baselines
from autoprec.study.baselines import RECOMMENDED
from autoprec.study.confirming import Confirming, confirmed
from autoprec.study.course import Course
from autoprec.study.explain import explain
from autoprec.study.finalists import trained_worse
from autoprec.study.front import measured_front
from autoprec.study.larger import largest_batches
from autoprec.study.lessons import learn
from autoprec.study.measuring import measure
from autoprec.study.outcome import Outcome, evidence, on_one_clock, outcome_of
from autoprec.study.trials import measure_trials
from autoprec.study.verdict import REFERENCE, wanted

__all__ = ["carry_out"]


def _confirm(course: Course) -> None:
    """Try what would be chosen on batches not seen yet, until a plan is shown to be within the limit."""
    if course.unseen is None:
        count = len(course.workload.batches)
        course.unconfirmed = f"not confirmed on unseen batches: {count} in all are too few; give 8 or more"
        return
    if course.limit_value <= 0:
        course.unconfirmed = "not confirmed on unseen batches: no number of them shows a drop of nothing at all"
        return
    rows = course.measured()
    front = measured_front(on_one_clock(rows), course.plans.names)
    course.news("confirmation", f"on {len(course.unseen.batches)} batches not used so far")
    setting = Confirming(
        unseen=course.unseen,
        drop_unit=course.drop_unit,
        limit=course.limit_value,
        earlier=[m.batch_drops for m in rows if m.batch_drops],
        plan_of=partial(_plan_of, course),
        has_time=lambda: course.budget.left > 0,
        measure=partial(measure, worker=course.worker, budget=course.budget) if course.worker else None,
        forecast=course.forecast,
        also=partial(trained_worse, course),
    )
    course.confirmed, course.unconfirmed = confirmed(
        setting, _noted(course, wanted(front, course.plans.names, course.limit))
    )
    for one in course.confirmed:
        course.news("confirmation", f"{one.name}: {one.reason or 'within the limit'}")


def _noted(course: Course, plans: Iterator[Measurement]) -> Iterator[Measurement]:
    for plan in plans:
        course.news("confirmation", f"trying {plan.name}", closing_seconds(course))
        yield plan


def _finish(course: Course, teach: bool = False) -> SearchResult:
    """Write result.json and, where there is something to do, plan.json; return the result."""
    ledger = course.ledger
    assert ledger.reference is not None
    spent = ledger.sum_up(course.budget.elapsed, course.evaluations)
    bound, before = course.bound(), ledger.reference.step_ms
    ledger.replace(on_one_clock([ledger.reference, *(row.measurement for row in ledger.rows)]))
    # what the sampler believes is on the clock that the trials were told on
    clock = (ledger.reference.step_ms or 1.0) / (before or 1.0)
    if bound:
        bound["step_ms"] *= clock
    outcome = outcome_of(
        course.measured(),
        course.plans.names,
        course.limit,
        spent["seconds"],
        course.confirmed,
        course.unconfirmed,
        course.beside,
    )
    plan_path = course.folder.path / "plan.json"
    if outcome.best is not None:
        _plan_of(course, outcome.best).save(plan_path)
        outcome = outcome.with_plan(str(plan_path))
    else:
        plan_path.unlink(missing_ok=True)
    result = SearchResult(
        model_id=course.workload.model_id,
        device=course.device.name,
        mode=course.workload.mode,
        max_drop=str(course.limit),
        reference=ledger.reference,
        baselines=outcome.baselines,
        front=outcome.front,
        chosen=outcome.chosen,
        verdict=outcome.verdict,
        trials=sum(row.trial is not None for row in ledger.rows),
        evaluations=int(spent["evaluations"]),
        seconds=spent["seconds"],
        predicted_bound=bound,
        removed=(*course.space.removed, *course.vetoes),
        folder=str(course.folder.path),
        seed=course.seed,
        confirmed=course.confirmed,
        trained=tuple(course.trained),
        explained=_explained(course, outcome.best, clock),
        largest_batches=_largest_batches(course, outcome),
        notes=tuple(filter(None, (*course.notes, *course.folder.patience.taken(), course.unconfirmed))),
        confirm=_on_the_card(course, outcome.best),
        setting=course.setting,
        memory=_memory(course, outcome),
        unit_ms=unit_times(course.forecast),
    )
    course.folder.write("result.json", as_json(result))
    if teach:
        best = result.reference if result.chosen is None else result.front[result.chosen]
        course.news("done", learn(course, best.assignment))
    course.news("done", outcome.verdict.text)
    return result


def _on_the_card(course: Course, best: Measurement | None) -> str | None:
    """Return what to run on a device that is not here, with the same data options; None where all was measured."""
    if course.forecast is None:
        return None
    name, where = shlex.quote(course.workload.model_id), shlex.quote(str(course.folder.path))
    return f"autoprec verify {where} {name}" if best is not None else f"autoprec search {name}"


def _explained(course: Course, best: Measurement | None, clock: float) -> tuple[Explained, ...]:
    """Explain the plan to use, as far as it lies in the space and trials told something; times on another clock."""
    if best is None or course.sampler is None or best.step_ms is None:
        return ()
    return explain(
        course.space,
        best.assignment,
        {
            name: {choice: one.on_clock(clock) for choice, one in own.items()}
            for name, own in course.ledger.believed(course.sampler).items()
        },
        course.known,
        limit=course.limit_value,
        step_ms=best.step_ms,
        drop_unit=course.drop_unit,
        vetoes=course.vetoes,
    )


def _largest_batches(course: Course, outcome: Outcome) -> tuple[LargestBatch, ...]:
    """Return what batch fits FP32, the best uniform plan and the plans of the front."""
    uniform = outcome.verdict.best_uniform
    kept = [m for m in outcome.baselines if m.name in (REFERENCE, uniform)]
    plans = {m.name: (m, _plan_of(course, m)) for m in (*kept, *outcome.front)}
    rows, length = course.workload.batch_shape
    return tuple(largest_batches(course.workload, course.space, course.device, plans, rows, length))


def _memory(course: Course, outcome: Outcome) -> dict[str, MemoryBreakdown]:
    """Return what holds the memory of FP32, the best uniform plan and the chosen one."""
    shown = {REFERENCE, outcome.verdict.best_uniform, outcome.best.name if outcome.best else None}
    plans = {m.name: _plan_of(course, m) for m in course.measured() if m.name in shown and m.assignment}
    return memory_of(course.workload, course.space.profile, course.device, plans)


def _plan_of(course: Course, found: Measurement) -> Plan:
    """Return the plan of a measurement, with its figures as evidence."""
    fixed = {b.name: b.plan for b in course.plans.baselines} | {RECOMMENDED: course.plans.recommended}
    same = fixed.get(found.name)
    plan = same if same is not None and same.assignment == found.assignment else course.plan(found.assignment)
    return plan.with_evidence(
        evidence(
            found,
            course.device,
            drop_unit=course.drop_unit,
            weights_digest=course.ledger.weights_digest,
            seed=course.seed,
        )
    )


def carry_out(
    course: Course,
    storage: str | BaseStorage | None,
    resume: bool,
    force: bool,
    teach: bool = False,
) -> SearchResult:
    """Measure until the budget is spent, and return the result, which is written by then.

    Args:
        teach: what was found goes into the user's own table, for the recommender.
    """
    course.ledger = course.open(storage, resume, force)
    try:
        return _carry_out(course, teach)
    finally:
        course.ledger.close()


def _carry_out(course: Course, teach: bool) -> SearchResult:
    try:
        course.probe()
        measure_baselines(course)
        measure_trials(course)
        course.ledger.refresh()
        _confirm(course)
    except KeyboardInterrupt:
        course.ledger.stop()
        where = course.folder.path
        raise Interrupted(
            f"interrupted after {duration_text(course.budget.elapsed)}; what was measured is in {where}. Go on with: "
            f"autoprec search {shlex.quote(course.workload.model_id)} --resume --out {shlex.quote(str(where))}",
            folder=str(where),
            result=_finish(course) if course.ledger.reference else None,
        ) from None
    return _finish(course, teach)
