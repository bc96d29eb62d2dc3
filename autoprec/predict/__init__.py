"""What a run will need, from facts alone: nothing here imports torch.

Functions are loaded on first use, so that the package can be told how to read models without loading them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprec.predict.fitting import largest_batch
    from autoprec.predict.memory import memory_bytes

__all__ = ["largest_batch", "memory_bytes"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'autoprec.predict' has no attribute '{name}'")
    from autoprec.predict import fitting, memory

    return getattr(memory if name == "memory_bytes" else fitting, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
