"""The course of a search: probe, baselines, then what the sampler proposes.

It goes on until the budget is spent, or until there is nothing left to gain as far as can be predicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import Trial

from autoprec.errors import MeasurementError, StudyError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.measurement import Request
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.pacing import SAME
from autoprec.probe.sensitivity import probe_sensitivity
from autoprec.probe.speed import probe_speed
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit
from autoprec.records import (
    Confirmed,
    DeviceProfile,
    Measurement,
    Progress,
    SearchSetting,
    SensitivityProfile,
    SpeedProfile,
    Standing,
    TrainingConfirmation,
)
from autoprec.study.baselines import RECOMMENDED, Baseline
from autoprec.study.budget import Budget
from autoprec.study.crew import Crew
from autoprec.study.folder import RunFolder
from autoprec.study.knowledge import drop_priors, forecast_priors, sensitivity_of, speed_of, time_priors
from autoprec.study.ledger import Ledger
from autoprec.study.measuring import Outcome, outcome_of
from autoprec.study.opening import open_ledger
from autoprec.study.outcome import standing_of
from autoprec.study.protocol import Hopeless
from autoprec.study.sampler import FrontSampler
from autoprec.study.space import SearchSpace, describe
from autoprec.study.worker import Worker

__all__ = ["Candidates", "Course", "News"]

News: TypeAlias = Callable[[Progress], None]
_Key: TypeAlias = tuple[tuple[str, str], ...]

#: a plan this many times slower than FP32 is stopped after its first step
_STOP_SLOWER = 3.0
#: between looks at what other machines are at
_LOOK_SECONDS = 1.0
#: so many measurements in a row that cannot be carried out end a search: then it is not the plans
_FAULTS = 5
#: proposals in a row that were measured before, after which the space counts as seen
_STALE = 200
#: stages whose news tell what there is so far, beside each measurement
_STANDING = ("baselines", "search", "confirmation")
#: so many proposals in a row that are expected to add less than this share of the area under the corner end a search,
#: where no plan within the limit is predicted to be faster by more than what counts as the same
_IDLE, _NO_GAIN = 3, 1e-3
#: drops beyond this many limits, and under this part of one, are as good as one another to a search
_CORNER, _FLOOR = 10.0, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What is measured beside the trials: the baselines, and the recommender's plan where the space lacks it."""

    baselines: tuple[Baseline, ...]
    recommended: Plan | None

    @property
    def names(self) -> frozenset[str]:
        """Names of the baselines."""
        return frozenset(b.name for b in self.baselines)


