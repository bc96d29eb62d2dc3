"""What of a model's output is compared with the reference, and at which positions.

Shapes: B examples, P positions (tokens, or 1 for one answer an example), C classes or features.
Counted positions: causal LM with labels: label is not -100 after the shift; other labelled positions: label is
not -100; without labels: all attended positions; a classifier: one an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from autoprec.errors import ModelError
from autoprec.probe.batches import IGNORED
from autoprec.records.measured import LOGITS_UNIT, VALUES_UNIT

__all__ = ["OutputChoice", "Readout", "ReadoutKind", "bare_output", "field_of", "read_logits", "read_values"]


class ReadoutKind(StrEnum):
    """How predictions are compared."""

    LOGITS = "logits"  #: one distribution over C classes a position: KL
    BINARY = "binary"  #: one logit a position: KL of Bernoulli distributions
    VALUES = "values"  #: C numbers a position: relative squared error

    @property
    def drop_unit(self) -> str:
        """The unit of drops compared so."""
        return VALUES_UNIT if self is ReadoutKind.VALUES else LOGITS_UNIT


class OutputChoice(StrEnum):
    """What the user says the output is."""

    LOGITS = "logits"
    VALUES = "values"


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """The compared part of one output.

    `predictions` [B, P, C] in the dtype the model gave; `counted` [B, P] booleans; `labels` [B, P] or None, and
    where `counted` is false their values mean nothing. For a causal LM with labels the shift is already done.
    """

    kind: ReadoutKind
    predictions: Tensor
    counted: Tensor
    labels: Tensor | None

    def is_finite(self) -> bool:
        """Say whether all predictions that count are finite."""
        sums = self.predictions.detach().float().sum(-1)
        return bool(torch.where(self.counted, sums, 0.0).isfinite().all())


def field_of(raw: Any, name: str) -> Tensor | None:
    """Return the tensor called `name` of a model output (an object or a mapping), or None."""
    value = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
    return value if isinstance(value, Tensor) else None


def bare_output(raw: Any) -> Tensor:
    """Return the output itself, or its first tensor that is no scalar (in order, looking into tuples and mappings).

    Raises:
        ModelError: there is no such tensor.
    """
    if isinstance(raw, Tensor) and raw.dim() > 0:
        return raw
    parts = raw.values() if isinstance(raw, Mapping) else raw if isinstance(raw, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 0:
            return part
    raise ModelError(
        f"the model returned {type(raw).__name__}, in which no output tensor was found. "
        "Pass outputs=a function from the model's output to the tensor to compare."
    )


def read_logits(
    logits: Tensor, *, labels: Tensor | None, mask: Tensor | None, shift: bool, multi_label: bool = False
) -> Readout:
    """Make the readout of logits [B, P, C] of a language model, or [B, C] or [B] of a classifier.

    `shift` moves the labels of a causal LM (label t is predicted at t - 1). `mask` [B, P] are attended positions.
    With `multi_label` the C logits of an example are C yes-or-no answers, each counted.

    Raises:
        ModelError: logits of another rank, or labels of another shape.
    """
    if logits.dim() > 3:
        raise ModelError(
            f"logits of shape {list(logits.shape)} are neither of a classifier [batch, classes] nor of a language "
            "model [batch, positions, classes]. Pass outputs='values', or outputs=a function that reshapes them."
        )
    if logits.dim() < 3:
        return _read_classifier(logits, labels, multi_label)
    if labels is not None and labels.shape != logits.shape[:2]:
        raise ModelError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: "
            "there must be one label a position."
        )
    if labels is None:
        return Readout(ReadoutKind.LOGITS, logits, _attended(logits, mask), None)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return Readout(ReadoutKind.LOGITS, logits, labels != IGNORED, labels)


def _read_classifier(logits: Tensor, labels: Tensor | None, multi_label: bool) -> Readout:
    rows = logits.reshape(logits.shape[0], -1)
    binary = multi_label or rows.shape[1] == 1
    predictions = rows[:, :, None] if binary else rows[:, None, :]
    everywhere = torch.ones(predictions.shape[:2], dtype=torch.bool, device=logits.device)
    kind = ReadoutKind.BINARY if binary else ReadoutKind.LOGITS
    if labels is None:
        return Readout(kind, predictions, everywhere, None)
    if labels.numel() != everywhere.numel():
        raise ModelError(
            f"labels of shape {list(labels.shape)} do not fit the logits of a classifier of shape "
            f"{list(logits.shape)}: there must be one label an example."
        )
    labels = labels.reshape(everywhere.shape)
    return Readout(kind, predictions, labels != IGNORED, labels)


def read_values(values: Tensor, *, mask: Tensor | None) -> Readout:
    """Make the readout of values: [B, P, C] by position, padded ones left out; any other rank as one position."""
    if values.dim() != 3:
        values = values.reshape(values.shape[0], 1, -1)
    return Readout(ReadoutKind.VALUES, values, _attended(values, mask), None)


def _attended(output: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape == output.shape[:2]:
        return mask.to(output.device)
    return torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
