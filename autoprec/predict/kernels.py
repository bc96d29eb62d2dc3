"""A kernel of a step, as the time model prices it: what it multiplies or moves, how often the host launches it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Kernel", "Kind", "Phase", "gemm", "move"]


class Phase(StrEnum):
    """The part of a step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Kind(StrEnum):
    """What a kernel does, for a table of where time goes."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    NORM = "norm"
    ACTIVATION = "activation"
    RESIDUAL = "residual"
    CAST = "cast"  #: between formats, at borders of units and of stored weights
    SCALE = "scale"  #: FP8's: largest value, scaling, second layout
    LOSS = "loss"
    EMBEDDING = "embedding"
    OPTIMIZER = "optimizer"
    ACCUMULATE = "accumulate"  #: adding to gradients that are there


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One matmul, one fused attention, or a run of memory-bound kernels."""

    kind: Kind
    phase: Phase
    #: of a matmul: [m, k] @ [k, n], `batch` times
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    #: format the operands are in, or `tf32`; '' where nothing is multiplied
    operands: str = ""
    #: bytes an element of the result
    out_width: int = 4
    #: of fused attention
    flops: float = 0.0
    length: int = 0
    #: bytes moved in eager mode, and where a compiler fuses what it can
    moved: float = 0.0
    fused: float = 0.0
    launches: float = 1.0
    fused_launches: float = 1.0


def gemm(phase: Phase, m: int, n: int, k: int, operands: str, out_width: int, batch: int = 1, *, kind: Kind) -> Kernel:
    """Return a matrix product."""
    return Kernel(kind=kind, phase=phase, m=m, n=n, k=k, batch=batch, operands=operands, out_width=out_width)


def move(
    kind: Kind, phase: Phase, moved: float, fused: float | None = None, launches: float = 1.0, kept: float | None = None
) -> Kernel:
    """Return memory-bound kernels.

    Args:
        moved: bytes read and written in eager mode.
        fused: the same where a compiler joins it with its neighbours; None: as in eager mode.
        launches: kernels in eager mode.
        kept: of them, those a compiler leaves; None: one if it moves anything.
    """
    joined = moved if fused is None else fused
    left = (1.0 if joined else 0.0) if kept is None else kept
    return Kernel(kind=kind, phase=phase, moved=moved, fused=joined, launches=launches, fused_launches=left)
