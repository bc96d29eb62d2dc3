"""Products inside modules that multiply several weights in one forward: experts and MultiheadAttention.

Autocast knows neither grouped matmuls nor FP8, and such modules call no leaf that could carry a scope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CastProducts", "Product", "fp8_attention"]

#: x [..., in] and a weight [in, out] to their product
Product = Callable[[Tensor, Tensor], Tensor]
#: the same for rows sorted by group, weights [groups, in, out] and the rows at which the groups end
Grouped = Callable[[Tensor, Tensor, Tensor], Tensor]

_PAIRS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
_ADDED = (torch.addmm, torch.baddbmm, torch.addbmm, Tensor.addmm, Tensor.baddbmm)


class CastProducts(TorchFunctionMode):
    """Within the block, every product casts its operands to `dtype`, or goes through `fp8` and `grouped` where given.

    In FP8 the matrix of an expert has its own scale. For batched products (`bmm`) each item is an expert.
    """

    def __init__(self, dtype: torch.dtype, fp8: Product | None = None, grouped: Grouped | None = None) -> None:
        super().__init__()
        self.dtype, self.fp8, self.grouped = dtype, fp8, grouped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _PAIRS:
            return self._batched(func, *args, **kwargs)
        if func in _ADDED or func is torch.einsum:
            return func(*(self._low(a) for a in args), **kwargs)
        if "grouped_mm" in str(func):  # by name, as Transformers has one of its own; compilers can trace str() only
            return self._grouped(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _low(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._low(v) for v in value)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.fp8 is None:
            return F.linear(self._low(input), self._low(weight), self._low(bias))
        result = self.fp8(input, weight.t())
        return result if bias is None else result + bias.to(result.dtype)

    def _batched(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        if self.fp8 is None:
            result: Tensor = func(self._low(a), self._low(b))
            return result
        if a.dim() == 3 and b.shape[-1] == 1:  # [n, out, in] @ [n, in, 1]: the weight stands first
            return torch.stack([self.fp8(x.t(), w.t()).t() for w, x in zip(a, b, strict=True)])
        if a.dim() == 3:
            return torch.stack([self.fp8(x, w) for x, w in zip(a, b, strict=True)])
        return self.fp8(a, b)

    def _grouped(self, func: Any, input: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Multiply rows sorted by expert, which end at `offs`, with a matrix [in, out] each."""
        if self.fp8 is None:
            result: Tensor = func(self._low(input), self._low(weight), *rest, **kwargs)
            return result
        assert self.grouped is not None
        return self.grouped(self._low(input), weight, rest[0] if rest else kwargs["offs"])


def fp8_attention(
    module: nn.MultiheadAttention,
    product: Product,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `module` returns, with its four projections done by `product`.

    What is between them is PyTorch's own function, called with identity projections, which change no bit. Call
    with autocast in the format of the attention.
    """
    swap = module.batch_first and query.dim() == 3
    projected = _project(module, product, query, key, value)
    q, k, v = (x.transpose(0, 1) for x in projected) if swap else projected
    identity = torch.eye(module.embed_dim, dtype=q.dtype, device=q.device)
    attended, weights = F.multi_head_attention_forward(
        q,
        k,
        v,
        module.embed_dim,
        module.num_heads,
        None,
        None,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        module.dropout,
        identity,
        None,
        training=module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    result = _biased(product(attended, module.out_proj.weight.t()), module.out_proj.bias)
    return (result.transpose(0, 1) if swap else result), weights


def _project(
    module: nn.MultiheadAttention, product: Product, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Return projected queries, keys and values; one product where they are projected from one tensor."""
    if module.in_proj_weight is not None and query is key is value:
        return _biased(product(query, module.in_proj_weight.t()), module.in_proj_bias).chunk(3, dim=-1)
    if module.in_proj_weight is not None:
        matrices = module.in_proj_weight.chunk(3)
    else:
        matrices = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    inputs = zip((query, key, value), matrices, biases, strict=True)
    return tuple(_biased(product(x, w.t()), b) for x, w, b in inputs)


def _biased(result: Tensor, bias: Tensor | None) -> Tensor:
    return result if bias is None else result + bias.to(result.dtype)
