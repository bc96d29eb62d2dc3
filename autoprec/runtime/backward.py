"""Backward passes of compiled code without autocast, as eager backward passes are.

`torch.compile` traces a backward pass under the autocast that is on where compiled code is entered. A block
compiled by itself, or between the graph breaks of FSDP2 and DDP, is entered inside the plan's ambient autocast:
its FP32, FP16 and emulated FP8 units would multiply their gradients in the ambient format, without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["compiled_backward_as_eager"]

#: plans on two models need not be removed in the opposite order
_held: dict[str, Any] = {"users": 0, "before": None}


@contextlib.contextmanager
def compiled_backward_as_eager() -> Iterator[None]:
    """Let whatever is compiled within the block run its backward pass with autocast off."""
    import torch._functorch.config as functorch  # not part of `import torch`

    config: Any = functorch
    if not hasattr(config, "backward_pass_autocast"):  # torch before the switch traced as eager does
        yield
        return
    if _held["users"] == 0:
        _held["before"] = config.backward_pass_autocast
        config.backward_pass_autocast = "off"
    _held["users"] += 1
    try:
        yield
    finally:
        _held["users"] -= 1
        if _held["users"] == 0:
            config.backward_pass_autocast = _held["before"]
