"""Batches as people have them: keyword arguments, positional arguments, or one tensor."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autoprec.errors import DataError

__all__ = [
    "IGNORED",
    "Batch",
    "CallStyle",
    "attention_of",
    "batch_digest",
    "batch_rows",
    "batch_tensors",
    "batch_to",
    "batch_tokens",
    "call_style",
    "check_batches",
    "describe_batch",
    "joined",
    "picked",
    "read_batches",
    "separable",
]

Batch: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor

IGNORED = -100  #: the label that cross entropy skips, in PyTorch and in transformers


@dataclass(frozen=True, slots=True)
class CallStyle:
    """What a model's forward takes: `labels` by name, and at most `positional` arguments (None: any number)."""

    labels: bool
    positional: int | None

    def split(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None, bool]:
        """Return (positional, keyword arguments, labels, aligned).

        `labels` are those of the batch, whether or not the model is given them. `aligned` says that label t belongs
        to output t already, as in the (inputs, targets) pairs of a DataLoader; a key `labels` follows transformers,
        where the model shifts.
        """
        if isinstance(batch, Mapping):
            given = {key: value for key, value in batch.items() if key != "labels" or self.labels}
            labels = batch.get("labels")
            return (), given, labels if isinstance(labels, Tensor) else None, False
        if isinstance(batch, Tensor):
            return (batch,), {}, None, False
        values = tuple(batch)
        if self.positional is not None and len(values) == self.positional + 1 and isinstance(values[-1], Tensor):
            return values[:-1], {}, values[-1], True
        return values, {}, None, False


