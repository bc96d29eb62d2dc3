"""A model's units from its name alone: from the catalogue without torch, else from its configuration."""

from __future__ import annotations

import os
from pathlib import Path

from autoprec.models import CataloguedModel, catalogued_profile, find_model, fits_installed
from autoprec.probe.userfile import is_function
from autoprec.records import ModelProfile

__all__ = ["described_model"]


def described_model(model: str, *, trust_remote_code: bool = False) -> tuple[ModelProfile, str | None]:
    """Return the units of a model by name, and a note where they are from another transformers than the one here.

    A folder, `demo` and file.py:function are read as they are. Then the catalogue answers, without torch, transformers
    or network; where it was made with another transformers and the model's files are in the hub's cache, those do. What
    is not catalogued comes from the hub: its configuration on the meta device.

    Raises:
        ModelError: as `load_skeleton`.
    """
    entry = None if _is_local(model) or trust_remote_code else find_model(model)
    if entry is not None:
        fits, made, here = fits_installed(model)
        if fits:
            return catalogued_profile(model), None
        if not _is_cached(entry, model):
            return catalogued_profile(model), (
                f"the units of {model} are those of transformers {made}, and {here} is installed here: a plan that "
                "does not fit its classes is refused when applied"
            )
    from autoprec.probe.loading import load_skeleton
    from autoprec.probe.units import probe_units

    return probe_units(load_skeleton(model, trust_remote_code=trust_remote_code), model_id=model), None


def _is_local(model: str) -> bool:
    return model == "demo" or is_function(model) or Path(model).expanduser().exists()


def _is_cached(entry: CataloguedModel, model: str) -> bool:
    """Say whether a model's configuration is in the hub's cache (the folders huggingface_hub documents)."""
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    folders = (Path(home).expanduser() / f"models--{name.replace('/', '--')}" for name in (model, entry.id))
    return any(True for folder in folders for _ in folder.glob("snapshots/*/config.json"))
