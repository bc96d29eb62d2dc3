"""Process-wide switches of PyTorch that a plan in force needs in another position, put back by the last plan.

Compiled backward passes: `torch.compile` traces one under the autocast that is on where compiled code is entered. A
block compiled by itself, or between the graph breaks of FSDP2 and DDP, is entered inside the plan's ambient autocast:
its FP32, FP16 and emulated FP8 units would multiply their gradients in the ambient format, without a word.

Fast attention: in evaluation PyTorch computes whole encoder layers from their weights, past the modules that own
them, so that no scope runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

__all__ = ["COMPILED_BACKWARD_AS_EAGER", "FAST_ATTENTION_OFF"]


class _Held(contextlib.AbstractContextManager[None]):
    """A switch in one position from the first entry to the last exit; plans on two models may be removed in any order.

    A class, since a generator would undo the switch when a plan's handle is dropped, and the plan stays in force then.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], position: Any) -> None:
        self._read, self._write, self._position = read, write, position
        self._users, self._before = 0, None

    def __enter__(self) -> None:
        if self._users == 0:
            self._before = self._read()
            self._write(self._position)
        self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0:
            self._write(self._before)


def _functorch() -> Any:
    import torch._functorch.config as config  # not part of `import torch`

    return config


def _read_backward() -> Any:
    return getattr(_functorch(), "backward_pass_autocast", None)


def _write_backward(position: Any) -> None:
    if _read_backward() is not None:  # older torch has no such switch
        _functorch().backward_pass_autocast = position


COMPILED_BACKWARD_AS_EAGER = _Held(_read_backward, _write_backward, "off")
FAST_ATTENTION_OFF = _Held(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
