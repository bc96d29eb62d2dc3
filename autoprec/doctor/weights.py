"""What the tensors of a checkpoint hold, from their files alone: formats, shapes, exponents, values that are no
numbers.

Safetensors are data with a header, so neither torch nor the model's code is needed; pickled weights go through '
'PyTorch's
restricted reader. A float's exponent says nearly all that matters here, so a tensor is summed up as a histogram of its
FP32 exponent field: 255 is NaN or infinity, and how far an update reaches is a matter of powers of two.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autoprec.errors import ModelError, first_line

__all__ = ["EXPONENTS", "Tensor", "exponents", "read_tensors"]

EXPONENTS = 256
#: values looked at in one tensor, evenly spaced blocks of it; one spoiled value spoils its row soon
_VALUES = 1 << 24
_BLOCK = 1 << 16

_SAFE_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_HEADER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file; `values` are read when they are asked for."""

    name: str
    format: str  #: fp32, bf16, …, or the file's own name of an integer type
    shape: tuple[int, ...]
    file: str
    _data: Any

    @property
    def count(self) -> int:
        """How many values it has."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1

    @property
    def bytes(self) -> int:
        """Its size as it is stored."""
        return self.count * {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}.get(self.format, 1)

    def values(self, most: int = _VALUES) -> npt.NDArray[np.float32]:
        """Return up to `most` values as FP32, evenly spaced blocks of a longer tensor."""
        raw = self._data() if callable(self._data) else self._data
        flat = raw.reshape(-1)
        if flat.size > most:
            starts = np.linspace(0, flat.size - _BLOCK, max(1, most // _BLOCK)).astype(np.int64)
            flat = np.concatenate([flat[s : s + _BLOCK] for s in starts])
        if self.format == "bf16":
            wide: npt.NDArray[np.float32] = (flat.astype(np.uint32) << 16).view(np.float32)
            return wide
        with np.errstate(over="ignore"):
            result: npt.NDArray[np.float32] = flat.astype(np.float32)
        return result


def exponents(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return how many values have each FP32 exponent field; 0 is zero and subnormal, 255 not finite."""
    fields = (values.view(np.uint32) >> 23) & 0xFF
    return np.bincount(fields, minlength=EXPONENTS)


def read_tensors(folder: Path) -> list[Tensor]:
    """Return the tensors of a folder's weights, those of adapters too; empty where there are none.

    Raises:
        ModelError: a file is damaged, or a pickle that PyTorch's restricted reader refuses.
    """
    found: list[Tensor] = []
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        found += _safetensors(path)
    if not safe:
        for path in sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")]):
            found += _pickled(path)
    return found


def _safetensors(path: Path) -> Iterator[Tensor]:
    size = path.stat().st_size
    advice = "Save the model again, or download it again."
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise ModelError(f"{path} is cut off or no safetensors file ({size} bytes). {advice}")
        try:
            header = json.loads(file.read(length))
            entries = [
                (n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items() if n != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{path} is damaged: its header cannot be read. {advice}") from None
    if 8 + length + max((end for *_, end in entries), default=0) > size:
        raise ModelError(f"{path} is cut off: its header describes more than its {size} bytes. {advice}")
    for name, kind, shape, begin, end in entries:
        yield Tensor(
            name, _NAMES.get(kind, kind.lower()), shape, path.name, _mapped(path, kind, 8 + length + begin, end - begin)
        )


def _mapped(path: Path, kind: str, offset: int, count: int) -> Any:
    known = _SAFE_TYPES.get(kind)
    if known is None or count == 0:
        return np.empty(0, np.float32)
    return lambda: np.memmap(path, dtype=known, mode="r", offset=offset, shape=(count // int(known[-1]),))


def _pickled(path: Path) -> Iterator[Tensor]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted reader raises errors of many kinds
        raise ModelError(f"{path} is refused: it is no plain table of weights ({first_line(error)[:160]}).") from None
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor) and value.dtype in names:
            kept = value.contiguous()
            data = (kept.view(torch.uint16) if kept.dtype is torch.bfloat16 else kept).numpy()
            yield Tensor(str(name), names[value.dtype], tuple(value.shape), path.name, data)
