"""What a finished search teaches the recommender: its units go into the user's own table, as shapes and figures."""

from __future__ import annotations

from collections.abc import Mapping

from autoprec.errors import AutoprecError
from autoprec.formats import Format
from autoprec.predict.setup import Optimizer, Setup
from autoprec.probe.described import module_facts
from autoprec.quantities import DropLimit
from autoprec.recommender.advice import Situation, base_choice, tf32_choice
from autoprec.recommender.features import unit_facts
from autoprec.recommender.gains import gains
from autoprec.recommender.lessons import unit_rows
from autoprec.recommender.table import add_rows
from autoprec.records import Mode, Support
from autoprec.study.course import Course

__all__ = ["learn"]


def learn(course: Course, assignment: Mapping[str, Format]) -> str:
    """Add a finished search's units with the formats they got to the user's table, and return what was done.

    Nothing is added where the device has no native low format, since then nothing was learned. A table that cannot be
    written is said, not raised.
    """
    profile, device, workload = course.space.profile, course.device, course.workload
    percent = 100 * course.limit_value / course.scale
    rows, length = workload.batch_shape
    setup = Setup(
        mode=workload.mode,
        batch_size=rows,
        seq_len=length,
        optimizer=Optimizer.ADAMW if workload.mode is Mode.TRAIN else None,
        device_kind=device.kind,
    )
    here = Situation(
        device=device,
        mode=workload.mode,
        tokens=setup.tokens,
        class_name=profile.class_name,
        max_drop=DropLimit(percent, percent=True),
    )
    half = base_choice(here).format
    if half is Format.FP32:
        return "nothing for the recommender to learn: no low format is native here"
    facts = unit_facts(profile, course.outliers)
    fp8 = device.supports(Format.FP8) is Support.NATIVE
    found = gains(
        profile,
        facts,
        device,
        setup,
        module_facts(workload.model),
        half=half,
        recipe=device.fp8_recipes[0] if fp8 and device.fp8_recipes else None,
        tf32=tf32_choice(here)[0],
    )
    drops: dict[str, dict[Format, float]] = {}
    for row in course.known.drops if course.known else ():
        drops.setdefault(row.unit, {})[row.format] = 100 * row.drop.value / course.scale
    may_fp8 = {d for decision in course.space.decisions if Format.FP8 in decision.formats for d in decision.units}
    made = unit_rows(facts, found, device, setup, percent, assignment, drops, may_fp8, origin="search")
    try:
        path = add_rows(list(made.values()))
    except AutoprecError as fault:
        return f"the recommender learned nothing: {fault}"
    return f"{len(made)} units added to {path}, which `autoprec recommend` uses from now on"
