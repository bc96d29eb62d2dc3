"""What a search has measured, kept in an Optuna study so that it outlives the process."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autoprec.errors import StudyError, first_line
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.quantities import DropLimit
from autoprec.records import Measurement, SearchSetting
from autoprec.study.folder import Row, fail_dead_trials, trials_csv
from autoprec.study.machines import MEASURING, Machines
from autoprec.study.patience import Patience
from autoprec.study.sampler import Believed, FrontSampler

__all__ = ["Ledger", "known_of"]

_BASELINE, _SPENT = "baseline ", "spent"


class Ledger:
    """The rows of a search, each written to its study and to `trials.csv` as it comes.

    A fault of the storage is a StudyError that names the place.

    Args:
        machines: this search among others on the study; None where it is alone.
    """

    def __init__(
        self, study: optuna.Study, limit: DropLimit, table: Path, patience: Patience, machines: Machines | None = None
    ) -> None:
        self.study, self.limit, self._table, self._patience = study, limit, table, patience
        self._machines = machines
        # each of several searches at a time counts by itself
        self._spent = f"{_SPENT} {secrets.token_hex(8)}" if machines else _SPENT
        self._read()
        #: seconds and evaluations of the runs before this one, and of those beside it
        self.before = self._sums()

    def _read(self) -> None:
        with self._writing():
            self.reference, _, self.rows = known_of(self.study)

    def _sums(self) -> Mapping[str, float]:
        with self._writing():
            known = self.study.user_attrs.items()
        sums = [one for key, one in known if key.partition(" ")[0] == _SPENT]
        return {key: sum(one[key] for one in sums) if sums else 0 for key in ("seconds", "evaluations")}

    def sum_up(self, seconds: float, evaluations: int) -> Mapping[str, float]:
        """Return seconds and evaluations of all runs, this one's among them."""
        self.spend(seconds, evaluations)
        return self._sums()

    def close(self) -> None:
        """Be no longer one of the study's machines."""
        if self._machines:
            self._machines.close()

    @property
    def weights_digest(self) -> str:
        """Digest of the weights that everything here was measured with."""
        return str(self.study.user_attrs["identity"]["weights"])

    def set_reference(self, found: Measurement) -> Measurement:
        """Keep the measurement of FP32 against itself as the reference, whose step time is the study's clock."""
        self.reference = dataclasses.replace(
            found,
            name="reference",
            drop=0.0,
            drop_ci95=None,
            drop_percent=0.0,
            # of a device that is not here there is no second time: the prediction is the clock
            step_ms=found.reference_step_ms or found.step_ms,
            step_ms_ci95=None,
            speedup=1.0,
            speedup_ci95=None,
            pace="same",
        )
        with self._writing():
            self.study.set_user_attr("reference", as_json(self.reference))
        return self.reference

    def add_baseline(self, found: Measurement) -> None:
        """Note a measurement that is no trial."""
        place = sum(row.trial is None for row in self.rows)  # a database gives attributes back in order of their names
        with self._writing():
            self.study.set_user_attr(f"{_BASELINE}{place:02d}", as_json(found))
        self._add(Row(None, _state(found), found))

    def add_trial(self, trial: Trial, found: Measurement) -> None:
        """Note what a trial measured, and tell Optuna."""
        try:
            with self._writing():
                trial.set_user_attr("measurement", as_json(found))
        except UpdateFinishedTrialError:  # this machine slept, and was taken for dead
            self._add_anew(trial, found)
            return
        self.repeat(trial, found)
        self._add(Row(trial.number, _state(found), found))

    def _add_anew(self, trial: Trial, found: Measurement) -> None:
        """Keep what was measured for a trial that others have given up, as another one."""
        values = None if found.drop is None or found.step_ms is None else [found.drop, found.step_ms]
        kept = optuna.trial.create_trial(
            state=TrialState.COMPLETE if values else TrialState.FAIL,
            params=trial.params,
            distributions=trial.distributions,
            values=values,
            user_attrs={"measurement": as_json(found)},
            constraints=self._limits(found),
        )
        with self._writing():
            self.study.add_trial(kept)
        self._let_go(trial)
        self.refresh()

    def repeat(self, trial: Trial, found: Measurement, limits_told: Container[str] = ()) -> None:
        """Tell Optuna a trial's objectives, and by how far each limit is kept (at most 0) or missed, unless told."""
        # finished by now: another machine has told what this one measured, or an answer of the storage was lost
        with self._writing(), contextlib.suppress(UpdateFinishedTrialError):
            if found.drop is None or found.step_ms is None:
                self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            else:
                for name, missed_by in self._limits(found).items():
                    if name not in limits_told:
                        trial.set_constraint(name, missed_by)
                self.study.tell(trial, [found.drop, found.step_ms], skip_if_finished=True)
        self._let_go(trial)

    def _limits(self, found: Measurement) -> dict[str, float]:
        """Return by how far each limit is kept (at most 0) or missed."""
        if found.drop is None:
            return {}
        over = (found.drop_percent or 0.0) if self.limit.percent else found.drop
        limits = {"drop": over - self.limit.value}
        if found.grad_error is not None and found.grad_error_limit is not None:
            limits["grad_error"] = found.grad_error - found.grad_error_limit
        return limits

    def _let_go(self, trial: Trial) -> None:
        if self._machines:
            self._machines.let_go(trial)

    def tell_known(
        self, choices: Mapping[str, str], distributions: Mapping[str, CategoricalDistribution], found: Measurement
    ) -> None:
        """Give the study a measurement that is no trial of a search as one, under its name."""
        assert found.drop is not None and found.step_ms is not None
        known = optuna.trial.create_trial(
            params=dict(choices),
            distributions=dict(distributions),
            values=[found.drop, found.step_ms],
            user_attrs={"baseline": found.name},
        )
        with self._writing():
            self.study.add_trial(known)

    def enqueue(self, choices: Mapping[str, str], name: str) -> None:
        """Have the next trials measure these choices, under a name."""
        with self._writing():
            self.study.enqueue_trial(dict(choices), user_attrs={"name": name}, skip_if_exists=True)

    def ask(self, distributions: Mapping[str, CategoricalDistribution]) -> Trial:
        """Return a new trial with its choices made."""
        with self._writing():
            if self._machines is None:
                return self.study.ask(dict(distributions))
            while True:
                trial = self._machines.ask()
                try:
                    for name, distribution in distributions.items():
                        trial.suggest_categorical(name, distribution.choices)
                    return trial
                except UpdateFinishedTrialError:  # this machine slept, and was taken for dead
                    self._let_go(trial)

    def begin(self, trial: Trial, assignment: Mapping[str, Format]) -> None:
        """Say in the study who measures what, where others want to know."""
        if self._machines:
            # finished by now, it is kept as another one when it is measured
            with self._writing(), contextlib.suppress(UpdateFinishedTrialError):
                self._machines.claim(trial, assignment={unit: str(choice) for unit, choice in assignment.items()})

    def elsewhere(self) -> dict[int, Mapping[str, str]]:
        """Return the choices that other machines are at, by number of the trial."""
        if self._machines is None:
            return {}
        with self._writing():
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {t.number: t.params for t in running if t.params and not self._machines.holds(t)}

    def refresh(self) -> None:
        """Take in the trials that other machines have measured since, and see to those of machines that went."""
        if self._machines is None:
            return
        with self._writing():
            self.tell_rest()
            self._machines.clear()
            known = {row.trial for row in self.rows}
            new = [row for row in _trials(self.study) if row.trial not in known]
        if new:
            self.rows = sorted([*self.rows, *new], key=lambda row: -1 if row.trial is None else row.trial)
            self._patience(trials_csv, self._table, self.rows)

    @contextlib.contextmanager
    def turn(self, wait: Callable[[str], None]) -> Iterator[None]:
        """Do what one machine does for all, with what those before it did; at once where this search is alone.

        Args:
            wait: called about once a second with who is at it; may raise.
        """
        if self._machines is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            with self._writing():
                stack.enter_context(self._machines.turn(wait))
            self._read()
            yield

    def sample_with(self, sampler: FrontSampler) -> FrontSampler:
        """Have trials proposed by a sampler from here on; return it."""
        self.study.sampler = sampler
        return sampler

    def least_time(self, sampler: FrontSampler, drop: float) -> float:
        """Return the step time in ms that no assignment of at most this drop beats, as the sampler believes."""
        return sampler.least_time(self.study, drop)

    def believed(self, sampler: FrontSampler) -> dict[str, dict[Format, Believed]]:
        """Return what a sampler believes of each decision in each format."""
        return sampler.believed(self.study)

    def spend(self, seconds: float, evaluations: int) -> None:
        """Keep what this run has taken so far, for the sums of a run that resumes it."""
        total = {"seconds": seconds, "evaluations": evaluations}
        if self._machines is None:
            total = {key: value + self.before[key] for key, value in total.items()}
        with self._writing():
            self.study.set_user_attr(self._spent, total)

    def stop(self) -> None:
        """Mark what this search had under way as failed."""
        with self._writing():
            fail_dead_trials(self.study, self._machines.holds if self._machines else None)

    def told(self) -> set[str]:
        """Return the names of the baselines that the study has as trials."""
        return {t.user_attrs["baseline"] for t in self.study.get_trials(deepcopy=False) if "baseline" in t.user_attrs}

    def tell_rest(self) -> None:
        """Tell Optuna what trials have measured that a kill kept from being told."""
        for known in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "measurement" in known.user_attrs:
                trial = Trial(self.study, known._trial_id)
                self.repeat(trial, _measurement(known.user_attrs["measurement"]), known.constraints)

    def measure_again(self, earlier: Sequence[Mapping[str, str]]) -> None:
        """Ask for choices measured before, in another study."""
        for choices in earlier:
            with self._writing():
                self.study.enqueue_trial(dict(choices), user_attrs={"again": True}, skip_if_exists=True)

    def replace(self, measured: Sequence[Measurement]) -> None:
        """Take over the reference and the rows' measurements in another form, and write the table again."""
        self.reference = measured[0]
        self.rows = [row._replace(measurement=m) for row, m in zip(self.rows, measured[1:], strict=True)]
        self._patience(trials_csv, self._table, self.rows)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._patience(trials_csv, self._table, self.rows)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SQLAlchemyError, StorageInternalError) as error:
            why = error.strerror if isinstance(error, OSError) else first_line(error.__cause__ or error)
            raise StudyError(
                f"cannot write the study of {self._table.parent}: {why}. Free space, then go on with --resume; "
                "what was measured before is kept."
            ) from error


