"""Where a model is: the demo that ships, a local folder, or a Hugging Face id brought into the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from autoprec.errors import ModelError, closest
from autoprec.models import find_model, model_spellings

__all__ = ["model_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_LOCAL = "Give a local folder with config.json and model.safetensors, or `demo`, which needs no network."


def model_folder(model: str, *, weights: bool, code: bool = False) -> tuple[Path, str]:
    """Return the local folder of a model and the id to show for it, downloading a hub model's files if needed.

    Args:
        weights: fetch the weights too, not only configuration and tokenizer.
        code: fetch the Python files as well (only after the user said they are trusted).

    Raises:
        ModelError: no such folder or id, no access, or no network.
    """
    if model == "demo":
        from autoprec.demo import folder

        return Path(folder()), "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, model
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is the folder with its config.json, or file.py:function.")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"there is no model folder {path}{_near(model)}. {_LOCAL}")
    return _download(_hub_id(model), weights, code), model


def _hub_id(model: str) -> str:
    """Return the id that a catalogued alias means; an id is itself."""
    entry = find_model(model)
    return model if entry is None or model in entry.ids else entry.id


def _near(model: str) -> str:
    return closest(model.lower(), model_spellings())


def _download(hub_id: str, weights: bool, code: bool) -> Path:
    small = [*_SMALL, *(["*.py"] if code else [])]
    folder = _fetch(hub_id, [*small, *(["model*.safetensors"] if weights else [])])
    if weights and not any(folder.glob("model*.safetensors")):
        folder = _fetch(hub_id, [*small, "pytorch_model*.bin"])
    return folder


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # only the top folder: subfolders hold exports to other runtimes
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise ModelError(
            f"'{hub_id}' asks for its terms to be accepted. Do so on its page, then `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"'{hub_id}' is no local folder, and the hub has no such model for you{_near(hub_id)}. {_LOCAL}"
        ) from None
    except Exception as error:  # the http client's errors are not a stable list
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        unknown = "" if find_model(hub_id) else f", not in the catalogue of models{_near(hub_id)}"
        raise ModelError(
            f"'{hub_id}' is no local folder{unknown}, and fetching it failed, perhaps for want of a network "
            f"({reason[:160]}). {_LOCAL}"
        ) from None
