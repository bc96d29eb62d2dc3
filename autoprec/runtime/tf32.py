"""The TF32 switch: process-wide in PyTorch, so one per plan, set on CUDA devices only and always put back.

PyTorch holds it twice. The older switches (`allow_tf32`, `set_float32_matmul_precision`) write the newer ones
(`fp32_precision`) as well, but not the other way round, and reading an older one raises where the two disagree.
So each write here leaves both in agreement, and what is put back is the older value and, under it, each newer one:
`"none"` for a switch that inherits from its backend's or the general one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch

__all__ = ["Tf32Set", "tf32_set"]

#: torch makes these switches attributes at run time, which no type checker sees. The newer ones are reached by
#: (backend, operation), since the attribute of a whole backend does not always write what it reads (mkldnn's).
backends: Any = torch.backends
_core: Any = torch._C

Key = tuple[str, str]

_MATMUL: Key = ("cuda", "matmul")
_CPU_MATMUL: Key = ("mkldnn", "matmul")  # the older matmul switch covers it too
_CUDNN: tuple[Key, ...] = (("cuda", "conv"), ("cuda", "rnn"))
#: the newer switches that may be written; none where torch has the older ones alone
_KEYS = (_MATMUL, _CPU_MATMUL, *_CUDNN) if hasattr(_core, "_get_fp32_precision_getter") else ()
_GENERAL: Key = ("generic", "all")


class _State(NamedTuple):
    """What there is to put back: both older switches, and each newer one's own value."""

    matmul: str
    cudnn: bool
    own: tuple[str, ...]


class Tf32Set(contextlib.AbstractContextManager["Tf32Set"]):
    """TF32 in force from `__enter__` to `__exit__`; dropping the object without an exit leaves it in force."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._before: _State | None = None

    def __enter__(self) -> Tf32Set:
        self._before = _state()
        _IN_FORCE.append(self)
        try:
            (_switch_on if self.on else _switch_off)(self._before)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = next(i for i, held in enumerate(_IN_FORCE) if held is self)
        _IN_FORCE.pop(place)
        before, self._before = self._before, None
        if place < len(_IN_FORCE):  # one entered later still holds: what this one found is for that one to put back
            _IN_FORCE[place]._before = before
        elif before is not None and before != _state():
            _put_back(before)


#: those in force, oldest first: plans on two models need not be removed in the opposite order
_IN_FORCE: list[Tf32Set] = []


def tf32_set(on: bool, device_type: str) -> contextlib.AbstractContextManager[object]:
    """Let FP32 matmuls and cuDNN's convolutions and RNNs run in TF32, or not, for the length of the block.

    On devices other than "cuda" nothing is read or written. A switch that already stands right is not written. At
    the end `allow_tf32` of both backends, the matmul precision and the `fp32_precision` of CUDA's matmul, conv and
    rnn and of mkldnn's matmul are as they were at the start, also where code inside the block changed them; what it
    changed elsewhere (the general switch, a backend's) stays. Older switches can be read and either kind written
    meanwhile; only writing a newer one and then reading its older one raises torch's own error about mixing them.
    """
    return Tf32Set(on) if device_type == "cuda" else contextlib.nullcontext()


def _switch_on(before: _State) -> None:
    if not _is_on(_MATMUL, before):
        if before.matmul == "highest":
            backends.cuda.matmul.allow_tf32 = True
        else:
            _write(_MATMUL, "tf32")
    if not before.cudnn and not all(_is_on(key, before) for key in _CUDNN):
        backends.cudnn.allow_tf32 = True
    for key in _CUDNN:
        if not _is_on(key, before):
            _write(key, "tf32")


def _switch_off(before: _State) -> None:
    if _is_on(_MATMUL, before):
        backends.cuda.matmul.allow_tf32 = False
        # "high" and "medium" allow it on the CPU too, where the older switch, now "highest", has to agree
        if _KEYS and before.matmul != "highest" and _read(_CPU_MATMUL) in ("tf32", "bf16"):
            _write(_CPU_MATMUL, "ieee")
    if any(_is_on(key, before) for key in _CUDNN):
        backends.cudnn.allow_tf32 = False
        for key in _CUDNN:
            if _KEYS and _read(key) == "tf32":  # inherited
                _write(key, "ieee")


def _is_on(key: Key, before: _State) -> bool:
    if _KEYS:
        return bool(_read(key) == "tf32")
    return before.matmul != "highest" if key == _MATMUL else before.cudnn


def _state() -> _State:
    own = tuple(_own(key) for key in _KEYS)
    return _State(_matmul_precision(own), _cudnn_allowed(own), own)


def _put_back(before: _State) -> None:
    torch.set_float32_matmul_precision(before.matmul)
    backends.cudnn.allow_tf32 = before.cudnn
    for key, value in zip(_KEYS, before.own, strict=True):
        _write(key, value)


def _own(key: Key) -> str:
    """Return a newer switch's own value, "none" where it inherits: reading it gives what it comes down to."""
    value = _read(key)
    if value == "none" or key == _GENERAL:
        return value
    parent = _GENERAL if key[1] == "all" else (key[0], "all")
    if _read(parent) != value:
        return value
    # its own or inherited: see whether it follows
    with _written(_own(parent), parent, "tf32" if value == "ieee" else "ieee"):
        return value if _read(key) == value else "none"


def _matmul_precision(own: tuple[str, ...]) -> str:
    """Return the older matmul switch, also where the newer ones disagree with it."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    values = dict(zip(_KEYS, own, strict=True))
    with _written(values[_MATMUL], _MATMUL, "ieee"), _written(values[_CPU_MATMUL], _CPU_MATMUL, "ieee"):
        return torch.get_float32_matmul_precision()


def _cudnn_allowed(own: tuple[str, ...]) -> bool:
    """Return the older cuDNN switch, also where the newer ones disagree with it."""
    with contextlib.suppress(RuntimeError):
        return bool(backends.cudnn.allow_tf32)
    values = dict(zip(_KEYS, own, strict=True))
    with contextlib.ExitStack() as written:
        for key in _CUDNN:
            written.enter_context(_written(values[key], key, "tf32"))
        with contextlib.suppress(RuntimeError):
            return bool(backends.cudnn.allow_tf32)  # raises unless it is on
    return False


@contextlib.contextmanager
def _written(own: str, key: Key, value: str) -> Iterator[None]:
    """Write a newer switch for a moment; `own` is what it goes back to."""
    _write(key, value)
    try:
        yield
    finally:
        _write(key, own)


def _read(key: Key) -> str:
    return str(_core._get_fp32_precision_getter(*key))


def _write(key: Key, value: str) -> None:
    if _KEYS:
        _core._set_fp32_precision_setter(*key, value)
