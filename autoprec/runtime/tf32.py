"""The TF32 switch: process-wide in PyTorch, so one per plan, set on CUDA devices only and always put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["tf32_set"]

#: torch makes these switches attributes at run time, which no type checker sees
backends: Any = torch.backends


@contextlib.contextmanager
def tf32_set(on: bool, device_type: str) -> Iterator[None]:
    """Let FP32 matmuls and convolutions run in TF32, or not, for the length of the block.

    A switch that already stands right is not touched: writing through the new interface (torch 2.9) makes reads
    through the old one raise in the user's own code.
    """
    wanted = "tf32" if on else "ieee"
    changed: list[tuple[Any, str]] = []
    try:
        for switch in _switches() if device_type == "cuda" else ():
            before = switch.fp32_precision
            effective = backends.fp32_precision if before == "none" else before
            if (effective == "tf32") != on:
                switch.fp32_precision = wanted
                changed.append((switch, before))
        yield
    finally:
        for switch, before in reversed(changed):
            switch.fp32_precision = before


def _switches() -> tuple[Any, ...]:
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
