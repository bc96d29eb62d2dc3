"""Times of shapes kept in the user's cache, by device, driver, torch, threads and mode: shapes recur among models.

What is kept is the time in a format over FP32's: FP32 itself is timed each time, because machines have better and worse
days. A spread that was wide is not kept. A file that cannot be read is no result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from autoprec import __version__
from autoprec.errors import AutoprecError
from autoprec.files import as_json, from_json, read_json, write_json
from autoprec.formats import Format
from autoprec.probe.cache import arithmetic_of, cache_folder
from autoprec.probe.host import cpu_name, driver_version
from autoprec.records import Estimate, Mode
from autoprec.records.figures import STRICT

__all__ = ["KeptRatio", "ShapeCache"]

#: a ratio whose interval is wider than this share of it is timed again
_WIDE = 0.1


@dataclass(frozen=True, slots=True)
class KeptRatio:
    """A shape's seconds in a format over FP32's: of a step (forward and backward), and of the forward alone."""

    __pydantic_config__: ClassVar = STRICT

    step: Estimate
    forward: float
    #: what `break_even` found where the format does not pay
    even: tuple[int, bool] | None = None

    def is_settled(self, hopeless: float) -> bool:
        """Say whether timing it again would tell nothing that matters: it is narrow, or far slower than FP32."""
        return self.step.value > hopeless or self.step.high - self.step.low <= _WIDE * self.step.value


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a file holds."""

    __pydantic_config__: ClassVar = STRICT

    ratios: Mapping[str, Mapping[Format, KeptRatio]]


@dataclass(frozen=True, slots=True)
class ShapeCache:
    """One file of the cache: ratios by shape and format."""

    path: Path
    ratios: Mapping[str, Mapping[Format, KeptRatio]]

    @classmethod
    def of(cls, device: torch.device, mode: Mode, ambient: Format) -> ShapeCache:
        """Return what is kept for a device as it is now."""
        parts = {
            "autoprec": __version__,
            "torch": torch.__version__,
            "device": arithmetic_of(device),
            "driver": cpu_name() if device.type == "cpu" else driver_version(),
            "threads": torch.get_num_threads(),
            "mode": mode,
            "ambient": ambient,
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = cache_folder() / "speed" / f"{key[:32]}.json"
        try:
            data = read_json(path, what="cached times") if path.exists() else {"ratios": {}}
            return cls(path, from_json(_Kept, data, what="cached times").ratios)
        except AutoprecError:
            return cls(path, {})

    def keep(self, found: Mapping[str, Mapping[Format, KeptRatio]]) -> str | None:
        """Write ratios beside those kept; return why not where that cannot be done: the result is not lost."""
        rows = {shape: {**self.ratios.get(shape, {}), **found.get(shape, {})} for shape in {**self.ratios, **found}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, as_json(_Kept(rows)))
        except (OSError, AutoprecError) as error:
            return f"times could not be kept for another time: {error}"
        return None
