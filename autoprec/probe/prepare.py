"""Batches for a loaded model from text, with the sizes that were not given chosen and said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from autoprec.errors import DataError, UsageError
from autoprec.probe.loading import LoadedModel
from autoprec.probe.text import Examples, label_ids, make_batches, pad_token_id
from autoprec.records import Task

__all__ = ["BatchWish", "max_positions", "prepare_batches"]

_BATCH_SIZE, _LARGE_BATCH_SIZE, _SEQ_LEN, _BATCHES = 8, 2, 128, 8
_LARGE_PARAMETERS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWish:
    """What the user said about the batches; None where nothing.

    Raises:
        UsageError: a size below one.
    """

    data: Path | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in self._sizes().items():
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")

    @property
    def named(self) -> list[str]:
        """The options that were given."""
        given = [name for name, value in self._sizes().items() if value is not None]
        return [*(["--data"] if self.data else []), *given]

    def _sizes(self) -> dict[str, int | None]:
        return {"--batch-size": self.batch_size, "--seq-len": self.seq_len, "--batches": self.batches}


def prepare_batches(
    loaded: LoadedModel, examples: Examples, wish: BatchWish
) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
    """Return batches (on the CPU) and one sentence for each thing that was chosen for the user.

    A model whose configuration has no padding token is given the tokenizer's, which its classifier asks for.

    Raises:
        DataError: no tokenizer, sequences longer than the model takes, too little text, unknown labels.
    """
    if loaded.task is Task.IMAGE:
        raise DataError(
            f"{loaded.model_id} takes images, and --data is text. Give file.py:function returning a Workload."
        )
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.model_id} has no tokenizer, so text cannot be given to it. Save one into its folder "
            "(tokenizer.save_pretrained), or give file.py:function returning a Workload."
        )
    config = getattr(loaded.model, "config", None)
    seq_len = _sequence_length(loaded, config, wish.seq_len)
    large = sum(parameter.numel() for parameter in loaded.model.parameters()) > _LARGE_PARAMETERS
    batch_size = wish.batch_size or (_LARGE_BATCH_SIZE if large else _BATCH_SIZE)
    batches = wish.batches or _BATCHES
    if loaded.task is Task.CLASSIFICATION and config is not None:
        examples = label_ids(examples, classes=config.num_labels, names=config.label2id or {})
        if config.pad_token_id is None:
            config.pad_token_id = pad_token_id(loaded.tokenizer)
    made = make_batches(
        examples,
        loaded.tokenizer,
        task=loaded.task,
        batch_size=batch_size,
        seq_len=seq_len,
        batches=batches,
        seed=wish.seed,
    )
    notes = [f"Data: {examples.source}."] if examples.shipped else []
    if None in (wish.batch_size, wish.seq_len, wish.batches):
        notes.append(f"{batches} batches of {batch_size} sequences of up to {seq_len} tokens.")
    return made, tuple(notes)


def max_positions(config: Any, tokenizer: Any) -> int | None:
    """Return the longest sequence that model and tokenizer declare, or None where they declare none."""
    declared = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    # tokenizers say 1e30 for no limit
    known = [int(value) for value in declared if isinstance(value, int | float) and 0 < value < 1e9]
    return min(known, default=None)


def _sequence_length(loaded: LoadedModel, config: Any, wanted: int | None) -> int:
    longest = max_positions(config, loaded.tokenizer)
    if wanted is None:
        return min(_SEQ_LEN, longest or _SEQ_LEN)
    if longest is not None and wanted > longest:
        raise DataError(f"{loaded.model_id} takes at most {longest} tokens, not {wanted}. Use --seq-len {longest}.")
    return wanted
