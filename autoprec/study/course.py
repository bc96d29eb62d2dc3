"""One search while it runs: what it was asked, what is known so far, and how a plan is measured in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage

from autoprec.errors import StudyError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.measurement import Request
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.sensitivity import probe_sensitivity
from autoprec.probe.speed import probe_speed
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit
from autoprec.records import (
    Confirmed,
    DeviceProfile,
    Measurement,
    Progress,
    Removal,
    SearchSetting,
    SensitivityProfile,
    SpeedProfile,
    Standing,
    TrainingConfirmation,
)
from autoprec.report.grouping import few
from autoprec.study.baselines import Baseline
from autoprec.study.budget import Budget
from autoprec.study.folder import RunFolder
from autoprec.study.front import feasible
from autoprec.study.knowledge import sensitivity_of, speed_of
from autoprec.study.ledger import Ledger
from autoprec.study.measuring import Outcome
from autoprec.study.opening import open_ledger
from autoprec.study.outcome import standing_of
from autoprec.study.protocol import Hopeless
from autoprec.study.sampler import FrontSampler
from autoprec.study.space import SearchSpace, describe, vetoed
from autoprec.study.worker import Worker

__all__ = ["Candidates", "Course", "News"]

News: TypeAlias = Callable[[Progress], None]

#: a plan this many times slower than FP32 is stopped after its first step
_STOP_SLOWER = 3.0
#: stages whose news tell what there is so far, beside each measurement
_STANDING = ("baselines", "search", "confirmation")


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
    #: kept back: for two plans on unseen batches, and to train one beside FP32
    confirm_seconds: float
    training_seconds: float
    #: digest of the model's weights
    weights: str
    #: of the space, that the search ends after; None: as many as the budget has time for
    trials: int | None = None
    #: by unit, how far the largest of its weights stand out
    outliers: Mapping[str, float] = field(default_factory=dict)
    #: where the device is not here: drops are emulated, times and memory predicted
    forecast: Forecast | None = None
    #: where measurements run, the first of them what is not a trial; none: in this process
    workers: tuple[Worker, ...] = ()
    notes: list[str] = field(default_factory=list)
    known: SensitivityProfile | None = None
    #: what the probe keeps units from: it is not proposed, and what has it is not chosen
    vetoes: tuple[Removal, ...] = ()
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
            self._heard,
            self.forward_seconds,
            worker.probe_sensitivity if worker else probe_sensitivity,
        )
        if self.known:
            self.scale = self.known.scale
            self.vetoes = vetoed(self.space, self.known.vetoes)
        slow = None
        if self.forecast is None:
            self.news("probe", "what each unit takes")
            self.speed, slow = speed_of(
                self.workload,
                self.space,
                self.budget,
                self.folder,
                self._heard,
                self.forward_seconds,
                worker.probe_speed if worker else probe_speed,
            )
        self.notes += [text for text in (why, slow) if text]

    def _heard(self, news: Progress) -> None:
        """Pass on what a probe tells, on the clock of the search."""
        self.news("probe", news.message)

    # measuring

    def say_once(self, stage: str, text: str) -> None:
        """Tell what is not to be told again until something else was."""
        if text != self._said:
            self.news(stage, text)
        self._said = text

    def standing_for(self, plan: Plan | None) -> dict[str, str] | None:
        """Return the choices of the space that a baseline stands for; None where it lies outside.

        FP32 stands for all units in FP32: what the ambient format does beside them is little.
        """
        if plan is None:
            return None
        if plan.formats == {Format.FP32} and not plan.tf32:
            return self.space.choices(plan.assignment)
        return self.space.of_plan(plan)

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """The choices of the space, as Optuna asks for them."""
        return {d.name: CategoricalDistribution([str(f) for f in d.formats]) for d in self.space.decisions}

    @property
    def barred(self) -> dict[str, set[Format]]:
        """The formats that decisions are kept from by the probe's vetoes."""
        bars = {(veto.unit, veto.format) for veto in self.vetoes}
        found = {d.name: {f for f in d.formats if any((u, f) in bars for u in d.units)} for d in self.space.decisions}
        return {name: formats for name, formats in found.items() if formats}

    @property
    def size(self) -> int:
        """Number of assignments that may be chosen."""
        barred = self.barred
        return math.prod(len(set(d.formats) - barred.get(d.name, set())) for d in self.space.decisions)

    @property
    def worker(self) -> Worker | None:
        """The worker of what is not a trial; None where this process measures."""
        return self.workers[0] if self.workers else None

    @property
    def limit_value(self) -> float:
        """The limit in the unit of the drop."""
        return self.limit.value / 100 * self.scale if self.limit.percent else self.limit.value

    def bound(self) -> dict[str, float] | None:
        """Return the time that no plan within the limit beats, as predicted, beside the fastest measured."""
        usable = [m for m in self.measured() if feasible(m)]
        times = [m.step_ms for m in usable if m.step_ms and m.drop is not None and m.drop <= self.limit_value]
        if self.sampler is None or not times:
            return None
        least = self.ledger.least_time(self.sampler, self.limit_value)
        if not 0 < least < float("inf"):
            return None
        least = min(least, *times)  # what was measured is possible, whatever is believed
        return {"drop": self.limit_value, "step_ms": least, "faster_percent": round(100 * (min(times) / least - 1), 6)}

    def measured(self) -> list[Measurement]:
        """Return all that was measured, baselines first."""
        return [row.measurement for row in self.ledger.rows]

    def request(self, plan: Plan, name: str, *, race: bool = False) -> Request:
        """Return what is to be measured of a plan; `race`: it is stopped where it cannot be within the limit."""
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
            deadline=self.budget.started + self.budget.seconds - self.reserve_seconds,
            is_hopeless=self._hopeless() if race and self.limit_value > 0 else None,
        )

    @property
    def reserve_seconds(self) -> float:
        """What is kept back of the budget for what comes after the trials."""
        return self.confirm_seconds + self.training_seconds

    def noted(self, outcome: Outcome) -> Measurement:
        """Learn from an outcome, and count it."""
        found = outcome.found
        self.faults = self.faults + 1 if outcome.fault else 0
        if waited := self.folder.patience.taken():  # as the one before was written
            found = replace(found, reason="; ".join(filter(None, (found.reason, *waited))))
        found = self._held_to_vetoes(found)
        self.evaluations += 1
        if found.drop is not None:
            self.budget.learn(outcome.seconds)
        self.ledger.spend(self.budget.elapsed, self.evaluations)
        return found

    def against(self, assignment: Mapping[str, Format]) -> list[Removal]:
        """Return the vetoes that an assignment does not heed."""
        return [veto for veto in self.vetoes if assignment.get(veto.unit) == veto.format]

    def _held_to_vetoes(self, found: Measurement) -> Measurement:
        """Return a measurement barred where units have what the probe keeps them from, as baselines may."""
        against = self.against(found.assignment)
        if not against or found.step_ms is None:
            return found
        first = against[0]
        why = f"not to be chosen: {first.format} in {few([v.unit for v in against])}, where {first.reason}"
        return replace(found, barred=True, reason="; ".join(filter(None, (found.reason, why))))

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
                at_most=self.trials is None and stage in ("baselines", "search"),
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
