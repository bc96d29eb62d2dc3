"""A model or checkpoint folder, looked at from outside: configuration, tensors, the states a trainer left beside
them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autoprec.doctor.weights import EXPONENTS, Tensor, exponents, read_tensors
from autoprec.errors import AutoprecError, ModelError, first_line
from autoprec.files import read_json
from autoprec.models import catalogued_facts, catalogued_profile, find_model
from autoprec.probe.described import named_facts
from autoprec.probe.hub import model_folder
from autoprec.records import ModelFacts

__all__ = ["Checkpoint", "Scan", "read_checkpoint"]

#: bytes of weights that are looked into; of more, blocks of each tensor
_SCAN_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class Scan:
    """What all floating weights hold together."""

    histogram: Mapping[str, Any]  #: FP32 exponent field → count, by stored format
    spoiled: tuple[str, ...]  #: tensors with NaN or infinity
    norms: int  #: norm weights
    norms_at_one: tuple[str, ...]  #: those whose values are all exactly 1
    fresh: bool  #: every large matrix spreads exactly as a new one does


class Checkpoint:
    """A model by its files; a catalogued name has facts and shapes only."""

    def __init__(self, name: str, folder: Path | None, config: Mapping[str, Any], tensors: list[Tensor]) -> None:
        self.name, self.folder, self.config, self.tensors = name, folder, config, tensors

    @cached_property
    def bytes_by_format(self) -> Counter[str]:
        """Bytes of weights by the format they are stored in."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.format] += tensor.bytes
        return sizes

    @property
    def stored(self) -> str | None:
        """The format that most of the weights are stored in, by values; the configuration's where there are none."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.format in ("fp32", "bf16", "fp16", "fp64"):
                counts[tensor.format] += tensor.count
        if counts:
            return counts.most_common(1)[0][0]
        said = str(self.config.get("dtype") or self.config.get("torch_dtype") or "").removeprefix("torch.")
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(said)

    @property
    def parameters(self) -> int:
        """How many weights it has; of a catalogued name the catalogue's."""
        if self.tensors:
            return sum(t.count for t in self.tensors)
        return catalogued_profile(self.name).parameters if find_model(self.name) else 0

    @property
    def adapter(self) -> bool:
        """Whether it holds adapters for another model."""
        return self.folder is not None and (self.folder / "adapter_config.json").is_file()

    @cached_property
    def facts(self) -> ModelFacts | None:
        """The model's facts, where its configuration says them."""
        try:
            return catalogued_facts(self.name) if self.folder is None else named_facts(str(self.folder))
        except AutoprecError:
            return None

    @property
    def family(self) -> str:
        """Words that tell the family: type, classes, name."""
        classes = " ".join(map(str, self.config.get("architectures") or ()))
        return f"{self.config.get('model_type', '')} {classes} {self.name}".lower()

    @property
    def matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """The shapes of all matrices, by name."""
        if self.tensors:
            return [(t.name, t.shape) for t in self.tensors if len(t.shape) == 2 and min(t.shape) > 1]
        if find_model(self.name) is None:
            return []
        return [(leaf.module, (leaf.outputs, leaf.inputs)) for leaf in catalogued_profile(self.name).leaves]

    @cached_property
    def scan(self) -> Scan:
        """What the values are; reads the weights, or blocks of them where there are more than 3 GB."""
        total = sum(self.bytes_by_format.values())
        share = min(1.0, _SCAN_BYTES / max(total, 1))
        histogram: dict[str, Any] = {}
        spoiled, ones, norms, spreads = [], [], 0, []
        for tensor in self.tensors:
            if tensor.format not in ("fp32", "bf16", "fp16"):
                continue
            values = tensor.values(max(1 << 16, int(tensor.count * share)))
            counts = exponents(values)
            if counts[EXPONENTS - 1]:
                spoiled.append(tensor.name)
            histogram[tensor.format] = histogram.get(tensor.format, 0) + counts
            if _is_norm(tensor):
                norms += 1
                if bool((values == 1.0).all()):
                    ones.append(tensor.name)
            if len(tensor.shape) == 2 and tensor.count >= 4096 and not counts[EXPONENTS - 1]:
                spreads.append(float(values.std(dtype=np.float64)))
        return Scan(histogram, tuple(spoiled), norms, tuple(ones), self._fresh(spreads))

    def _fresh(self, spreads: list[float]) -> bool:
        wanted = self.config.get("initializer_range", 0.02)
        if not spreads or not isinstance(wanted, float):
            return False
        # 4096 values tell a spread to 1.1 %, so three of that
        return all(abs(s / wanted - 1) < 0.035 for s in spreads)

    @cached_property
    def trainer_state(self) -> Mapping[str, Any]:
        """What a Trainer wrote of its run: `trainer_state.json`; empty where there is none."""
        return self._json("trainer_state.json")

    def _json(self, name: str) -> Mapping[str, Any]:
        path = None if self.folder is None else self.folder / name
        if path is None or not path.is_file():
            return {}
        try:  # Trainers write NaN, which JSON does not have
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    @cached_property
    def optimizer_formats(self) -> Counter[str]:
        """The formats of an optimizer's moments in `optimizer.pt`, counted; empty where there is none to read."""
        state = self._state("optimizer.pt")
        formats: Counter[str] = Counter()
        moments = state.get("state") if isinstance(state, dict) else None
        for entry in moments.values() if isinstance(moments, dict) else ():
            for name, value in entry.items() if isinstance(entry, dict) else ():
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer") and hasattr(value, "dtype"):
                    formats[str(value.dtype).removeprefix("torch.")] += 1
        return formats

    @cached_property
    def scaler_scale(self) -> float | None:
        """The loss scale in `scaler.pt`, None where there is none."""
        state = self._state("scaler.pt")
        scale = state.get("scale") if isinstance(state, dict) else None
        return float(scale) if isinstance(scale, int | float) else None

    def _state(self, name: str) -> Any:
        path = None if self.folder is None else self.folder / name
        if path is None or not path.is_file():
            return {}
        import torch

        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=path.read_bytes()[:4] == b"PK\x03\x04")
        except Exception:  # a state of another program, or one that holds more than data
            return {}


def _is_norm(tensor: Tensor) -> bool:
    name = tensor.name.lower()
    parts = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return len(tensor.shape) == 1 and name.endswith("weight") and ("norm" in parts or parts.startswith("ln"))


def read_checkpoint(model: str) -> Checkpoint:
    """Read a folder, or what is known of a name.

    Raises:
        ModelError: there is no such model, or its files are damaged.
    """
    path = Path(model).expanduser()
    if not path.exists() and model != "demo" and find_model(model) is not None:
        entry = find_model(model)
        assert entry is not None
        return Checkpoint(model, None, entry.configuration, [])
    folder, name = model_folder(model, weights=True)
    config: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():
        found = read_json(folder / "config.json", what="model configuration", error=ModelError)
        config = found if isinstance(found, dict) else {}
    try:
        tensors = read_tensors(folder)
    except OSError as fault:
        raise ModelError(f"the weights in {folder} cannot be read: {first_line(fault)}") from None
    if not config and not tensors and not (folder / "trainer_state.json").is_file():
        raise ModelError(
            f"{folder} is no model or checkpoint folder: it has neither config.json nor weights (*.safetensors, "
            "pytorch_model.bin). Give the folder that save_pretrained or the Trainer wrote."
        )
    return Checkpoint(name, folder, config, tensors)
