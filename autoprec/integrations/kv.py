"""A key/value cache in the formats of a plan, for generation.

Transformers caches keys and values as they come. Rotary positions leave keys in FP32, so that the whole cache is cast
anew for each token. Cast once as they enter, they are what the attention would have cast them to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from autoprec.errors import ModelError
from autoprec.formats import Format, layout
from autoprec.plan import Plan
from autoprec.records import Role
from autoprec.runtime.emulate import torch_dtype
from autoprec.runtime.identity import canonical_modules

__all__ = ["PrecisionCache", "cache_dtypes"]


class PrecisionCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache that holds each layer's keys and values in what its attention unit computes in.

    Logits are the same to the bit as without it. Pass a new one to each generation:
    `model.generate(..., past_key_values=PrecisionCache(model, plan))`.

    Raises:
        ModelError: the attention layers do not say which layer of the cache is theirs.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(config=getattr(canonical_modules(model)[""], "config", None))
        self._dtypes = cache_dtypes(model, plan)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Cast, then add to the layer's cache."""
        dtype = self._dtypes.get(layer_idx, key_states.dtype)
        return super().update(key_states.to(dtype), value_states.to(dtype), layer_idx, *args, **kwargs)


def cache_dtypes(model: nn.Module, plan: Plan) -> dict[int, torch.dtype]:
    """Return what each layer of a cache is to be held in, by its index; FP8 units attend in the ambient's format."""
    modules = canonical_modules(model)
    found: dict[int, torch.dtype] = {}
    for unit in plan.units:
        if unit.role is not Role.ATTENTION:
            continue
        choice = plan.ambient if unit.format is Format.FP8 else unit.format
        for name in unit.modules:
            index = getattr(modules[name.rpartition(".")[0]], "layer_idx", None)
            if isinstance(index, int):
                found[index] = torch_dtype(layout(choice))
    if not found:
        raise ModelError(f"the attention layers of this {type(modules['']).__name__} have no layer_idx, so no cache")
    return found
