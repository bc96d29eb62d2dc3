"""Checks of a model folder before anything of it is loaded, so that a bad one gives one clear message.

Weights in safetensors are data only, and whole or not is told from the header: 8 bytes with its length, JSON with
the place of each tensor, and then exactly the bytes that it names. Pickled weights can run code when read; they
are accepted only if PyTorch's restricted reader (`torch.load(weights_only=True)`) takes them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprec.errors import ModelError, first_line
from autoprec.files import read_json

__all__ = ["check_weights", "checked_config", "read_config", "refuse_remote_code"]

_SAFETENSORS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_FOREIGN = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.bin", "*.safetensors")
_ADVICE = "Write it with model.save_pretrained(folder), or download it again."


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return `config.json` of a model folder.

    Raises:
        ModelError: no folder, no or a damaged config.json, an adapter without its base model, quantised weights.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}. Give a folder with config.json and model.safetensors.")
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds an adapter without its base model. Merge it (merge_and_unload) and save the result."
            )
        raise ModelError(f"the model folder {folder} has no config.json. {_ADVICE}")
    config = read_json(path, what="model configuration", error=ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"model configuration {path} is not a JSON object. {_ADVICE}")
    return config


def checked_config(folder: Path, trust_remote_code: bool = False) -> Mapping[str, Any]:
    """Return `config.json` of a model folder that can be loaded in FP32 without running what it brings.

    Raises:
        ModelError: as `read_config` and `refuse_remote_code`, or quantised weights.
    """
    config = read_config(folder)
    if not trust_remote_code:
        refuse_remote_code(folder, config)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise ModelError(
            f"the weights of {folder} are quantised ({method}), so there is no FP32 reference to compare with. "
            "Use the model as it was before quantisation."
        )
    return config


def refuse_remote_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model or tokenizer that brings its own Python code.

    Raises:
        ModelError: `auto_map` in config.json or tokenizer_config.json.
    """
    tokenizer = folder / "tokenizer_config.json"
    found = {"config.json": config}
    if tokenizer.is_file():
        found[tokenizer.name] = read_json(tokenizer, what="tokenizer configuration", error=ModelError)
    for name, content in found.items():
        code = content.get("auto_map") if isinstance(content, dict) else None
        if code:
            raise ModelError(
                f"the model {folder} runs code of its own ({name} names {_names(code)}). Read that code, and if you "
                "trust it, add --trust-remote-code."
            )


def check_weights(folder: Path) -> None:
    """Check that a folder has weights, that they are whole, and that reading them runs no code.

    Raises:
        ModelError: no weights, missing shards, truncated or damaged files, pickled files that are not plain weights.
    """
    for name, check in ((_SAFETENSORS, _check_safetensors), (_PICKLED, _check_pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            check(folder / name)
            return
        if index.is_file():
            for shard in _shards(index):
                check(shard)
            return
    other = sorted(path.name for kind in _FOREIGN for path in folder.glob(kind))
    seen = f"; {', '.join(other[:3])} cannot be used as such" if other else ""
    raise ModelError(f"the model folder {folder} has no weights ({_SAFETENSORS}){seen}. {_ADVICE}")


def _shards(index: Path) -> list[Path]:
    content = read_json(index, what="index of the weights", error=ModelError)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ModelError(f"the index of the weights {index} has no weight_map. {_ADVICE}")
    shards = sorted({index.parent / place for place in places.values()})
    missing = [shard.name for shard in shards if not shard.is_file()]
    if not shards or missing:
        raise ModelError(f"weights are missing from {index.parent}: {', '.join(missing) or 'all'}. {_ADVICE}")
    return shards


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ModelError(f"{path} is cut off or no safetensors file: {size} bytes, header incomplete. {_ADVICE}")
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ModelError(f"{path} is damaged: its header cannot be read. {_ADVICE}") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "cut off" if size < expected else "damaged"
        raise ModelError(f"{path} is {state}: {size} bytes, but its header describes {expected}. {_ADVICE}")
    if not ends:
        raise ModelError(f"{path} holds no tensors. {_ADVICE}")


def _check_pickled(path: Path) -> None:
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # the restricted reader raises errors of many kinds
        reason = first_line(error)
        raise ModelError(
            f"{path} is refused: pickled weights can run code, and safe loading failed ({reason[:160]}). "
            "Ask for the model in safetensors, or convert it where you trust the file: "
            "model.save_pretrained(folder)."
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ModelError(f"{path} does not hold a table of weights. {_ADVICE}")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _names(code: object) -> str:
    if not isinstance(code, dict):
        return str(code)
    flat = [part for value in code.values() for part in (value if isinstance(value, list) else [value]) if part]
    return ", ".join(sorted({str(part) for part in flat})[:3])
