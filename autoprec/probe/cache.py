"""Results of probes kept in the user's cache, by what they depend on: weights, data, torch, device.

Formats are kept together and can be added one by one. A file that cannot be read is no result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from autoprec import __version__
from autoprec.errors import AutoprecError
from autoprec.files import as_json, from_json, read_json, write_json
from autoprec.probe.steps import device_of
from autoprec.probe.workload import Workload
from autoprec.records import ModelProfile, SensitivityProfile
from autoprec.runtime.identity import fingerprint, weights_digest

__all__ = ["ResultCache", "arithmetic_of", "cache_folder"]


def cache_folder() -> Path:
    """Return the folder of the user's cache: $XDG_CACHE_HOME/autoprec, else ~/.cache/autoprec."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "autoprec"


def arithmetic_of(device: torch.device) -> str:
    """Return what decides a device's arithmetic: the card, or the CPU's vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


@dataclass(frozen=True, slots=True)
class ResultCache:
    """One file of the cache, with the digests it is known by."""

    path: Path
    weights: str
    data: str

    @classmethod
    def of(cls, workload: Workload, units: ModelProfile, seconds: float | None, seed: int) -> ResultCache | None:
        """Return the place of a workload's results, of probes of some units that were allowed so many seconds.

        None where a function of the user's decides figures: nothing tells whether it is the same the next time.
        """
        if callable(workload.outputs) or workload.loss is not None:
            return None
        weights, data = weights_digest(workload.model), workload.data_digest()
        parts = {
            "autoprec": __version__,
            "torch": torch.__version__,
            "device": arithmetic_of(device_of(workload.model)),
            "model": fingerprint(workload.model),
            "units": {u.name: u.modules for u in units.units},
            "weights": weights,
            "data": data,
            "task": str(workload.task),
            "outputs": str(workload.outputs),
            "mode": str(workload.mode),
            "seconds": seconds,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return cls(cache_folder() / "sensitivity" / f"{key[:32]}.json", weights, data)

    def read(self) -> SensitivityProfile | None:
        """Return what is kept, or None."""
        if not self.path.exists():
            return None
        try:
            data = read_json(self.path, what="cached sensitivity")
            return from_json(SensitivityProfile, data, what="cached sensitivity", error=AutoprecError)
        except AutoprecError:
            return None

    def keep(self, profile: SensitivityProfile) -> SensitivityProfile:
        """Write a result and return it with its place; where it cannot be written, with a note why: it is not lost."""
        kept = dataclasses.replace(profile, file=str(self.path))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, as_json(kept))
        except (OSError, AutoprecError) as error:
            note = f"the result could not be kept for another time: {error}"
            return dataclasses.replace(profile, notes=(*profile.notes, note))
        return kept
