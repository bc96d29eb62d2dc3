"""A module in memory looked at as a checkpoint is: its parameters and buffers, those too that no file would hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoprec.doctor.checkpoint import Checkpoint
from autoprec.doctor.weights import Tensor

__all__ = ["module_checkpoint"]

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def module_checkpoint(made: Any, name: str) -> Checkpoint | None:
    """Return what a function of the user's gave, a module or a workload, as a checkpoint; None for anything else."""
    model = made if isinstance(made, nn.Module) else getattr(made, "model", None)
    if not isinstance(model, nn.Module):
        return None
    tensors = [
        _tensor(key, value.detach())
        for key, value in (*model.named_parameters(), *model.named_buffers())
        if value.dtype in _NAMES and not value.is_meta
    ]
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    values = {} if to_dict is None else to_dict()
    return Checkpoint(name, None, {"architectures": [type(model).__name__], **values}, tensors)


def _tensor(name: str, value: torch.Tensor) -> Tensor:
    kept = value.cpu().contiguous()
    bits = kept.view(torch.uint16) if kept.dtype is torch.bfloat16 else kept
    return Tensor(name, _NAMES[value.dtype], tuple(value.shape), "in memory", bits.numpy())
