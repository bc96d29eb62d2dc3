"""One step of a workload: run, timed against another, and its peak of memory.

Timings are taken in pairs, reference and plan in alternating order, because a shared machine's speed drifts:
only the ratio within a pair means anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.plan import GradScalerSettings
from autoprec.probe.batches import Batch
from autoprec.probe.workload import Workload
from autoprec.records import Mode
from autoprec.runtime.tf32 import tf32_set

__all__ = ["Peak", "Stepper", "device_of", "gradients", "kept_state", "peak_bytes", "plain_fp32", "scaler_of", "timed"]


class Stepper:
    """Runs steps of a workload: forward in infer mode; forward, backward and an optimizer step of size 0 in train mode.

    A learning rate of 0 costs the same as any other and leaves the weights for the next comparison.
    """

    def __init__(self, workload: Workload, scaling: GradScalerSettings | None = None) -> None:
        self.workload = workload
        self.device = device_of(workload.model)
        self.scaler: torch.amp.GradScaler | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaling = scaling

    def scaled(self, scaling: GradScalerSettings | None) -> Stepper:
        """Return one with another loss scale that shares the optimizer, whose states take memory."""
        other = Stepper(self.workload, scaling)
        if self.optimizer is not None:
            other.optimizer, other.scaler = self.optimizer, scaler_of(self.device, scaling)
        return other

    def run(self, batch: Batch) -> Any:
        """Do one step and return the raw output of the model."""
        if self.workload.mode is Mode.INFER:
            with torch.no_grad():
                return self.workload.forward(batch)
        optimizer, scaler = self._training()
        optimizer.zero_grad(set_to_none=True)
        raw = self.workload.forward(batch)
        scaler.scale(self.workload.training_loss(batch, raw)).backward()
        scaler.step(optimizer)
        scaler.update()
        return raw

    def _training(self) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
        if self.optimizer is None:
            trained = [p for p in self.workload.model.parameters() if p.requires_grad]
            fused = self.device.type in ("cpu", "cuda", "mps", "xpu")
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=fused)
            self.scaler = scaler_of(self.device, self.scaling)
        assert self.scaler is not None
        return self.optimizer, self.scaler


def scaler_of(device: torch.device, settings: GradScalerSettings | None) -> torch.amp.GradScaler:
    """Return the gradient scaler that a plan's settings ask for; one that does nothing where they are None."""
    if settings is None:
        return torch.amp.GradScaler(device.type, enabled=False)
    return torch.amp.GradScaler(
        device.type,
        init_scale=settings.init_scale,
        growth_factor=settings.growth_factor,
        backoff_factor=settings.backoff_factor,
        growth_interval=settings.growth_interval,
    )


def gradients(workload: Workload, batch: Batch, scaling: GradScalerSettings | None = None) -> list[Tensor]:
    """Return the gradient of each trained parameter on one batch, unscaled, in FP32; an unused parameter's is zero.

    With `scaling` the loss scale backs off until the gradient is finite, as a GradScaler does over its first steps.
    """
    trained = [p for p in workload.model.parameters() if p.requires_grad]
    scale = scaling.init_scale if scaling else 1.0
    while True:
        loss = workload.training_loss(batch, workload.forward(batch)) * scale
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        if scaling is None or scale <= 1.0 or all(bool(g.isfinite().all()) for g in found if g is not None):
            break
        scale *= scaling.backoff_factor
    pairs = zip(trained, found, strict=True)
    return [torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() / scale for p, g in pairs]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def plain_fp32(device_type: str) -> Iterator[None]:
    """Compute as the reference does: no autocast, no TF32, whatever the caller has switched on."""
    with torch.autocast(device_type, enabled=False), tf32_set(False, device_type):
        yield


@contextlib.contextmanager
def kept_state(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """Give back train flags, gradients' absence, random state and (with `weights`) every parameter and buffer."""
    flags = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()] if weights else [*model.buffers()]
    saved = [(t, t.detach().clone()) for t in tensors]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None


def timed(device: torch.device, step: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall seconds of a step, waiting for the device before and after, and what the step returned."""
    _synchronize(device)
    start = time.perf_counter()
    result = step()
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest memory in use during a step; on CPU that of the whole process."""

    bytes: int | None
    reason: str | None


def peak_bytes(device: torch.device, step: Callable[[], Any]) -> Peak:
    """Return the peak memory of a step: the accelerator's own count, or on Linux the process's high-water mark."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return Peak(torch.cuda.max_memory_allocated(device), None)
    if device.type != "cpu":
        return Peak(None, f"{device.type} reports no peak of memory")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed pages back, so that an earlier peak does not stand for this one
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        step()
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, AttributeError) as error:
        return Peak(None, f"the process's high-water mark cannot be reset here ({error})")
    return Peak(int(found[1]) * 1024, None) if found else Peak(None, "no VmHWM in /proc/self/status")
