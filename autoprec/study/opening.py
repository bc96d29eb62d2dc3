"""How the study of a search is opened: its own journal, or one in a storage that other machines may be at too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from autoprec.errors import StudyError, first_line, without_password
from autoprec.files import as_json
from autoprec.quantities import DropLimit
from autoprec.records import SearchSetting
from autoprec.study.folder import RunFolder, fail_dead_trials
from autoprec.study.ledger import Ledger
from autoprec.study.machines import Machines, open_database
from autoprec.study.patience import patient_storage

__all__ = ["open_ledger"]


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
    place = f"journal {folder.journal}" if storage is None else f"storage {without_password(str(storage))}"
    try:
        opened, database = _opened(folder, storage)
        study = _study(opened, storage is None, name, resume)
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
            opened, database = _opened(folder, storage)
            study = _study(opened, storage is None, name, resume, anew=True)
        if study.user_attrs.get("identity") is None:
            study.set_user_attr("identity", dict(identity))
        study.set_user_attr("setting", as_json(setting))
        machines = Machines(study, database, folder.patience) if database else None
        ledger = Ledger(study, limit, folder.path / "trials.csv", folder.patience, machines)
        ledger.tell_rest()
        if machines is None:
            fail_dead_trials(study)
        ledger.measure_again(again)
    except DuplicatedStudyError:
        raise StudyError(f"{place} holds a search of this model already. Go on with it by --resume.") from None
    except (OSError, ImportError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StudyError(
            f"{place} cannot be opened: {first_line(error)}. {_hint(error)}Give a URL such as sqlite:///study.db or "
            "postgresql://user@host/base, or leave --storage out for a journal in the run folder."
        ) from error
    return ledger


def _hint(error: BaseException) -> str:
    return "For PostgreSQL: pip install 'autoprec[postgres]'. " if isinstance(error, ImportError) else ""


def _opened(folder: RunFolder, storage: str | BaseStorage | None) -> tuple[BaseStorage, RDBStorage | None]:
    """Return the storage, and the database in it that others may be at too."""
    if storage is None:
        return folder.open_storage(), None
    if isinstance(storage, str) and not _in_memory(storage):
        storage = open_database(storage)
    opened = get_storage(storage)
    if opened is not storage:  # ours alone
        opened = patient_storage(opened, folder.patience)
    if isinstance(storage, RDBStorage) and storage.get_heartbeat_interval() is not None:
        return opened, storage
    return opened, None


def _in_memory(url: str) -> bool:
    return url.startswith("sqlite") and url.partition("://")[2] in ("", "/", "/:memory:")


def _study(opened: BaseStorage, journal: bool, name: str, resume: bool, anew: bool = False) -> optuna.Study:
    """Return the newest study of this search, or a new one."""
    held = [study.study_name for study in opened.get_all_studies()]
    if journal:
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
