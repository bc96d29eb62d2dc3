"""The drop of every assignment of a small real model: what samplers are judged by.

    python benchmarks/exhaustive.py

Writes `benchmarks/truths/exhaustive-demo.npz`: drops (nats, FP8 emulated, ambient BF16) of all 19,683 assignments of
{fp32, bf16, fp8} to the nine units of the shipped GPT whose layers multiply matrices, on two windows of 128 tokens of
its own held-out text; the embedding stays FP32. Resumes where it stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from record import device
from truths import FOLDER

from autoprec import Plan, applied, probe_units
from autoprec.probe.compare import compare
from autoprec.probe.workload import workload_from
from autoprec.runtime.identity import weights_digest

PATH = FOLDER / "exhaustive-demo.npz"
FORMATS = ("fp32", "bf16", "fp8")
_EACH = 729  # assignments between saves


def load(path: Path = PATH) -> tuple[list[str], np.ndarray]:
    """Return the units' names and the drops, [3] * units, one axis a unit in the order of `FORMATS`."""
    with np.load(path) as held:
        names = json.loads(str(held["about"]))["units"]
        drops = held["drops"].astype(float)
    if not np.isfinite(drops).all():
        raise SystemExit(f"{path} is not complete; run python benchmarks/exhaustive.py")
    return names, drops.reshape([len(FORMATS)] * len(names))


def main() -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)  # small products: a second thread would only wait
    workload = workload_from("demo", mode="infer", batch_size=2, batches=1)
    model, batch = workload.model.eval(), workload.batches[0]
    units = [u for u in probe_units(model).units if "fp8" in u.formats]
    modules = dict(model.named_modules())
    wide = {u.name: "fp32" for u in probe_units(model).units}
    base = Plan.assign(model, wide, ambient="bf16", mode="infer")
    every = list(itertools.product(FORMATS, repeat=len(units)))
    about = {
        "units": [u.name for u in units],
        "roles": [str(u.role) for u in units],
        "parameters": [sum(modules[name].weight.numel() for name in u.modules) for u in units],
        "formats": FORMATS,
        "weights_digest": weights_digest(model),
        "data_digest": workload.data_digest(),
        "device": device(),
        "torch": torch.__version__,
    }
    drops = np.full(len(every), np.nan, dtype=np.float32)
    if PATH.exists():
        with np.load(PATH) as held:
            drops = held["drops"]
    with torch.no_grad():
        reference = workload.readout(batch, workload.forward(batch))
        for start in range(0, len(every), _EACH):
            if np.isfinite(drops[start : start + _EACH]).all():
                continue
            begun = time.monotonic()
            for index in range(start, start + _EACH):
                chosen = dict(zip(about["units"], every[index], strict=True))
                with applied(model, base.replace(chosen), emulate=True):
                    part = compare(reference, workload.readout(batch, workload.forward(batch)))
                drops[index] = max(float(part.drop.sum() / part.weight.sum()), 0.0)
            np.savez_compressed(PATH, drops=drops, about=json.dumps(about))
            print(f"{start + _EACH} of {len(every)}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