@dataclass(slots=True, kw_only=True)
class Course:
    """One search while it runs."""

    workload: Workload
    budget: Budget
    limit: DropLimit
    space: SearchSpace
    device: DeviceProfile
    plans: Candidates
    drop_unit: str
    folder: RunFolder
    tell: News
    seed: int
    setting: SearchSetting
    #: batches that only confirmation sees; None where there are too few
    unseen: Workload | None
    #: of one batch
    forward_seconds: float
    #: what 100 % of drop is
    scale: float
    #: kept back for confirmation
    confirm_seconds: float
    #: digest of the model's weights
    weights: str
    #: where the device is not here: drops are emulated, times and memory predicted
    forecast: Forecast | None = None
    #: where measurements run, the first of them what is not a trial; none: in this process
    workers: tuple[Worker, ...] = ()
    notes: list[str] = field(default_factory=list)
    known: SensitivityProfile | None = None
    speed: SpeedProfile | None = None
    confirmed: tuple[Confirmed, ...] = ()
    #: finalists trained beside FP32
    trained: list[TrainingConfirmation] = field(default_factory=list)
    #: why nothing was confirmed
    unconfirmed: str | None = None
    evaluations: int = 0
    #: measurements in a row that could not be carried out at all
    faults: int = 0
    sampler: FrontSampler | None = None
    _said: str = ""
    #: what is known, from the moment the study is open
    ledger: Ledger = field(init=False)

    def open(self, storage: str | BaseStorage | None, resume: bool, force: bool) -> Ledger:
        """Open or begin the study, and write what is known of device and units."""
        self.folder.patience.tell = lambda text: self.news("storage", text)
        profile, mode = self.space.profile, self.workload.mode
        kind = "" if storage is None else self._kind(force)
        ledger = open_ledger(
            self.folder,
            storage,
            name=f"autoprec-{profile.fingerprint[:12]}-{mode}{kind}",
            identity={
                "model": profile.fingerprint,
                "mode": str(mode),
                "space": describe(self.space),
                "weights": self.weights,
                "data": self.workload.data_digest(),
                "device": self.device.name,
                "torch": torch.__version__,
            },
            setting=self.setting,
            limit=self.limit,
            resume=resume,
            force=force,
        )
        if storage is not None and ledger.rows:
            trials = sum(row.trial is not None for row in ledger.rows)
            self.news("storage", f"study {ledger.study.study_name} has {trials} trials already")
        self.folder.write("device.json", as_json(self.device))
        self.folder.write("units.json", as_json(profile))
        return ledger

    def _kind(self, force: bool) -> str:
        """Return what tells the studies of devices apart that share a storage: neither times nor drops are mixed.

        Raises:
            StudyError: the run folder holds figures of another device, and is not to be begun anew.
        """
        here = self.device.name, str(self.device.versions.get("torch"))
        before = self.folder.measured_on()
        if before not in (None, here):
            if not force:
                raise StudyError(
                    f"run folder {self.folder.path} holds a search on {' with torch '.join(before or here)}, and this "
                    f"is {' with torch '.join(here)}: a storage keeps them apart. Choose another folder with --out, or "
                    "begin anew in this one with --resume --force."
                )
            self.folder.set_aside()
        return f"-{self.device.name}-torch-{torch.__version__}"

    def probe(self) -> None:
        """Learn each unit's sensitivity and time; where one cannot be had, the search goes on without."""
        self.news("probe", "each unit's sensitivity")
        worker = self.worker
        self.known, why = sensitivity_of(
            self.workload,
            self.space,
            self.budget,
            self.folder,
            self.seed,
            self.tell,
            self.forward_seconds,
            worker.probe_sensitivity if worker else probe_sensitivity,
        )
        if self.known:
            self.scale = self.known.scale
        slow = None
        if self.forecast is None:
            self.news("probe", "what each unit takes")
            self.speed, slow = speed_of(
                self.workload,
                self.space,
                self.budget,
                self.folder,
                self.tell,
                self.forward_seconds,
                worker.probe_speed if worker else probe_speed,
            )
        self.notes += [text for text in (why, slow) if text]

    # measuring

    def measure_baselines(self) -> None:
        """Measure the baselines that are not known yet, and make them known to the sampler; of machines, one does."""
        with self.ledger.turn(self._wait):
            self._measure_baselines()

    def _wait(self, by: str) -> None:
        """Wait for the baselines that another machine measures."""
        if not self.budget.has_time():
            raise StudyError(f"the budget ended while {by} measured the baselines. Go on with --resume and more of it.")
        self._say_once("baselines", f"waiting for {by}, which measures the baselines for all")

    def _say_once(self, stage: str, text: str) -> None:
        if text != self._said:
            self.news(stage, text)
        self._said = text

    def _measure_baselines(self) -> None:
        known = {row.measurement.name for row in self.ledger.rows}
        wanted = list(self.plans.baselines)
        if self.plans.recommended and self.space.of_plan(self.plans.recommended) is None:
            wanted.append(Baseline(RECOMMENDED, self.plans.recommended))
        todo = [b for b in wanted if b.name not in known]
        for count, baseline in enumerate(todo):
            if baseline.plan is not None and self.ledger.reference is not None and not self.budget.has_time():
                self.news("baselines", f"{baseline.name} is left out: the budget is spent")
                continue
            ahead = sum(b.plan is not None for b in todo[count:])
            self.news("baselines", f"measuring {baseline.name}", ahead * self.budget.each_seconds)
            found = self._baseline(baseline)
            self.ledger.add_baseline(found)
            self.news("baselines", baseline.name, measurement=found)
        # a kill may have come between any two of these
        self._tell_baselines()
        self._enqueue()

    def _baseline(self, baseline: Baseline) -> Measurement:
        if baseline.plan is None:
            return Measurement(name=baseline.name, assignment={}, reason=baseline.reason)
        found = self._noted(outcome_of(self._request(baseline.plan, baseline.name), self.worker, self.budget))
        if self.ledger.reference is None:
            # the reference against itself: its speedup is the noise of this machine
            if found.step_ms is None:
                raise MeasurementError(
                    f"the FP32 reference cannot be measured: {found.reason}. Try a smaller --batch-size or --seq-len."
                )
            self.ledger.set_reference(found)
        return found

    def _tell_baselines(self) -> None:
        """Give the study the baselines of the space as trials, so that a sampler learns from them."""
        plans = {b.name: b.plan for b in self.plans.baselines}
        told = self.ledger.told()
        for found in self.measured():
            if found.name in told:
                continue
            choices = self._standing_for(plans.get(found.name))
            if choices is not None and found.drop is not None and found.step_ms is not None:
                self.ledger.tell_known(choices, self._distributions, found)

    def _standing_for(self, plan: Plan | None) -> dict[str, str] | None:
        """Return the choices of the space that a baseline stands for; None where it lies outside.

        FP32 stands for all units in FP32: what the ambient format does beside them is little.
        """
        if plan is None:
            return None
        if plan.formats == {Format.FP32} and not plan.tf32:
            return self.space.choices(plan.assignment)
        return self.space.of_plan(plan)

    @property
    def _distributions(self) -> dict[str, CategoricalDistribution]:
        return {d.name: CategoricalDistribution([str(f) for f in d.formats]) for d in self.space.decisions}

    def _enqueue(self) -> None:
        """Ask for the recommender's plan first."""
        recommended = self.space.of_plan(self.plans.recommended) if self.plans.recommended else None
        if recommended is not None:
            self.ledger.enqueue(recommended, RECOMMENDED)

    @property
    def worker(self) -> Worker | None:
        """The worker of what is not a trial; None where this process measures."""
        return self.workers[0] if self.workers else None

    def search(self, trials: int | None) -> None:
        """Measure what the sampler proposes, until budget, trials, space or gains end."""
        self.sampler = self.ledger.sample_with(self._new_sampler())
        with Crew[_Key, Outcome](self.workers) as crew:
            self._search(trials, crew)

    def _search(self, trials: int | None, crew: Crew[_Key, Outcome]) -> None:
        """Keep every worker at a trial; the study is read and written here alone."""
        going, stale, idle, over = dict[_Key, Trial](), 0, 0, False
        while True:
            self.ledger.refresh()
            seen, away = self._seen(), self._elsewhere()
            done = sum(row.trial is not None for row in self.ledger.rows)
            wanted = trials is None or done + len(going) + len(away) < trials
            if crew.free and wanted and not over and self.budget.has_time(self.confirm_seconds):
                if stale >= _STALE or len({*seen, *going, *away}) >= self.space.size:
                    self.news("search", f"the space of {self.space.size} assignments is seen")
                    over = True
                    continue
                trial = self.ledger.ask(self._distributions)
                idle = self._idle(idle)
                assignment = self.space.assignment(trial.params)
                key = _key(assignment)
                # of two machines that ask at once, the later one sees by now what both are to measure
                self.ledger.refresh()
                seen = self._seen()
                if key in seen or key in going or self._elsewhere().get(key, trial.number) < trial.number:
                    stale += 1
                    self.ledger.repeat(trial, seen.get(key) or _twice(assignment))
                    continue
                stale, going[key] = 0, trial
                self.ledger.begin(trial, assignment)
                name = trial.user_attrs.get("name", f"trial {trial.number}")
                request = self._request(self.plan(assignment), name, race=True)
                crew.begin(partial(outcome_of, request, budget=self.budget), key)
            elif going:
                key, outcome = crew.next()
                trial = going.pop(key)
                found = self._noted(outcome)
                self.ledger.add_trial(trial, found)
                left = self.budget.left
                if trials is not None:
                    left = max(0, trials - done - 1) * self.budget.each_seconds / crew.size
                self.news("search", found.name, left, trial=trial.number, measurement=found)
                over = over or self._is_over(found, trials, idle)
            elif (
                away
                and not over
                and trials is not None
                and done < trials
                and self.budget.has_time(self.confirm_seconds)
            ):
                self._say_once("search", "waiting for trials that other machines are at")
                time.sleep(_LOOK_SECONDS)
            else:
                return

    def _idle(self, idle: int) -> int:
        """Count proposals in a row that are expected to gain next to nothing."""
        gain = self.sampler.gain if self.sampler else None
        return idle + 1 if gain is not None and gain < _NO_GAIN else 0

    def _is_over(self, found: Measurement, trials: int | None, idle: int) -> bool:
        """Say whether a search ends here, because nothing can be measured any more or nothing is left to gain."""
        if self.faults >= _FAULTS:
            self.notes.append(
                f"the search ended early: {self.faults} plans in a row could not be measured, the last because "
                f"{found.reason}. What was measured stands; go on with --resume"
            )
            return True
        bound = self.bound() if trials is None and idle >= _IDLE else None
        if bound is None or bound["faster_percent"] >= 100 * (SAME - 1):
            return False
        self.news("search", f"nothing left to gain: {_bound_text(bound, self.limit)}")
        return True

    def _new_sampler(self) -> FrontSampler:
        """Return the sampler, with what is known before any trial."""
        reference = self.ledger.reference
        assert reference is not None and reference.step_ms is not None
        limit = max(self.limit_value, 1e-12)
        return FrontSampler(
            {d.name: d.formats for d in self.space.decisions},
            drop_priors(self.space, self.known),
            forecast_priors(self.space, self.forecast) if self.forecast else time_priors(self.space, self.speed),
            drop_floor=_FLOOR * limit,
            corner=(_CORNER * limit, reference.step_ms),
            # the same seed again would draw what was drawn already
            seed=self.seed + len(self.ledger.rows),
        )

    @property
    def limit_value(self) -> float:
        """The limit in the unit of the drop."""
        return self.limit.value / 100 * self.scale if self.limit.percent else self.limit.value

    def bound(self) -> dict[str, float] | None:
        """Return the time that no plan within the limit beats, as predicted, beside the fastest measured."""
        times = [m.step_ms for m in self.measured() if m.step_ms and m.drop is not None and m.drop <= self.limit_value]
        if self.sampler is None or not times:
            return None
        least = self.ledger.least_time(self.sampler, self.limit_value)
        if not 0 < least < float("inf"):
            return None
        least = min(least, *times)  # what was measured is possible, whatever is believed
        return {"drop": self.limit_value, "step_ms": least, "faster_percent": 100 * (min(times) / least - 1)}

    def measured(self) -> list[Measurement]:
        """Return all that was measured, baselines first."""
        return [row.measurement for row in self.ledger.rows]

    def _seen(self) -> dict[_Key, Measurement]:
        """Return what was measured of the space: trials, and the baselines that stand for one."""
        inside = {b.name for b in self.plans.baselines if self._standing_for(b.plan) is not None}
        return {
            _key(row.measurement.assignment): row.measurement
            for row in self.ledger.rows
            if (row.trial is not None and not row.gone) or row.measurement.name in inside
        }

    def _elsewhere(self) -> dict[_Key, int]:
        """Return the assignments that other machines are at, each with the first trial of it."""
        found = dict[_Key, int]()
        for number, choices in self.ledger.elsewhere().items():
            if choices.keys() == {d.name for d in self.space.decisions}:  # else its choices are being made
                found.setdefault(_key(self.space.assignment(choices)), number)
        return found

    def _request(self, plan: Plan, name: str, *, race: bool = False) -> Request:
        reference = self.ledger.reference
        return Request(
            workload=self.workload,
            plan=plan,
            name=name,
            emulate=self.forecast is not None,
            forecast=self.forecast,
            reference_ms=reference.step_ms if reference else None,
            timing_seconds=max(0.5, 0.02 * self.budget.seconds),
            stop_slower=_STOP_SLOWER if reference else None,
            deadline=self.budget.started + self.budget.seconds - self.confirm_seconds,
            is_hopeless=self._hopeless() if race and self.limit_value > 0 else None,
        )

    def _noted(self, outcome: Outcome) -> Measurement:
        """Learn from an outcome, and count it."""
        found = outcome.found
        self.faults = self.faults + 1 if outcome.fault else 0
        if waited := self.folder.patience.taken():  # as the one before was written
            found = replace(found, reason="; ".join(filter(None, (found.reason, *waited))))
        self.evaluations += 1
        if found.drop is not None:
            self.budget.learn(outcome.seconds)
        self.ledger.spend(self.budget.elapsed, self.evaluations)
        return found

    def _hopeless(self) -> Hopeless:
        """Return what says whether a plan's drops are above the limit, whatever is still to come."""
        earlier = [m.batch_drops for m in self.measured() if m.batch_drops]
        return Hopeless(limit=self.limit_value, earlier=earlier, planned=len(self.workload.batches))

    def plan(self, assignment: Mapping[str, Format]) -> Plan:
        """Return the plan of an assignment of the space."""
        return Plan.assign(
            self.space.profile,
            assignment,
            ambient=self.space.ambient,
            device=self.device,
            mode=self.workload.mode,
            reason={n: f"{f} in the measured plan chosen by the search" for n, f in assignment.items()},
        )

    def news(
        self,
        stage: str,
        message: str,
        eta: float | None = None,
        *,
        trial: int | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        """Tell whoever listens."""
        self.tell(
            Progress(
                stage=stage,
                message=message,
                elapsed_seconds=self.budget.elapsed,
                eta_seconds=eta,
                trial=trial,
                measurement=measurement,
                standing=self._standing() if measurement is not None or stage in _STANDING else None,
            )
        )

    def _standing(self) -> Standing | None:
        """Return what there is so far; None before the reference is measured."""
        if self.ledger.reference is None:
            return None
        return standing_of(
            self.ledger.reference, self.measured(), self.plans.names, self.limit, self.drop_unit, beside=self.beside
        )

    @property
    def beside(self) -> frozenset[str]:
        """Names of what is no trial: the baselines, and the recommended plan where the space lacks it."""
        return frozenset(row.measurement.name for row in self.ledger.rows if row.trial is None)


def _twice(assignment: Mapping[str, Format]) -> Measurement:
    """Return what is told of an assignment that is being measured already."""
    return Measurement(name="twice", assignment=assignment, reason="being measured by another worker")


def _key(assignment: Mapping[str, Format]) -> _Key:
    return tuple(sorted((name, str(choice)) for name, choice in assignment.items()))


def _bound_text(bound: Mapping[str, float], limit: DropLimit) -> str:
    return f"as predicted, no plan within {limit} is {bound['faster_percent']:.1f} % faster than the fastest measured"
