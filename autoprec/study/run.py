"""`search`: measure baselines, then assignments that Optuna proposes, until the budget is spent; then the verdict.

The budget is wall clock and covers everything. The clock is read before each measurement and compared with what
the last ones took, so a search ends at most one measurement late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, get_storage
from optuna.trial import Trial, TrialState

from autoprec.errors import DeviceError, Interrupted, StudyError
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.plan import Evidence, Figure, Plan
from autoprec.probe.device import probe_device
from autoprec.probe.steps import Stepper, device_of, kept_state, plain_fp32, timed
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit, duration_seconds, duration_text
from autoprec.records import (
    DeviceProfile,
    Measurement,
    MeasurementOrigins,
    Mode,
    Origin,
    Progress,
    SearchResult,
)
from autoprec.recommender.recommender import recommend_plan
from autoprec.runtime.identity import weights_digest
from autoprec.study.baselines import Baseline, baselines, role_seeds
from autoprec.study.folder import RunFolder, fail_dead_trials, trials_csv
from autoprec.study.front import pareto_front
from autoprec.study.space import SearchSpace, build_space, describe
from autoprec.study.verdict import best_uniform, choose, decide

__all__ = ["search"]

News = Callable[[Progress], None]

#: a plan this many times slower than FP32 is stopped after its first step
_STOP_SLOWER = 3.0
#: proposals in a row that were measured before, after which the space counts as seen
_STALE = 200


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
    progress: News | None = None,
) -> SearchResult:
    """Search for the fastest assignment of formats whose drop is within a limit, by measuring.

    Args:
        workload: what is measured, on the device it is on.
        budget: wall clock for everything, as '20m' or seconds.
        trials: stop after this many trials of the space, if the budget lasts.
        max_drop: '0.25%' of the reference's loss, or nats as '0.005'.
        space: name of a shipped space (`default`, `roles`, `blocks`, `modules`) or path of a TOML file.
        device: `auto`, or the torch device the workload must be on.
        storage: an Optuna storage or its URL; None keeps a journal in the run folder.
        seed: of the sampler.
        out: the run folder; None makes `autoprec-runs/<time>-<model>/`.
        resume: go on with the search in `out`; a folder without one starts.
        progress: called with news as they come.

    Raises:
        StudyError: the folder is in use, holds another search, or the budget is too short for the baselines.
        DeviceError: `device` is not the workload's.
        Interrupted: Ctrl-C; everything measured is kept and `result` holds the front so far.
    """
    started = time.monotonic()
    seconds, limit = duration_seconds(budget), DropLimit.parse(max_drop)
    tell = progress or (lambda _: None)
    path = Path(out) if out is not None else _default_folder(workload)
    _check_device(workload, device)
    with RunFolder(path) as folder, _quiet_optuna():
        try:
            run = _Run(
                workload=workload,
                limit=limit,
                folder=folder,
                started=started,
                deadline=started + seconds,
                budget=seconds,
                tell=tell,
                seed=seed,
            )
            return run.go(space, trials, storage, resume)
        finally:
            folder.discard_if_new()


class _Run:
    """One search while it runs: what was measured so far, and the files it writes."""

    def __init__(
        self,
        *,
        workload: Workload,
        limit: DropLimit,
        folder: RunFolder,
        started: float,
        deadline: float,
        budget: float,
        tell: News,
        seed: int,
    ) -> None:
        self.workload, self.limit, self.folder = workload, limit, folder
        self.started, self.deadline, self.budget = started, deadline, budget
        self.tell, self.seed = tell, seed
        self.reference: Measurement | None = None
        #: (trial number, state, measurement), in the order they came
        self.rows: list[tuple[int | None, str, Measurement]] = []
        self.evaluations = 0
        self.last_seconds = 0.0
        self.space: SearchSpace
        self.device: DeviceProfile
        self.study: optuna.Study

    # the course of a search

    def go(
        self, space: str | Path, trials: int | None, storage: str | BaseStorage | None, resume: bool
    ) -> SearchResult:
        if self.folder.has_study() and not resume:
            raise StudyError(
                f"run folder {self.folder.path} holds a search already. Go on with it by --resume, "
                "or choose another folder with --out."
            )
        self._probe(space)
        self._check_budget()
        self._open(storage)
        try:
            self._measure_baselines()
            self._search(trials)
        except KeyboardInterrupt:
            fail_dead_trials(self.study)
            result = self._finish()
            raise Interrupted(
                f"interrupted after {duration_text(self._elapsed())}; what was measured is in {self.folder.path}. "
                f"Go on with: autoprec search {shlex.quote(self.workload.model_id)} --resume "
                f"--out {shlex.quote(str(self.folder.path))}",
                folder=str(self.folder.path),
                result=result,
            ) from None
        return self._finish()

    def _probe(self, space: str | Path) -> None:
        self._news("probe", "probing the device and the model's units")
        here = device_of(self.workload.model)
        self.device = probe_device(str(here), seconds=min(8.0, max(1.0, 0.05 * self.budget)))
        profile = probe_units(self.workload.model, model_id=self.workload.model_id)
        self.space = build_space(space, profile, self.device)
        self.profile = self.space.profile
        rows, positions = self._sizes()
        plan = recommend_plan(profile, self.device, mode=self.workload.mode, batch_size=rows, seq_len=positions)
        self.recommended = plan if self.profile is profile else None
        self.all_baselines = baselines(self.profile, self.device, self.workload.mode)

    def _sizes(self) -> tuple[int, int]:
        """Return batch size and sequence length as the recommender asks for them."""
        batch = self.workload.batches[0]
        tokens = max(1, self.workload.tokens(batch))
        first = next((v for v in batch.values() if hasattr(v, "shape")), None) if isinstance(batch, dict) else None
        rows = int(first.shape[0]) if first is not None and first.dim() > 0 else 1
        return rows, max(1, tokens // rows)

    def _check_budget(self) -> None:
        """Time one reference step and refuse a budget that cannot hold the baselines, before anything is written."""
        stepper = Stepper(self.workload)
        here = device_of(self.workload.model)
        training = self.workload.mode is Mode.TRAIN
        batch = self.workload.batches[0]
        with kept_state(self.workload.model, weights=training), plain_fp32(here.type):
            self.workload.model.train(training)
            first, _ = timed(here, lambda: stepper.run(batch))
            # the first step sets up kernels; the least of a few is the machine's own speed, unless steps are long
            again = [timed(here, lambda: stepper.run(batch))[0] for _ in range(1 if first > 2.0 else 5)]
            step = min(first, *again)
        # drop: both sides of every batch; time: the pairs beyond those; a training step is about 3 forwards
        forwards = 2 * len(self.workload.batches) * step / (3 if training else 1)
        gradients = 4 * step if training else 0.0
        pairs = 2 * step * (8 if training else max(0, 8 - len(self.workload.batches)))
        each = 1.2 * (forwards + gradients + pairs + 4 * step)
        need = self._elapsed() + each * (len([b for b in self.all_baselines if b.plan]) + 1)
        if need > self.budget:
            raise StudyError(
                f"a budget of {duration_text(self.budget)} is too short: the baselines alone take about "
                f"{duration_text(need)} (a reference step takes {step * 1e3:.0f} ms). Try --budget "
                f"{duration_text(2 * need)}, or fewer --batches, a smaller --batch-size or --seq-len."
            )
        self.last_seconds = each
        self._news("probe", f"a reference step takes {step * 1e3:.0f} ms", need - self._elapsed())

    def _open(self, storage: str | BaseStorage | None) -> None:
        """Open the study, check that it is this search's, and take over what it measured before."""
        chosen = self.folder.open_storage() if storage is None else get_storage(storage)
        self.study = optuna.create_study(
            study_name=f"autoprec-{self.profile.fingerprint[:12]}-{self.workload.mode}",
            storage=chosen,
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(multivariate=True, seed=self.seed, n_startup_trials=10),
        )
        identity = {
            "space": describe(self.space),
            "weights": weights_digest(self.workload.model),
            "data": self.workload.data_digest(),
            "device": self.device.name,
        }
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", identity)
        elif known != identity:
            differ = ", ".join(k for k in identity if known.get(k) != identity[k])
            raise StudyError(
                f"the search in {self.folder.path} was made with another {differ}; its figures do not compare. "
                "Use the same model, data and space, or choose another folder with --out."
            )
        self.folder.write("device.json", as_json(self.device))
        self.folder.write("units.json", as_json(self.profile))
        fail_dead_trials(self.study)
        self._take_over()

    def _take_over(self) -> None:
        for key, value in self.study.user_attrs.items():
            if key.startswith("baseline "):
                found = _measurement(value)
                self.rows.append((None, "COMPLETE" if found.drop is not None else "FAIL", found))
        for trial in self.study.get_trials(deepcopy=False):
            if "measurement" in trial.user_attrs:
                self.rows.append((trial.number, trial.state.name, _measurement(trial.user_attrs["measurement"])))
        reference = self.study.user_attrs.get("reference")
        self.reference = _measurement(reference) if reference else None

    # measuring

    def _measure_baselines(self) -> None:
        known = {m.name for _, _, m in self.rows}
        todo = [b for b in self.all_baselines if b.name not in known]
        for count, baseline in enumerate(todo):
            if baseline.plan is not None and self.reference is not None and not self._time_left():
                self._news("baselines", f"{baseline.name} is left out: the budget is spent")
                continue
            self._news("baselines", f"measuring {baseline.name}", (len(todo) - count) * self.last_seconds)
            found = self._baseline(baseline)
            self.study.set_user_attr(f"baseline {baseline.name}", as_json(found))
            self.rows.append((None, "COMPLETE" if found.drop is not None else "FAIL", found))
            self._write_trials()
            self._news("baselines", baseline.name, measurement=found)
        self._enqueue()

    def _baseline(self, baseline: Baseline) -> Measurement:
        if baseline.plan is None:
            return Measurement(name=baseline.name, assignment={}, reason=baseline.reason)
        if self.reference is None:
            # the reference against itself: its speedup is the noise of this machine
            found = self._evaluate(baseline.plan, baseline.name)
            self.reference = dataclasses.replace(
                found, name="reference", drop=0.0, drop_ci95=None, drop_percent=0.0, speedup=1.0, speedup_ci95=None
            )
            self.study.set_user_attr("reference", as_json(self.reference))
            return found
        return self._evaluate(baseline.plan, baseline.name)

    def _enqueue(self) -> None:
        """Ask for the recommender's plan first, then for plans that set one role apart."""
        if self.study.get_trials(deepcopy=False):
            return
        wanted = [self.space.of_plan(self.recommended)] if self.recommended else []
        wanted += [self.space.choices(seed) for seed in role_seeds(self.profile, self.space.ambient)]
        for index, choices in enumerate(wanted):
            if choices is not None:
                name = "recommended" if index == 0 and self.recommended else f"seed {index}"
                self.study.enqueue_trial(choices, user_attrs={"name": name}, skip_if_exists=True)

    def _search(self, trials: int | None) -> None:
        distributions = {d.name: CategoricalDistribution([str(f) for f in d.formats]) for d in self.space.decisions}
        seen = {_key(m.assignment): m for n, _, m in self.rows if n is not None}
        done = len(seen)
        stale = 0
        while (
            self._time_left() and (trials is None or done < trials) and stale < _STALE and len(seen) < self.space.size
        ):
            trial = self.study.ask(distributions)  # type: ignore[arg-type]
            assignment = self.space.assignment(trial.params)
            before = seen.get(_key(assignment))
            if before is not None:
                stale += 1
                self._tell_study(trial, before)
                continue
            stale = 0
            found = self._trial(trial, assignment)
            seen[_key(assignment)] = found
            done += 1
            left = (trials - done) * self.last_seconds if trials is not None else self.deadline - time.monotonic()
            self._news("search", found.name, max(0.0, left), trial=trial.number, measurement=found)
        if stale >= _STALE or len(seen) >= self.space.size:
            self._news("search", f"the space of {self.space.size} assignments is seen")

    def _trial(self, trial: Trial, assignment: Mapping[str, Format]) -> Measurement:
        name = trial.user_attrs.get("name", f"trial {trial.number}")
        plan = self._plan(assignment)
        found = self._evaluate(plan, name)
        trial.set_user_attr("measurement", as_json(found))
        self._tell_study(trial, found)
        self.rows.append((trial.number, "COMPLETE" if found.drop is not None else "FAIL", found))
        self._write_trials()
        return found

    def _tell_study(self, trial: Trial, found: Measurement) -> None:
        """Tell Optuna the objectives, and by how far each limit is kept (at most 0) or missed."""
        if found.drop is None or found.step_ms is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        over = (found.drop_percent or 0.0) if self.limit.percent else found.drop
        trial.set_constraint("drop", over - self.limit.value)
        if found.grad_error is not None and found.grad_error_limit is not None:
            trial.set_constraint("grad_error", found.grad_error - found.grad_error_limit)
        self.study.tell(trial, [found.drop, found.step_ms])

    def _evaluate(self, plan: Plan, name: str) -> Measurement:
        begun = time.monotonic()
        clock = self.reference.step_ms if self.reference else None
        found = evaluate(
            Request(
                workload=self.workload,
                plan=plan,
                name=name,
                reference_ms=clock,
                timing_seconds=max(0.5, 0.01 * self.budget),
                stop_slower=None if self.reference is None else _STOP_SLOWER,
            )
        )
        self.evaluations += 1
        if found.drop is not None:
            self.last_seconds = time.monotonic() - begun
        return found

    def _plan(self, assignment: Mapping[str, Format]) -> Plan:
        return Plan.assign(
            self.profile,
            assignment,
            ambient=self.space.ambient,
            device=self.device,
            mode=self.workload.mode,
            reason={n: f"{f} in the measured plan chosen by the search" for n, f in assignment.items()},
        )

    # the end

    def _finish(self) -> SearchResult:
        """Write result.json and, where there is something to do, plan.json; return the result."""
        names = {b.name for b in self.all_baselines}
        measured = [m for _, _, m in self.rows]
        uniform = best_uniform([m for m in measured if m.name in names], self.limit)
        measured = [_over_uniform(m, uniform) for m in measured]
        bases = tuple(m for m in measured if m.name in names)
        front = pareto_front(measured)
        chosen = choose(front, names, self.limit)
        if chosen is not None and front[chosen].name == "uniform fp32":
            chosen = None
        elapsed = self._elapsed()
        verdict = decide(front, chosen, bases, self.limit, elapsed / 3600)
        if chosen is not None:
            path = self.folder.path / "plan.json"
            self._evidenced(front[chosen]).save(path)
            front[chosen] = dataclasses.replace(front[chosen], plan=str(path))
        else:
            (self.folder.path / "plan.json").unlink(missing_ok=True)
        result = SearchResult(
            model_id=self.workload.model_id,
            device=self.device.name,
            mode=self.workload.mode,
            max_drop=str(self.limit),
            reference=self.reference or Measurement(name="reference", assignment={}, origin=MeasurementOrigins()),
            baselines=bases,
            front=tuple(front),
            chosen=chosen,
            verdict=verdict,
            trials=sum(n is not None for n, _, _ in self.rows),
            evaluations=self.evaluations,
            seconds=elapsed,
            predicted_bound=None,
            removed=self.space.removed,
            folder=str(self.folder.path),
            seed=self.seed,
        )
        self.folder.write("result.json", as_json(result))
        self._write_trials()
        self._news("done", verdict.text)
        return result

    def _evidenced(self, found: Measurement) -> Plan:
        """Return the plan of a measurement with its figures as evidence."""
        baseline = next((b.plan for b in self.all_baselines if b.name == found.name), None)
        plan = baseline or self._plan(found.assignment)
        unit = "nats" if self.reference is None or found.loss_rise is not None else "nats or relative squared error"
        figure = _figure(found)
        return plan.with_evidence(
            Evidence(
                drop=figure(found.drop, found.drop_ci95, unit),
                step_ms=figure(found.step_ms, found.step_ms_ci95, "ms"),
                speedup=figure(found.speedup, found.speedup_ci95, "times FP32"),
                peak_bytes=figure(found.peak_bytes, None, "bytes"),
                weights_digest=self.study.user_attrs["identity"]["weights"],
                versions=dict(self.device.versions),
                seed=self.seed,
            )
        )

    # small things

    def _write_trials(self) -> None:
        trials_csv(self.folder.path / "trials.csv", self.rows)

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _time_left(self) -> bool:
        return time.monotonic() + self.last_seconds <= self.deadline

    def _news(
        self,
        stage: str,
        message: str,
        eta: float | None = None,
        *,
        trial: int | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        self.tell(
            Progress(
                stage=stage,
                message=message,
                elapsed_seconds=self._elapsed(),
                eta_seconds=eta,
                trial=trial,
                measurement=measurement,
            )
        )


def _check_device(workload: Workload, device: str) -> None:
    here = device_of(workload.model)
    if device != "auto" and device.partition(":")[0] != here.type:
        raise DeviceError(
            f"a search measures where the model is, and this one is on {here}, not on '{device}'. Load it there, or "
            "use autoprec recommend --device for a device that is not here."
        )


def _default_folder(workload: Workload) -> Path:
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(workload.model_id).name)
    return Path("autoprec-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug or 'model'}"


def _measurement(data: Any) -> Measurement:
    return from_json(Measurement, data, what="a measurement in the study", error=StudyError)


def _key(assignment: Mapping[str, Format]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(choice)) for name, choice in assignment.items()))


def _over_uniform(found: Measurement, uniform: Measurement | None) -> Measurement:
    if uniform is None or not uniform.speedup or found.speedup is None:
        return found
    return dataclasses.replace(found, speedup_over_uniform=found.speedup / uniform.speedup)


def _figure(found: Measurement) -> Callable[[float | None, tuple[float, float] | None, str], Figure | None]:
    origin = found.origin.drop or Origin.MEASURED

    def make(value: float | None, ci95: tuple[float, float] | None, unit: str) -> Figure | None:
        return None if value is None else Figure(value=value, ci95=ci95, unit=unit, origin=origin)

    return make


@contextlib.contextmanager
def _quiet_optuna() -> Any:
    """Keep Optuna's log to warnings for the length of a search: it prints every parameter of every trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
