"""What a search has measured, kept in an Optuna study so that it outlives the process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, get_storage
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autoprec.errors import StudyError, first_line
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.quantities import DropLimit
from autoprec.records import Measurement, SearchSetting
from autoprec.study.folder import Row, RunFolder, fail_dead_trials, trials_csv
from autoprec.study.patience import Patience, patient_storage
from autoprec.study.sampler import Believed, FrontSampler

__all__ = ["Ledger", "known_of", "open_ledger"]

_BASELINE = "baseline "


class Ledger:
    """The rows of a search, each written to its study and to `trials.csv` as it comes.

    A fault of the storage is a StudyError that names the place.
    """

    def __init__(self, study: optuna.Study, limit: DropLimit, table: Path, patience: Patience) -> None:
        self.study, self.limit, self._table, self._patience = study, limit, table, patience
        self.reference, _, self.rows = known_of(study)
        known = study.user_attrs
        #: seconds and evaluations of the runs before this one
        self.before: Mapping[str, float] = known.get("spent", {"seconds": 0.0, "evaluations": 0})

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
        with self._writing():
            trial.set_user_attr("measurement", as_json(found))
        self.repeat(trial, found)
        self._add(Row(trial.number, _state(found), found))

    def repeat(self, trial: Trial, found: Measurement, limits_told: Container[str] = ()) -> None:
        """Tell Optuna a trial's objectives, and by how far each limit is kept (at most 0) or missed, unless told."""
        with self._writing():
            if found.drop is None or found.step_ms is None:
                self.study.tell(trial, state=TrialState.FAIL)
                return
            over = (found.drop_percent or 0.0) if self.limit.percent else found.drop
            limits = {"drop": over - self.limit.value}
            if found.grad_error is not None and found.grad_error_limit is not None:
                limits["grad_error"] = found.grad_error - found.grad_error_limit
            for name, missed_by in limits.items():
                if name not in limits_told:
                    trial.set_constraint(name, missed_by)
            self.study.tell(trial, [found.drop, found.step_ms])

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
            return self.study.ask(dict(distributions))

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
        total = {"seconds": self.before["seconds"] + seconds, "evaluations": self.before["evaluations"] + evaluations}
        with self._writing():
            self.study.set_user_attr("spent", total)

    def stop(self) -> None:
        """Mark what was under way as failed."""
        with self._writing():
            fail_dead_trials(self.study)

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


def open_ledger(
    folder: RunFolder,
    storage: str | BaseStorage | None,
    *,
    name: str,
    identity: Mapping[str, Any],
    setting: SearchSetting,
    limit: DropLimit,
    resume: bool,
    force: bool = False,
) -> Ledger:
    """Open or begin the study of a search, and take over what it measured before.

    Args:
        folder: has the study's journal where there is no other `storage`.
        name: of the study in its storage.
        identity: what must be equal for figures to compare.
        setting: how the search was asked for; of a resumed one the last time.
        force: where it is not, begin anew and measure again what was measured; the study before is kept.

    Raises:
        StudyError: the storage cannot be opened, or holds a search of something else, or this one without `resume`.
    """
    place = f"journal {folder.journal}" if storage is None else f"storage {storage}"
    try:
        study = _study(folder, storage, name, resume)
        known, again = study.user_attrs.get("identity"), list[dict[str, str]]()
        if known is not None and known != identity:
            if not force:
                raise StudyError(
                    f"the search in {place} was made with another {_differences(known, identity)}; its figures do not "
                    "compare. Use the same again, measure all of it again with --resume --force, or choose another "
                    "folder with --out."
                )
            again = [t.params for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
            again = again if known.get("space") == identity["space"] else []
            folder.set_aside()
            study = _study(folder, storage, name, resume, anew=True)
        if study.user_attrs.get("identity") is None:
            study.set_user_attr("identity", dict(identity))
        study.set_user_attr("setting", as_json(setting))
        ledger = Ledger(study, limit, folder.path / "trials.csv", folder.patience)
        ledger.tell_rest()
        fail_dead_trials(study)
        ledger.measure_again(again)
    except DuplicatedStudyError:
        raise StudyError(f"{place} holds a search of this model already. Go on with it by --resume.") from None
    except (OSError, ImportError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StudyError(
            f"{place} cannot be opened: {first_line(error)}. Give a URL such as sqlite:///study.db, or leave "
            "--storage out for a journal in the run folder."
        ) from error
    return ledger


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


def _study(
    folder: RunFolder, storage: str | BaseStorage | None, name: str, resume: bool, anew: bool = False
) -> optuna.Study:
    """Return the newest study of this search, or a new one."""
    if storage is None:
        opened = folder.open_storage()
    else:
        opened = get_storage(storage)
        if isinstance(storage, str):  # ours alone
            opened = patient_storage(opened, folder.patience)
    held = [study.study_name for study in opened.get_all_studies()]
    if storage is None:
        # a journal of a run folder has one study; if it is of another model, its identity will say so
        name = held[0] if held else name
    else:  # those that were begun anew have a number
        number = 1 + anew
        while _numbered(name, number + 1 - anew) in held:
            number += 1
        name = _numbered(name, number)
    return optuna.create_study(
        study_name=name, storage=opened, directions=["minimize", "minimize"], load_if_exists=resume
    )


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _differences(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Name what differs, with its values where those can be read."""
    found = []
    for key, now in identity.items():
        before = known.get(key)
        if before != now:
            readable = key in ("torch", "device", "mode")
            found.append(f"{key} ({before or 'unknown'} then, {now} now)" if readable else key)
    return ", ".join(found)


def _earlier(study: optuna.Study) -> Iterator[Row]:
    for key, value in sorted(study.user_attrs.items()):
        if key.startswith(_BASELINE):
            found = _measurement(value)
            yield Row(None, _state(found), found)
    for trial in study.get_trials(deepcopy=False):
        if "measurement" in trial.user_attrs:
            found = _measurement(trial.user_attrs["measurement"])
            yield Row(trial.number, _state(found), found)


def _state(found: Measurement) -> str:
    return (TrialState.FAIL if found.drop is None else TrialState.COMPLETE).name


def _measurement(data: Any) -> Measurement:
    return from_json(Measurement, data, what="a measurement in the study", error=StudyError)
