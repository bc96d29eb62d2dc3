"""The course of a search: baselines first, then what Optuna proposes, until the budget is spent; then the files."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage

from autoprec.errors import DeviceError, Interrupted, MeasurementError, PlanError
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.plan import Plan
from autoprec.probe.workload import Workload
from autoprec.quantities import DropLimit, duration_text
from autoprec.records import DeviceProfile, Measurement, Progress, SearchResult
from autoprec.runtime.identity import weights_digest
from autoprec.study.baselines import Baseline, role_seeds
from autoprec.study.budget import Budget
from autoprec.study.folder import RunFolder
from autoprec.study.ledger import Ledger, open_ledger
from autoprec.study.outcome import evidence, on_one_clock, outcome_of
from autoprec.study.space import SearchSpace, describe

__all__ = ["Candidates", "Course", "News"]

News: TypeAlias = Callable[[Progress], None]
_Key: TypeAlias = tuple[tuple[str, str], ...]

#: a plan this many times slower than FP32 is stopped after its first step
_STOP_SLOWER = 3.0
#: proposals in a row that were measured before, after which the space counts as seen
_STALE = 200
#: name of the recommender's plan among the measured
_RECOMMENDED = "recommended"


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
    evaluations: int = 0
    #: what is known, from the moment the study is open
    ledger: Ledger = field(init=False)

    def go(self, storage: str | BaseStorage | None, resume: bool, trials: int | None) -> SearchResult:
        """Measure until the budget is spent, and return the result, which is written by then."""
        self.ledger = self._open(storage, resume)
        try:
            self._measure_baselines()
            self._search(trials)
        except KeyboardInterrupt:
            self.ledger.stop()
            where = self.folder.path
            raise Interrupted(
                f"interrupted after {duration_text(self.budget.elapsed)}; what was measured is in {where}. Go on with: "
                f"autoprec search {shlex.quote(self.workload.model_id)} --resume --out {shlex.quote(str(where))}",
                folder=str(where),
                result=self._finish() if self.ledger.reference else None,
            ) from None
        return self._finish()

    def _open(self, storage: str | BaseStorage | None, resume: bool) -> Ledger:
        profile, mode = self.space.profile, self.workload.mode
        ledger = open_ledger(
            self.folder,
            storage,
            name=f"autoprec-{profile.fingerprint[:12]}-{mode}",
            identity={
                "model": profile.fingerprint,
                "mode": str(mode),
                "space": describe(self.space),
                "weights": weights_digest(self.workload.model),
                "data": self.workload.data_digest(),
                "device": self.device.name,
            },
            limit=self.limit,
            seed=self.seed,
            resume=resume,
        )
        self.folder.write("device.json", as_json(self.device))
        self.folder.write("units.json", as_json(profile))
        return ledger

    # measuring

    def _measure_baselines(self) -> None:
        known = {row.measurement.name for row in self.ledger.rows}
        wanted = list(self.plans.baselines)
        if self.plans.recommended and self.space.of_plan(self.plans.recommended) is None:
            wanted.append(Baseline(_RECOMMENDED, self.plans.recommended))
        todo = [b for b in wanted if b.name not in known]
        for count, baseline in enumerate(todo):
            if baseline.plan is not None and self.ledger.reference is not None and not self.budget.has_time():
                self._news("baselines", f"{baseline.name} is left out: the budget is spent")
                continue
            ahead = sum(b.plan is not None for b in todo[count:])
            self._news("baselines", f"measuring {baseline.name}", ahead * self.budget.each_seconds)
            found = self._baseline(baseline)
            self.ledger.add_baseline(found)
            self._news("baselines", baseline.name, measurement=found)
        if self.ledger.is_new():
            self._enqueue()

    def _baseline(self, baseline: Baseline) -> Measurement:
        if baseline.plan is None:
            return Measurement(name=baseline.name, assignment={}, reason=baseline.reason)
        found = self._evaluate(baseline.plan, baseline.name)
        if self.ledger.reference is None:
            # the reference against itself: its speedup is the noise of this machine
            if found.step_ms is None:
                raise MeasurementError(
                    f"the FP32 reference cannot be measured: {found.reason}. Try a smaller --batch-size or --seq-len."
                )
            self.ledger.set_reference(found)
        return found

    def _enqueue(self) -> None:
        """Ask for the recommender's plan first, then for plans that set one role apart."""
        recommended = self.space.of_plan(self.plans.recommended) if self.plans.recommended else None
        if recommended is not None:
            self.ledger.enqueue(recommended, _RECOMMENDED)
        for index, seed in enumerate(role_seeds(self.space.profile, self.space.ambient), start=1):
            choices = self.space.choices(seed)
            if choices is not None:
                self.ledger.enqueue(choices, f"seed {index}")

    def _search(self, trials: int | None) -> None:
        distributions = {d.name: CategoricalDistribution([str(f) for f in d.formats]) for d in self.space.decisions}
        done = sum(row.trial is not None for row in self.ledger.rows)
        seen = self._seen()
        stale = 0
        while self.budget.has_time() and (trials is None or done < trials):
            if stale >= _STALE or len(seen) >= self.space.size:
                self._news("search", f"the space of {self.space.size} assignments is seen")
                break
            trial = self.ledger.ask(distributions)
            assignment = self.space.assignment(trial.params)
            before = seen.get(_key(assignment))
            if before is not None:
                stale += 1
                self.ledger.repeat(trial, before)
                continue
            stale = 0
            name = trial.user_attrs.get("name", f"trial {trial.number}")
            found = seen[_key(assignment)] = self._evaluate(self._plan(assignment), name)
            self.ledger.add_trial(trial, found)
            done += 1
            left = self.budget.left if trials is None else (trials - done) * self.budget.each_seconds
            self._news("search", found.name, left, trial=trial.number, measurement=found)

    def _seen(self) -> dict[_Key, Measurement]:
        """Return what was measured of the space: trials, and the baselines that lie in it."""
        inside = {b.name for b in self.plans.baselines if b.plan and self.space.of_plan(b.plan) is not None}
        return {
            _key(row.measurement.assignment): row.measurement
            for row in self.ledger.rows
            if row.trial is not None or row.measurement.name in inside
        }

    def _evaluate(self, plan: Plan, name: str) -> Measurement:
        begun = time.monotonic()
        reference = self.ledger.reference
        request = Request(
            workload=self.workload,
            plan=plan,
            name=name,
            reference_ms=reference.step_ms if reference else None,
            timing_seconds=max(0.5, 0.02 * self.budget.seconds),
            stop_slower=_STOP_SLOWER if reference else None,
            deadline=self.budget.started + self.budget.seconds,
        )
        try:
            found = evaluate(request)
        except (DeviceError, PlanError) as error:
            if reference is None:  # not this plan's fault, then
                raise
            found = Measurement(name=name, assignment=plan.assignment, reason=str(error))
        self.evaluations += 1
        if found.drop is not None:
            self.budget.each_seconds = time.monotonic() - begun
        self.ledger.spend(self.budget.elapsed, self.evaluations)
        return found

    def _plan(self, assignment: Mapping[str, Format]) -> Plan:
        return Plan.assign(
            self.space.profile,
            assignment,
            ambient=self.space.ambient,
            device=self.device,
            mode=self.workload.mode,
            reason={n: f"{f} in the measured plan chosen by the search" for n, f in assignment.items()},
        )

    # the end

    def _finish(self) -> SearchResult:
        """Write result.json and, where there is something to do, plan.json; return the result."""
        ledger = self.ledger
        assert ledger.reference is not None
        seconds = ledger.before["seconds"] + self.budget.elapsed
        ledger.replace(on_one_clock([ledger.reference, *(row.measurement for row in ledger.rows)]))
        outcome = outcome_of([row.measurement for row in ledger.rows], self.plans.names, self.limit, seconds)
        plan_path = self.folder.path / "plan.json"
        if outcome.best is not None:
            self._plan_of(outcome.best).save(plan_path)
            outcome = outcome.with_plan(str(plan_path))
        else:
            plan_path.unlink(missing_ok=True)
        result = SearchResult(
            model_id=self.workload.model_id,
            device=self.device.name,
            mode=self.workload.mode,
            max_drop=str(self.limit),
            reference=ledger.reference,
            baselines=outcome.baselines,
            front=outcome.front,
            chosen=outcome.chosen,
            verdict=outcome.verdict,
            trials=sum(row.trial is not None for row in ledger.rows),
            evaluations=int(ledger.before["evaluations"]) + self.evaluations,
            seconds=seconds,
            predicted_bound=None,
            removed=self.space.removed,
            folder=str(self.folder.path),
            seed=self.seed,
        )
        self.folder.write("result.json", as_json(result))
        self._news("done", outcome.verdict.text)
        return result

    def _plan_of(self, found: Measurement) -> Plan:
        """Return the plan of a measurement, with its figures as evidence."""
        fixed = {b.name: b.plan for b in self.plans.baselines} | {_RECOMMENDED: self.plans.recommended}
        same = fixed.get(found.name)
        plan = same if same is not None and same.assignment == found.assignment else self._plan(found.assignment)
        return plan.with_evidence(
            evidence(
                found,
                self.device,
                drop_unit=self.drop_unit,
                weights_digest=self.ledger.weights_digest,
                seed=self.seed,
            )
        )

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
                elapsed_seconds=self.budget.elapsed,
                eta_seconds=eta,
                trial=trial,
                measurement=measurement,
            )
        )


def _key(assignment: Mapping[str, Format]) -> _Key:
    return tuple(sorted((name, str(choice)) for name, choice in assignment.items()))
