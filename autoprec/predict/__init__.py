"""What a run will need and take, from facts alone: nothing here imports torch.

Functions are loaded on first use, so that the package can be told how to read models without loading them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprec.predict.fitting import largest_batch
    from autoprec.predict.memory import memory_bytes
    from autoprec.predict.steptime import gemm_ms, step_ms, step_time

__all__ = ["gemm_ms", "largest_batch", "memory_bytes", "step_ms", "step_time"]

_TIMES = ("gemm_ms", "step_ms", "step_time")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'autoprec.predict' has no attribute '{name}'")
    if name in _TIMES:
        from autoprec.predict import steptime

        return getattr(steptime, name)
    from autoprec.predict import fitting, memory

    return getattr(memory if name == "memory_bytes" else fitting, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
