"""The finalist of a search for training, trained for some steps beside FP32, within the budget."""

from __future__ import annotations

from autoprec.plan import Plan
from autoprec.records import Mode, TrainingConfirmation, TrainingVerdict
from autoprec.study.course import Course
from autoprec.study.worker import WorkerLost
from autoprec.training import confirm_training

__all__ = ["trained_worse", "training_ahead"]

SEEDS = 3
#: below that a loss has hardly moved, above that `autoprec verify --train-steps` is the place
_FEWEST, _MOST = 10, 60
#: forwards a step takes, optimizer and noise of the machine included
_STEP = 4.0


def trained_worse(course: Course, name: str, plan: Plan) -> str | None:
    """Train a plan beside FP32 as long as the budget allows; return why it is not to be chosen, None where it may be.

    A verdict of `undecided` does not stand against a plan: so few steps and seeds can show harm, not its absence.
    """
    if course.workload.mode is not Mode.TRAIN:
        return None
    unseen = course.unseen.batches if course.unseen is not None else ()
    workload = course.workload.with_batches([*course.workload.batches, *unseen])
    each = course.budget.left / (2 * SEEDS) - _ends_seconds(course)
    steps = min(_MOST, int(each / (_STEP * course.forward_seconds)))
    if steps < _FEWEST:
        course.notes.append(
            f"{name} was not trained: the budget's rest is too short. Train it: autoprec verify … --train-steps 200"
        )
        return None
    ahead = min(course.budget.left, _training_seconds(course, steps))
    course.news("confirmation", f"training {name} beside FP32, {steps} steps, {SEEDS} seeds", ahead)
    emulate, plans = course.forecast is not None, {name: plan}
    if course.worker is None:
        found = confirm_training(workload, plans, steps=steps, seeds=SEEDS, emulate=emulate)
    else:
        try:
            found = course.worker.confirm_training(
                workload, plans, steps=steps, seeds=SEEDS, emulate=emulate, seconds=course.budget.left
            )
        except WorkerLost as error:
            return f"training it could not be carried out: {error}"
    course.trained.append(found)
    course.news("confirmation", f"{name}: {_sentence(found)}")
    return _sentence(found) if found.arms[0].verdict is TrainingVerdict.WORSE else None


def training_ahead(course: Course) -> float:
    """Return what training a finalist takes where the budget leaves time enough."""
    if course.workload.mode is not Mode.TRAIN:
        return 0.0
    return _training_seconds(course, _MOST)


def _training_seconds(course: Course, steps: int) -> float:
    return 2 * SEEDS * (steps * _STEP * course.forward_seconds + _ends_seconds(course))


def _ends_seconds(course: Course) -> float:
    """Return what the forwards after each run take: of the quarter of batches held out, and of as many others."""
    batches = len(course.workload.batches) + (len(course.unseen.batches) if course.unseen else 0)
    return course.forward_seconds * 2 * max(1, batches // 4)


def _sentence(found: TrainingConfirmation) -> str:
    arm = found.arms[0]
    return f"trained for {found.steps} steps it is {arm.verdict}: {arm.reason}"
