"""A model from its name alone, its units and the facts of its configuration: catalogued ones without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.classes import class_profile
from autoprec.errors import ModelError
from autoprec.facts import facts_of
from autoprec.models import CataloguedModel, catalogued_facts, catalogued_profile, find_model, fits_installed
from autoprec.predict.skeleton import skeleton_profile
from autoprec.probe.checkpoint import checked_config, read_config
from autoprec.probe.hub import model_folder
from autoprec.probe.userfile import is_function
from autoprec.records import ModelFacts, ModelProfile

if TYPE_CHECKING:
    from torch import nn

__all__ = ["describe", "described_model", "module_facts", "named_facts"]


def described_model(model: str, *, trust_remote_code: bool = False) -> tuple[ModelProfile, str | None]:
    """Return the units of a model by name, and a note where they are from another transformers than the one here.

    A folder, `demo` and file.py:function are read as they are. Then the catalogue answers, without torch, transformers
    or network; where it was made with another transformers and the model's files are in the hub's cache, those do. What
    is not catalogued comes from the hub. Of a configuration alone come the units of widely used classes (`classes`);
    of others they are those of the class on the meta device.

    Raises:
        ModelError: as `load_skeleton`.
    """
    entry = None if trust_remote_code else _entry(model)
    if entry is not None:
        fits, made, here = fits_installed(model)
        if fits:
            return catalogued_profile(model), None
        if not _is_cached(entry, model):
            return catalogued_profile(model), (
                f"the units of {model} are those of transformers {made}, and {here} is installed here: a plan that "
                "does not fit its classes is refused when applied"
            )
    if not trust_remote_code and not is_function(model):
        folder, _ = model_folder(model, weights=False)
        known = class_profile(checked_config(folder), model)
        if known is not None:
            return known, None
    from autoprec.probe.loading import load_skeleton
    from autoprec.probe.units import probe_units

    return probe_units(load_skeleton(model, trust_remote_code=trust_remote_code), model_id=model), None


def describe(model: nn.Module | str) -> tuple[ModelProfile, ModelFacts | None]:
    """Return a model's profile and its facts, None where it has no configuration.

    Of a name only the configuration is read, without torch or transformers: the catalogue's, or the model's own, whose
    units are those of its class where that is widely used, else those that its facts imply. A module's are its own.

    Raises:
        ModelError: the model cannot be found, or has no layer whose format could be chosen.
    """
    if isinstance(model, str) and not is_function(model):
        if _entry(model):
            return catalogued_profile(model), catalogued_facts(model)
        folder, name = model_folder(model, weights=False)
        config = read_config(folder)
        facts = facts_of(config, name)
        return class_profile(config, name) or skeleton_profile(facts, _class_name(config)), facts
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
    if _entry(model):
        return catalogued_facts(model)
    folder, name = model_folder(model, weights=False)
    config = read_config(folder)
    try:
        return facts_of(config, name)
    except ModelError:
        return None


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


def _entry(model: str) -> CataloguedModel | None:
    """Return the catalogued model of a name; what is here comes before the catalogue."""
    local = model == "demo" or is_function(model) or Path(model).expanduser().exists()
    return None if local else find_model(model)


def _is_cached(entry: CataloguedModel, model: str) -> bool:
    """Say whether a model's configuration is in the hub's cache (the folders huggingface_hub documents)."""
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    folders = (Path(home).expanduser() / f"models--{name.replace('/', '--')}" for name in (model, entry.id))
    return any(True for folder in folders for _ in folder.glob("snapshots/*/config.json"))
