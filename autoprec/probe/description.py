"""A model as predictions see it: its units with their widths, and the facts of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.errors import ModelError
from autoprec.facts import facts_of
from autoprec.models import catalogued_facts, catalogued_profile, find_model
from autoprec.predict.skeleton import skeleton_profile
from autoprec.probe.checkpoint import read_config
from autoprec.probe.hub import model_folder
from autoprec.probe.userfile import is_function
from autoprec.records import ModelFacts, ModelProfile

if TYPE_CHECKING:
    from torch import nn

__all__ = ["describe", "module_facts", "named_facts"]


def describe(model: nn.Module | str) -> tuple[ModelProfile, ModelFacts | None]:
    """Return a model's profile and its facts, None where it has no configuration.

    Of a name only the configuration is read, without torch or transformers: the catalogue's, whose units are those of
    its class, else the model's own, with the units that its facts imply. A module's are its own.

    Raises:
        ModelError: the model cannot be found, or has no layer whose format could be chosen.
    """
    if isinstance(model, str) and not is_function(model):
        if _is_catalogued(model):
            return catalogued_profile(model), catalogued_facts(model)
        folder, name = model_folder(model, weights=False)
        config = read_config(folder)
        facts = facts_of(config, name)
        return skeleton_profile(facts, _class_name(config)), facts
    from autoprec.probe.loading import load_skeleton
    from autoprec.probe.units import probe_units

    module = load_skeleton(model) if isinstance(model, str) else model
    return probe_units(module), module_facts(module)


def named_facts(model: str) -> ModelFacts | None:
    """Return the facts of a name's configuration, without torch; None where there is none that says them.

    Raises:
        ModelError: the model cannot be found.
    """
    if is_function(model):
        return None
    if _is_catalogued(model):
        return catalogued_facts(model)
    folder, name = model_folder(model, weights=False)
    config = read_config(folder)
    try:
        return facts_of(config, name)
    except ModelError:
        return None


def _is_catalogued(model: str) -> bool:
    return model != "demo" and not Path(model).expanduser().exists() and find_model(model) is not None


def module_facts(module: Any) -> ModelFacts | None:
    """Return the facts of a module's configuration; None where it has none that says them."""
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    values = config if to_dict is None else to_dict()
    if not isinstance(values, Mapping):
        return None
    try:
        return facts_of({"architectures": [type(module).__name__], **values})
    except ModelError:
        return None


def _class_name(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or ()
    return str(named[0]) if named else ""
