"""Every error a user can cause. The message says what is wrong, with the value, and what to try.

AutoprecError
├── UsageError          an argument that cannot be read (exit code 2 on the command line)
├── PlanError           a plan that cannot be read, does not fit the model, or asks what cannot be
│   └── ExportError     a plan that an export target cannot express; holds the nearest one that it can
├── ModelError          a model that cannot be loaded, understood or run
├── DataError           text or batches that cannot be used
├── DeviceError         a device that is absent or cannot do what was asked
├── MeasurementError    a run that gave no usable figure
├── TrainingError       a training run that cannot go on: a loss or weights that are not finite
├── StudyError          a run folder or storage that cannot be used now
└── Interrupted         the user stopped a search; what was measured is kept (exit code 130)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "AutoprecError",
    "DataError",
    "DeviceError",
    "ExportError",
    "Interrupted",
    "MeasurementError",
    "ModelError",
    "PlanError",
    "StudyError",
    "TrainingError",
    "UsageError",
    "closest",
    "first_line",
]


class AutoprecError(Exception):
    """Base of all errors raised on purpose; `str(error)` is meant for the person who made the call."""


class UsageError(AutoprecError, ValueError):
    """An argument that cannot be read, such as a duration of '2hours'."""


class PlanError(AutoprecError):
    """A plan that is damaged, foreign, does not fit the model, or asks for what cannot be done."""


class ExportError(PlanError):
    """A plan that an export target cannot express; `nearest` is the closest `Plan` that it can, if there is one."""

    def __init__(self, message: str, *, nearest: object | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class ModelError(AutoprecError):
    """A model that cannot be loaded safely, placed in units, or run."""


class DataError(AutoprecError):
    """Data that is missing, empty, binary, or does not suit the task."""


class DeviceError(AutoprecError):
    """A device that is not here, not known, or lacks a format."""


class MeasurementError(AutoprecError):
    """A measurement that gave no usable figure, such as a reference loss that is not finite."""


class TrainingError(AutoprecError):
    """A training run that cannot go on, such as one whose loss or weights are not finite."""


class StudyError(AutoprecError):
    """A run folder or storage that is in use, unreadable, or belongs to another model."""


class Interrupted(AutoprecError):
    """The user stopped a search; `folder` holds what was measured and `result` the front so far, if there is one."""

    def __init__(self, message: str, *, folder: str | None = None, result: object | None = None) -> None:
        super().__init__(message)
        self.folder = folder
        self.result = result


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return '; closest: a, b' for the most similar candidates, or '' when none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)
    return f"; closest: {', '.join(near)}" if near else ""


def without_password(text: str) -> str:
    """Return a text in which URLs show no passwords, as it may be shown and sent to others."""
    return re.sub(r"(//[^/:@\s]*):[^@/\s]*@", r"\1:***@", text)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error that says something, or the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