def known_of(study: optuna.Study) -> tuple[Measurement | None, SearchSetting | None, list[Row]]:
    """Return what a study holds: the reference, how it was asked for (None in old studies), and all that was measured.

    Raises:
        StudyError: one of its records cannot be read.
    """
    known = study.user_attrs
    reference = _measurement(known["reference"]) if "reference" in known else None
    asked = known.get("setting")
    setting = None if asked is None else from_json(SearchSetting, asked, what="the study's setting", error=StudyError)
    return reference, setting, list(_earlier(study))


def _earlier(study: optuna.Study) -> Iterator[Row]:
    for key, value in sorted(study.user_attrs.items()):
        if key.startswith(_BASELINE):
            found = _measurement(value)
            yield Row(None, _state(found), found)
    yield from _trials(study)


def _trials(study: optuna.Study) -> Iterator[Row]:
    for trial in study.get_trials(deepcopy=False):
        if "measurement" in trial.user_attrs:
            found = _measurement(trial.user_attrs["measurement"])
            yield Row(trial.number, _state(found), found)
        elif MEASURING in trial.user_attrs and trial.state is TrialState.FAIL:
            yield Row(trial.number, trial.state.name, _unmeasured(trial), gone=True)


def _unmeasured(trial: FrozenTrial) -> Measurement:
    """Return what is known of a trial whose search went while it was at it."""
    by, assignment = trial.user_attrs[MEASURING]["by"], trial.user_attrs[MEASURING]["assignment"]
    return Measurement(
        name=trial.user_attrs.get("name", f"trial {trial.number}"),
        assignment={unit: Format(choice) for unit, choice in assignment.items()},
        reason=f"given up: the search that was at it ({by}) ended, or gave no sign of life",
    )


def _state(found: Measurement) -> str:
    return (TrialState.FAIL if found.drop is None else TrialState.COMPLETE).name


def _measurement(data: Any) -> Measurement:
    return from_json(Measurement, data, what="a measurement in the study", error=StudyError)
