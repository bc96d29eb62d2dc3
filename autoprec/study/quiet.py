"""Optuna kept to warnings: it prints every parameter of every trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import optuna

__all__ = ["quiet_optuna"]


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Hold back Optuna's log lines below warnings; put its verbosity back at the end."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
