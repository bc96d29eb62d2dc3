"""From what a user gives to a profile with its facts; reading modules and names is done above this floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autoprec.errors import ModelError
from autoprec.records import ModelFacts, ModelProfile

__all__ = ["Described", "describe", "set_describer"]

#: a model's units and widths, and what its configuration says where there is one
Described = tuple[ModelProfile, ModelFacts | None]

_describer: Callable[[Any], Described] | None = None


def set_describer(describer: Callable[[Any], Described]) -> None:
    """Tell predictions how to read a module or a name (done once by the package)."""
    global _describer
    _describer = describer


def describe(model_or_id: Any) -> Described:
    """Return a model's profile and, where a configuration says them, its facts.

    Raises:
        ModelError: the model cannot be found or read.
    """
    if isinstance(model_or_id, ModelProfile):
        return model_or_id, None
    if _describer is None:
        raise ModelError("give a ModelProfile (autoprec.probe_units(model)); nothing here reads models")
    return _describer(model_or_id)
