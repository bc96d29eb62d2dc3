"""From what stands on the command line to a workload, and the folders of earlier runs."""

from __future__ import annotations

import re
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.errors import AutoprecError, DeviceError, PlanError
from autoprec.files import read_json, read_limited

if TYPE_CHECKING:
    from autoprec.probe.workload import Workload

__all__ = [
    "RUNS",
    "build_workload",
    "device_here",
    "model_of_run",
    "new_run",
    "newest_run",
    "plan_path",
    "read_settings",
    "slug",
]

RUNS = Path("autoprec-runs")
SETTINGS = Path("autoprec.toml")
#: one table, written by hand
_LARGEST_SETTINGS = 1 << 20

_RUN_NAME = re.compile(r"\d{8}-\d{6}-(?P<model>.+)")


def build_workload(
    model: str, *, device: str, data: str | None = None, absent: bool = False, **options: Any
) -> Workload:
    """Return the workload of a model on a device that is here; options left out (None) are chosen by the library.

    Args:
        absent: a named device that is not here will do: the workload is put on what is.

    Raises:
        ModelError, DataError, DeviceError: the model, its data or the device cannot be used.
    """
    from autoprec.probe.workload import workload_from

    here = device_here(model, device, absent=absent)
    return workload_from(model, data=Path(data) if data else None, device=here, **options)


def device_here(model: str, device: str, *, absent: bool = False) -> str:
    """Return the torch device on which a model is to run.

    Args:
        absent: for a named device that is not here, return what is.

    Raises:
        DeviceError: the device is not here, or no device is called so.
    """
    from autoprec.probe.device import resolve_device

    here, _ = resolve_device(device)
    if here is None and absent:
        here, _ = resolve_device("auto")
    if here is None:
        raise DeviceError(
            f"'{device}' is not here, and what is run must be run here. Use --device auto, or for a device that is "
            f"not here: autoprec recommend {model} --device {device}, search with it, or verify with --emulate"
        )
    return str(here)


def slug(model: str) -> str:
    """Return the model's name as it stands in a run folder's name: 'models/GPT 2' is 'gpt-2'."""
    last = model.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:60] or "model"


def new_run(model: str) -> Path:
    """Return a folder name for a new search of `model`; nothing is made."""
    base = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(model)}"
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def plan_path(given: str) -> Path:
    """Return the plan file that is meant: the file itself, or the plan of a run folder.

    Raises:
        PlanError: a folder without a plan.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / "plan.json").exists():
        raise PlanError(
            f"{path} is a folder without plan.json: its search has not ended, or found no plan worth using. "
            f"See what it found: autoprec show {path}"
        )
    return path / "plan.json"


def newest_run(model: str | None = None) -> Path | None:
    """Return the newest run folder here, of `model` if given; None where there is none."""
    found = []
    for path in RUNS.iterdir() if RUNS.is_dir() else ():
        match = _RUN_NAME.fullmatch(path.name)
        if match and path.is_dir() and model in (None, model_of_run(path)):
            found.append(path)
    return max(found, key=lambda path: path.name, default=None)


def model_of_run(folder: Path) -> str | None:
    """Return the model that a run folder is about; None where its files do not say."""
    for name in ("result.json", "units.json"):
        if (folder / name).exists():
            data = read_json(folder / name, what="run file")
            found = data.get("model_id") if isinstance(data, dict) else None
            if isinstance(found, str):
                return found
    return None


def read_settings() -> dict[str, Any] | None:
    """Return the settings of ./autoprec.toml, keyed by long option; None where there is no such file.

    Raises:
        AutoprecError: the file is no TOML, or holds more than one table of plain values.
    """
    try:
        content = tomllib.loads(read_limited(SETTINGS, _LARGEST_SETTINGS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as fault:
        raise AutoprecError(
            f"./{SETTINGS} cannot be read: {fault}. It holds one table [autoprec] whose keys are the long options, "
            'such as model = "gpt2" and budget = "20m".'
        ) from None
    table = content.get("autoprec", content)
    return dict(table) if isinstance(table, dict) else {"autoprec": table}
