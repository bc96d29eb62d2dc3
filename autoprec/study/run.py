"""`search`: measure baselines, then assignments that Optuna proposes, until the budget is spent; then the verdict.

The budget is wall clock and covers everything. The clock is read before each measurement and compared with what
the last ones took, so a search ends at most one measurement late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from optuna.storages import BaseStorage

from autoprec.errors import MeasurementError, StudyError
from autoprec.formats import Format
from autoprec.predict.forecast import Forecast
from autoprec.probe.device import probe_device
from autoprec.probe.outliers import weight_outliers
from autoprec.probe.steps import device_of
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit, duration_seconds
from autoprec.recommender.recommender import recommend_plan
from autoprec.records import DeviceProfile, FormatSupport, Mode, Progress, SearchResult, Support
from autoprec.runtime.fp8 import fp8_missing
from autoprec.runtime.identity import let_go, weights_digest
from autoprec.study.appendix import setting_of
from autoprec.study.away import absent_device, forecast_of, predictable
from autoprec.study.baselines import baselines
from autoprec.study.budget import Budget, first_look
from autoprec.study.closing import carry_out
from autoprec.study.confirming import split
from autoprec.study.course import Candidates, Course, News
from autoprec.study.folder import RunFolder
from autoprec.study.live import LiveReport
from autoprec.study.quiet import quiet_optuna
from autoprec.study.space import build_space
from autoprec.study.worker import Worker

__all__ = ["search"]

#: forwards that comparing a batch takes: the reference's, the plan's, and half a one to put it on and compare
_BOTH_SIDES = 2.5
#: of the budget, to train a finalist beside FP32
_TRAINING_SHARE = 0.15


def search(
    workload: Workload,
    budget: str | float = "20m",
    trials: int | None = None,
    max_drop: str | float | DropLimit = "0.25%",
    space: str | Path = "default",
    device: str = "auto",
    storage: str | BaseStorage | None = None,
    seed: int = 0,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: News | None = None,
    spent_seconds: float = 0.0,
    learn: bool = True,
    command: str | None = None,
    workers: Sequence[Worker] = (),
) -> SearchResult:
    """Search for the fastest assignment of formats whose drop is within a limit, by measuring.

    Args:
        workload: what is measured, on the device it is on; of eight batches or more the second half is kept for
            confirmation.
        budget: wall clock for everything, as '20m' or seconds.
        trials: stop after this many trials of the space, those of a resumed search counted, if the budget lasts.
        max_drop: '0.25%' of the reference's loss, or nats as '0.005'.
        space: name of a shipped space (`default`, `roles`, `blocks`, `modules`) or path of a TOML file.
        device: `auto`, or the torch device the workload must be on; or the name of a GPU that is not here: then drops
            are emulated on the workload's device, with that GPU's formats and CUDA's autocast lists, times and memory
            are predicted, and every figure says which.
        storage: an Optuna storage or its URL; None keeps a journal in the run folder. Several searches may be on one
            study of a database at a time, if each gives its URL, or an `RDBStorage` with a `heartbeat_interval`.
        seed: of the sampler.
        out: the run folder; None makes `autoprec-runs/<time>-<model>/`.
        resume: go on with the search in `out`; a folder without one starts.
        force: when resuming a search of another model, data, torch or device, measure again what it measured; what it
            had is kept beside.
        progress: called with news as they come.
        spent_seconds: of the budget, used before the call, as by loading the model.
        learn: when it is finished, its units go into the user's own table (below XDG_DATA_HOME; shapes and figures, no
            names), from which `recommend` learns.
        command: the line that asked for this search, for its report.
        workers: processes to measure in, which load the same workload; `workload` is then let go of its weights, and
            may be on another device. Several take trials side by side, and time one after the other. None: measurements
            run in this process, and what ends it ends the search.

    Raises:
        StudyError: folder or storage is in use, holds another search, or cannot be written; or the budget is too
            short for the baselines.
        MeasurementError: the reference cannot be measured.
        DeviceError: `device` is not the workload's, or nothing can be predicted for it.
        Interrupted: Ctrl-C; everything measured is kept and `result` holds the front so far.
    """
    started = time.monotonic() - spent_seconds
    clock, limit = Budget(duration_seconds(budget), started), DropLimit.parse(max_drop)
    path = Path(out) if out is not None else _default_folder(workload)
    here = torch.device(workers[0].loading.device) if workers else device_of(workload.model)
    away = absent_device(here, device)
    with RunFolder(path) as folder, quiet_optuna(), _old_objects_aside():
        try:
            if folder.has_study() and not resume:
                raise StudyError(
                    f"run folder {path} holds a search already. Go on with it by --resume, "
                    "or choose another folder with --out."
                )
            tell = LiveReport(path, progress or (lambda _: None))
            run = _prepare(workload, clock, trials, limit, space, folder, tell, seed, away, command, workers)
            return carry_out(run, storage, resume, force, learn)
        finally:
            folder.discard_if_new()


def _prepare(
    workload: Workload,
    budget: Budget,
    trials: int | None,
    limit: DropLimit,
    space: str | Path,
    folder: RunFolder,
    tell: News,
    seed: int,
    away: DeviceProfile | None,
    command: str | None,
    workers: Sequence[Worker],
) -> Course:
    """Probe device and model, build the space and the plans to start with, and check that the budget holds them.

    Args:
        away: the device to search for, where it is not the workload's.
        workers: where measurements run; none: in this process.
    """
    whole, (workload, unseen) = workload, split(workload)
    tell(Progress(stage="probe", message="probing the device and the model's units", elapsed_seconds=budget.elapsed))
    weights, profile = weights_digest(workload.model), probe_units(workload.model, model_id=workload.model_id)
    outliers = weight_outliers(workload.model, profile)
    here, workers, notes = _settle(workers, whole, workload, away, weights)
    worker = workers[0] if workers else None
    if away is not None:
        device = away = predictable(away)
    else:
        seconds = min(8.0, max(1.0, 0.05 * budget.seconds))
        device = _runnable((worker.probe_device if worker else probe_device)(str(here), seconds=seconds), here)
    built = build_space(space, profile, device)
    rows, length = workload.batch_shape
    forecast = None if away is None else forecast_of(workload, profile, away)
    plans = Candidates(
        baselines=tuple(baselines(built.profile, device, workload.mode)),
        recommended=recommend_plan(
            profile, device, mode=workload.mode, batch_size=rows, seq_len=length, outliers=outliers
        ),
    )
    look = worker.first_look() if worker else first_look(workload)
    count = sum(b.plan is not None for b in plans.baselines) + 1
    budget.expect(look, count, timed=forecast is None)
    tell(
        Progress(
            stage="probe",
            message=f"a reference step takes {look.step_seconds * 1e3:.0f} ms",
            elapsed_seconds=budget.elapsed,
        )
    )
    forward = look.step_seconds / (3 if workload.mode is Mode.TRAIN else 1)
    return Course(
        workload=workload,
        unseen=unseen,
        forward_seconds=forward,
        scale=look.scale,
        confirm_seconds=2 * _BOTH_SIDES * forward * len(unseen.batches) if unseen else 0.0,
        training_seconds=_TRAINING_SHARE * budget.seconds if unseen and workload.mode is Mode.TRAIN else 0.0,
        budget=budget,
        trials=trials,
        limit=limit,
        space=built,
        device=device,
        plans=plans,
        drop_unit=look.kind.drop_unit,
        folder=folder,
        tell=tell,
        seed=seed,
        setting=setting_of(
            workload, unseen, device, command=command, limit=limit, budget_seconds=budget.seconds, seed=seed
        ),
        forecast=forecast,
        workers=workers,
        weights=weights,
        outliers=outliers,
        notes=notes if forecast is None else [*notes, *_assumptions(forecast, here)],
    )


def _settle(
    workers: Sequence[Worker],
    whole: Workload,
    seen: Workload,
    away: DeviceProfile | None,
    weights: str,
) -> tuple[torch.device, tuple[Worker, ...], list[str]]:
    """Have the workers load, and let this process's weights go; return where measurements run, and what is to be said.

    A user's function that gives another model each time cannot be loaded twice: then this process measures.
    """
    if not workers:
        return device_of(whole.model), (), []
    here = torch.device(workers[0].loading.device)
    data = whole.data_digest()
    for worker in workers:
        opened = worker.open(whole, seen, away)
        if (opened.weights, opened.data) != (weights, data):
            break
    else:
        let_go(whole.model)
        return here, tuple(workers), []
    for worker in workers:
        worker.close()
    if here != device_of(whole.model):
        raise MeasurementError(
            f"{workers[0].loading.model} gives other weights or data each time it is called, so no process of its own "
            "can measure it. Draw them from a fixed seed, or call autoprec.search(workload) in Python."
        )
    return here, (), [f"measured in this process, because {whole.model_id} gives another model each time it is called"]


def _assumptions(forecast: Forecast, here: torch.device) -> list[str]:
    """Return what stands behind the figures of a device that is not here."""
    found = [
        f"{forecast.device.name} is not here: drops are emulated on {here.type} with its formats and CUDA's autocast "
        "lists, times and memory are predicted for eager steps"
    ]
    return [*found, *forecast.reference.doubts]


def _runnable(profile: DeviceProfile, here: torch.device) -> DeviceProfile:
    """Return the profile without FP8 where the device has it and the runtime does not, as without torchao."""
    missing = fp8_missing(here)
    if missing is None or profile.supports(Format.FP8) is Support.ABSENT:
        return profile
    formats = {**profile.formats, Format.FP8: FormatSupport(Support.ABSENT, missing)}
    return dataclasses.replace(profile, formats=formats, fp8_recipes=())


def _default_folder(workload: Workload) -> Path:
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(workload.model_id).name)
    # a file name has 255 bytes
    return Path("autoprec-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug[:60] or 'model'}"


@contextlib.contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Look for garbage only among what a search makes.

    Every measurement of memory begins with a collection, which takes a quarter of a second for the objects that
    torch and transformers alone hold.
    """
    if gc.get_freeze_count():  # someone else's
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