def call_style(model: nn.Module) -> CallStyle:
    """Read from the signature of `model.forward` what it takes, looking through wrappers that take anything."""
    for forward in _forwards(model):
        parameters = list(inspect.signature(forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        named = [p for p in named if p.name != "self"]
        if not named:
            continue
        endless = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        count = sum(p.kind is not p.KEYWORD_ONLY for p in named)
        return CallStyle(any(p.name == "labels" for p in named), None if endless else count)
    return CallStyle(labels=True, positional=None)


def _forwards(model: nn.Module) -> Iterator[Any]:
    """Yield the forward of the model, of the classes below a swapped class, and of a wrapped model."""
    yield model.forward
    for kind in type(model).__mro__[1:]:
        if "forward" in vars(kind) and kind is not nn.Module:
            yield vars(kind)["forward"]
    inner: Any = getattr(model, "module", None)
    base: Any = getattr(model, "get_base_model", None)
    if inner is None and callable(base):
        inner = base()
    if isinstance(inner, nn.Module):
        yield from _forwards(inner)


def batch_tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """Return the tensors of a batch with their names (positions for tuples)."""
    if isinstance(batch, Tensor):
        return [("0", batch)]
    items: Iterable[tuple[Any, Any]] = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return [(str(key), value) for key, value in items if isinstance(value, Tensor)]


def batch_to(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)


def attention_of(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """Return the padding mask [B, T] of a batch as booleans, or None where it has none."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def batch_tokens(batch: Batch) -> int:
    """Return the count of attended tokens of a batch, or of its examples where it holds no token ids."""
    mask = attention_of(batch)
    if mask is not None:
        return int(mask.sum())
    tensors = dict(batch_tensors(batch))
    first = tensors.get("input_ids", next(iter(tensors.values())))
    return first.numel() if first.dim() == 2 and not first.is_floating_point() else int(first.shape[0])


def batch_digest(batches: Iterable[Batch]) -> str:
    """Return the sha256 of all tensors of the batches: names, types, shapes and values."""
    digest = hashlib.sha256()
    for index, batch in enumerate(batches):
        for name, tensor in sorted(batch_tensors(batch), key=lambda item: item[0]):
            digest.update(f"{index}/{name}/{tensor.dtype}/{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_batch(batch: Batch) -> str:
    """Return names, shapes and types of the tensors of a batch, such as 'input_ids [8, 128] int64'."""
    return ", ".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in batch_tensors(batch)
    )


def check_batches(batches: object) -> tuple[Batch, ...]:
    """Return the batches as a tuple.

    Raises:
        DataError: no sequence of batches, none at all, or a batch without tensors, without rows, or not finite.
    """
    return read_batches(batches)[0]


def read_batches(batches: object) -> tuple[tuple[Batch, ...], tuple[float, ...] | None]:
    """Return the batches as `check_batches` does, and the seconds waited for each; None where they were in memory.

    Raises:
        DataError: as `check_batches`.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not (
        hasattr(batches, "__iter__") and hasattr(batches, "__len__")
    ):
        raise DataError(
            f"batches must be a list of batches or a DataLoader, got {type(batches).__name__}. "
            "A single batch goes in a list: batches=[batch]."
        )
    found, waits, waiting = [], [], time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - waiting)
        found.append(batch)
        waiting = time.perf_counter()
    if not found:
        raise DataError("there are no batches. Give at least one; the drop's interval needs several.")
    for index, batch in enumerate(found):
        _check_batch(index, batch)
    return tuple(found), None if isinstance(batches, list | tuple) else tuple(waits)


def _check_batch(index: int, batch: object) -> None:
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise DataError(
            f"batch {index} is a {type(batch).__name__}; a batch is a dict of keyword arguments, a tuple of "
            "positional arguments, or a tensor."
        )
    tensors = batch_tensors(batch)
    if not tensors:
        raise DataError(f"batch {index} holds no tensor. Tokenize with return_tensors='pt', or use torch.tensor.")
    for name, tensor in tensors:
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise DataError(f"batch {index}: '{name}' has shape {list(tensor.shape)}, which holds no examples.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"batch {index}: '{name}' holds NaN or infinite values. Clean the data and try again.")


def joined(batches: Sequence[Batch], rows: int) -> tuple[Batch, ...]:
    """Return batches of the same kind and shapes put together, up to `rows` examples each; others as they are."""
    found: list[list[Batch]] = []
    for batch in batches:
        alike = found and _shape(batch) is not None and _shape(batch) == _shape(found[-1][0])
        if alike and sum(batch_rows(b) for b in found[-1]) + batch_rows(batch) <= rows:
            found[-1].append(batch)
        else:
            found.append([batch])
    return tuple(_concatenated(group) for group in found)


def picked(batch: Batch, rows: Tensor) -> Batch:
    """Return some examples of a batch; what is no tensor with rows stays as it is."""

    def pick(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() > 0 else value

    if isinstance(batch, Tensor):
        return batch[rows]
    return {k: pick(v) for k, v in batch.items()} if isinstance(batch, Mapping) else tuple(map(pick, batch))


def separable(batch: Batch) -> bool:
    """Say whether a batch is nothing but tensors with one row an example."""
    return _shape(batch) is not None


def _shape(batch: Batch) -> object | None:
    """Return what two batches must share to be one: names, types and shapes but for the first; None for no tensors."""
    if isinstance(batch, Tensor):
        return (batch.dtype, batch.shape[1:])
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    parts = [(key, v.dtype, v.shape[1:]) if isinstance(v, Tensor) and v.dim() > 0 else None for key, v in items]
    lengths = {v.shape[0] for _, v in batch_tensors(batch) if v.dim() > 0}
    return (type(batch), tuple(parts)) if None not in parts and len(lengths) == 1 else None


def batch_rows(batch: Batch) -> int:
    """Return the count of examples of a batch: the rows of its first tensor."""
    return int(batch_tensors(batch)[0][1].shape[0])


def _concatenated(group: Sequence[Batch]) -> Batch:
    first = group[0]
    if len(group) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([batch for batch in group if isinstance(batch, Tensor)])
    if isinstance(first, Mapping):
        return {key: torch.cat([batch[key] for batch in group if isinstance(batch, Mapping)]) for key in first}
    return tuple(torch.cat(column) for column in zip(*group, strict=True))
