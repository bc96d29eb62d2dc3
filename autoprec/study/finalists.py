"""The finalist of a search for training, trained for some steps beside FP32, within the budget."""

from __future__ import annotations

import time
from collections.abc import Callable

from autoprec.plan import Plan
from autoprec.probe.workload import Workload
from autoprec.records import Mode, TrainingConfirmation, TrainingPace, TrainingVerdict
from autoprec.study.course import Course
from autoprec.study.worker import WorkerLost
from autoprec.training import confirm_training, training_pace

__all__ = ["trained_worse", "training_ahead"]

SEEDS = 3
#: below that a loss has hardly moved, above that `autoprec verify --train-steps` is the place
_FEWEST, _MOST = 10, 60
#: forwards that a step takes, optimizer included; and how many times as long one in emulated formats takes (1.9 to 2.1
#: were seen on the demo model)
_STEP, _EMULATED = 4.0, 2.0
#: of what is left of the budget: beside other work training took up to 1.25 times what its first steps promised
_SHARE = 0.8


def trained_worse(course: Course, name: str, plan: Plan) -> str | None:
    """Train a plan beside FP32 as long as the budget allows; return why it is not to be chosen, None where it may be.

    A verdict of `undecided` does not stand against a plan: so few steps and seeds can show harm, not its absence.
    """
    if course.workload.mode is not Mode.TRAIN:
        return None
    try:
        found = _trained(course, name, plan)
    except WorkerLost as error:
        return f"training it could not be carried out: {error}"
    if found is None:
        course.notes.append(
            f"{name} was not trained: the budget's rest is too short. Train it: autoprec verify … --train-steps 200"
        )
        return None
    course.trained.append(found)
    course.news("confirmation", f"{name}: {_sentence(found)}")
    return _sentence(found) if found.arms[0].verdict is TrainingVerdict.WORSE else None


def _trained(course: Course, name: str, plan: Plan) -> TrainingConfirmation | None:
    """Train as many steps as the budget has time for; None where these are too few."""
    # a guess that may be off by the emulation's own factor: past that the steps that tell the pace are not worth it
    if _expected(course).seconds(_FEWEST, SEEDS) > _EMULATED * course.budget.left:
        return None
    unseen = course.unseen.batches if course.unseen is not None else ()
    workload = course.workload.with_batches([*course.workload.batches, *unseen])
    emulate = course.forecast is not None
    pace = _pace(course, workload, plan, emulate)
    each = _SHARE * course.budget.left / SEEDS - pace.ends_seconds
    steps = min(_MOST, int(each / max(pace.step_seconds, 1e-9)))
    if steps < _FEWEST:
        return None
    course.news("confirmation", f"training {name} beside FP32, {steps} steps, {SEEDS} seeds")
    tell = _telling(course, pace.seconds(steps, SEEDS))
    plans = {name: plan}
    if course.worker is None:
        return confirm_training(workload, plans, steps=steps, seeds=SEEDS, emulate=emulate, tell=tell)
    return course.worker.confirm_training(
        workload, plans, steps=steps, seeds=SEEDS, emulate=emulate, tell=tell, seconds=course.budget.left
    )


def _pace(course: Course, workload: Workload, plan: Plan, emulate: bool) -> TrainingPace:
    if course.worker is None:
        return training_pace(workload, plan, emulate=emulate)
    return course.worker.training_pace(workload, plan, emulate=emulate, seconds=course.budget.left)


def _telling(course: Course, seconds: float) -> Callable[[str], None]:
    """Return what tells of each run as it begins, and the end of them all; runs of FP32 and the plan take turns.

    Args:
        seconds: that all runs are expected to take, until those of a seed are over.
    """
    begun, runs, total = time.monotonic(), 0, seconds

    def tell(text: str) -> None:
        nonlocal runs, total
        gone = time.monotonic() - begun
        if runs and runs % 2 == 0:
            total = gone * 2 * SEEDS / runs
        runs += 1
        course.news("confirmation", text, max(0.0, total - gone))

    return tell


def training_ahead(course: Course) -> float:
    """Return what training a finalist takes where the budget leaves time enough."""
    if course.workload.mode is not Mode.TRAIN:
        return 0.0
    return _expected(course).seconds(_MOST, SEEDS)


def _expected(course: Course) -> TrainingPace:
    """Return a pace by the forward alone: of the quarter of batches held out, and of as many others, after each run."""
    batches = len(course.workload.batches) + (len(course.unseen.batches) if course.unseen else 0)
    ends, plan = 2 * max(1, batches // 4), 1.0 if course.forecast is None else _EMULATED
    each = course.forward_seconds
    return TrainingPace(step_seconds=(1 + plan) * _STEP * each, ends_seconds=2 * ends * each)


def _sentence(found: TrainingConfirmation) -> str:
    arm = found.arms[0]
    return f"trained for {found.steps} steps it is {arm.verdict}: {arm.reason}"
