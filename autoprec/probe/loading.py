"""Models from a name: the demo, a local folder, a Hugging Face id, or a function in a file of the user's.

Weights are always loaded as FP32: the reference is FP32, and the default of transformers is the file's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoprec.errors import AutoprecError, DeviceError, ModelError
from autoprec.probe.checkpoint import check_weights, checked_config
from autoprec.probe.hub import model_folder
from autoprec.probe.quiet import quiet
from autoprec.probe.task import detect_task
from autoprec.probe.userfile import is_function, load_function
from autoprec.records import Task

__all__ = ["LoadedModel", "load_function", "load_model", "load_skeleton", "move_model"]

T = TypeVar("T")

_AUTO_CLASSES = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.ENCODER: "AutoModel",
    Task.IMAGE: "AutoModelForImageClassification",
    Task.SEQ2SEQ: "AutoModelForSeq2SeqLM",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in eval mode with FP32 weights; `notes` say what was decided for the user."""

    model: nn.Module
    tokenizer: Any | None
    model_id: str
    task: Task
    notes: tuple[str, ...] = ()


def load_model(
    model: str, *, task: Task | None = None, trust_remote_code: bool = False, device: str = "cpu"
) -> LoadedModel:
    """Load a model with its tokenizer, checking everything that can be checked before.

    Args:
        model: `demo`, a local folder, a Hugging Face id or alias, or file.py:function.
        task: None takes the class named in config.json; a task takes the class transformers has for it.
        device: a torch device such as `cpu` or `cuda:1`.

    Raises:
        ModelError: missing, damaged, unsafe or incomplete weights, own code without trust, or an unknown class.
        DeviceError: the device cannot hold the model.
    """
    if is_function(model):
        loaded = _from_function(model, task)
    else:
        folder, name = model_folder(model, weights=True, code=trust_remote_code)
        config = checked_config(folder, trust_remote_code)
        check_weights(folder)
        loaded = _from_folder(folder, name, config, task, trust_remote_code)
    _check_finite(loaded.model, model)
    move_model(loaded.model, model, device)
    loaded.model.eval()
    return loaded


def move_model(model: nn.Module, name: str, device: str) -> None:
    """Move a model to a device in place; DeviceError where there is no such device or not enough memory."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise DeviceError(f"{name} cannot be moved to '{device}': {error}. Try --device cpu.") from error


def load_skeleton(model: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model on the meta device from its configuration alone: shapes and ties, no weights, never runnable.

    A model of file.py:function is whatever the function returns, weights included.

    Raises:
        ModelError: as `load_model`, but for the weights, which are not looked at.
    """
    if is_function(model):
        return _from_function(model, None).model
    folder, name = model_folder(model, weights=False, code=trust_remote_code)
    config = checked_config(folder, trust_remote_code)

    def build() -> nn.Module:
        settings, chosen, _ = _choose(folder, config, None, trust_remote_code)
        build_from = chosen.from_config if _is_auto(chosen) else chosen._from_config
        extra = {"trust_remote_code": trust_remote_code} if _is_auto(chosen) else {}
        with torch.device("meta"):
            skeleton: nn.Module = build_from(settings, dtype=torch.float32, **extra)
        return skeleton.eval()

    return _guarded(build, f"a skeleton of {name}")


def _from_function(model: str, task: Task | None) -> LoadedModel:
    value = load_function(model)()
    # a Workload is known by what it has: this file is below it
    found = value if isinstance(value, nn.Module) else getattr(value, "model", None)
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{model} returned {type(value).__name__}. It must return an autoprec.Workload or a torch.nn.Module."
        )
    known = task or getattr(value, "task", None) or detect_task(type(found).__name__, getattr(found, "config", None))
    return LoadedModel(found, None, model, known or Task.ENCODER)


def _from_folder(
    folder: Path, name: str, config: Mapping[str, Any], task: Task | None, trust_remote_code: bool
) -> LoadedModel:
    def load() -> tuple[nn.Module, Mapping[str, Any], Task]:
        _, chosen, known = _choose(folder, config, task, trust_remote_code)
        extra = {"trust_remote_code": trust_remote_code} if _is_auto(chosen) else {}
        model, info = chosen.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **extra
        )
        return model, info, known

    model, info, known = _guarded(load, f"the model {name}")
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of {folder} lack {_listed(missing)}, which {type(model).__name__} needs: its results "
            f"would be random. {_other_task(task)}"
        )
    if known is Task.CAUSAL_LM and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # what transformers takes then, after a warning
    unused = sorted(str(key) for key in info["unexpected_keys"])
    notes = [f"{type(model).__name__} ({known.value}), as {'asked' if task else 'config.json says'}."]
    if unused:
        notes.append(f"{type(model).__name__} has no use for {_listed(unused)} of the weights.")
    return LoadedModel(model, _tokenizer(folder, name, trust_remote_code), name, known, tuple(notes))


def _choose(
    folder: Path, config: Mapping[str, Any], task: Task | None, trust_remote_code: bool
) -> tuple[Any, Any, Task]:
    """Return (configuration, class, task): the class that config.json names, unless the task asks for another."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    names = [str(name) for name in config.get("architectures") or ()]
    own = config.get("auto_map") or {}
    for name in names:
        known = detect_task(name, settings)
        chosen = getattr(transformers, name, None)
        if own or chosen is None or known is None or task not in (None, known):
            continue
        return settings, chosen, known
    # its own code says by its auto classes what it is for; the name of its class need not
    known = task or next((t for t, auto in _AUTO_CLASSES.items() if auto in own), None)
    known = known or next((t for t in (detect_task(name, settings) for name in names) if t is not None), None)
    known = known or (Task.SEQ2SEQ if getattr(settings, "is_encoder_decoder", False) else None)
    if known is None:
        said = f"class {names[0]}, whose purpose is not known here" if names else "no class"
        raise ModelError(
            f"config.json of {folder} names {said}. Say what it is for: --task {', '.join(t.value for t in Task)}."
        )
    chosen = getattr(transformers, _AUTO_CLASSES[known])
    if not own and type(settings) not in chosen._model_mapping:
        raise ModelError(
            f"transformers has no class of task {known.value} for a {settings.model_type} model "
            f"({_AUTO_CLASSES[known]}). Leave --task out, or choose another."
        )
    return settings, chosen, known


def _is_auto(chosen: Any) -> bool:
    return str(chosen.__name__).startswith("AutoModel")


def _tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any | None:
    if not any(True for kind in _TOKENIZER_FILES for _ in folder.glob(kind)):
        return None

    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)

    return _guarded(load, f"the tokenizer of {name}")


def _guarded(action: Callable[[], T], what: str) -> T:
    """Run an action of transformers quietly; whatever it raises becomes a ModelError of one line."""
    try:
        with quiet():
            return action()
    except AutoprecError:
        raise
    except Exception as error:  # transformers and user code raise errors of every kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"transformers cannot load {what}: {lines[0][:300]} ({type(error).__name__}). Check that "
            "`AutoModel.from_pretrained` takes it with the transformers installed here."
        ) from error


def _check_finite(model: nn.Module, name: str) -> None:
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        low, high = torch.aminmax(parameter.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ModelError(
                f"weight '{tensor_name}' of {name} holds NaN or infinite values. Use an intact checkpoint."
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _other_task(task: Task | None) -> str:
    if task is not None:
        return f"The folder was not trained for --task {task.value}: leave the option out, or take a model that was."
    return "Save the model again with all its weights (model.save_pretrained), or choose another --task."
