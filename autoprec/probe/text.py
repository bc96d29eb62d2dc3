"""Text into batches: read, tokenize, and take windows evenly from all of it.

- causal LM: windows of `seq_len` tokens (behind the tokens the tokenizer puts in front), labels = input_ids;
- masked LM: the same between the tokenizer's first and last tokens, 15 % of the positions replaced by the mask
  token. The 80/10/10 split of BERT's training is left out: a drop compares two computations of the same model,
  so every labelled position had better be a real prediction;
- sequence to sequence: a window is read by the encoder, the window that follows is the target;
- classification and encoders: one example a row, cut at `seq_len` and padded, with its mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from autoprec.errors import DataError
from autoprec.probe.batches import IGNORED
from autoprec.probe.quiet import quiet
from autoprec.records import Task

__all__ = ["Examples", "Label", "label_ids", "make_batches", "pad_token_id", "read_examples"]

Label: TypeAlias = int | float | str

_MASKED_SHARE = 0.15
#: text longer than this many times the need is sampled before it is tokenized; 16 characters a token are ample
_CHARACTERS_A_TOKEN = 16
#: read whole; a search looks at some thousands of tokens of it
_LARGEST_BYTES = 1 << 30
_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts with their labels, if all have one. `shipped` says that it is the demo's text."""

    texts: tuple[str, ...]
    labels: tuple[Label, ...] | None
    source: str
    shipped: bool
    #: what stood between the texts
    separator: str = "\n\n"


def read_examples(path: Path | None) -> Examples:
    """Read UTF-8 text (a paragraph an example), or JSONL with `text` and optionally `label`; None is the demo's text.

    Raises:
        DataError: missing, empty or binary data; a bad line of JSONL, with its number.
    """
    if path is None:
        from autoprec.demo import text_path

        found = read_examples(Path(text_path()))
        return replace(found, source="the text that ships with autoprec", shipped=True)
    content = _read_text(path)
    if path.suffix.lower() in _SUFFIXES:
        return _parse_lines(path, content)
    separator = "\n\n" if "\n\n" in content.strip() else "\n"
    texts = tuple(stripped for paragraph in content.split(separator) if (stripped := paragraph.strip()))
    return Examples(texts, None, str(path), False, separator)


def _read_text(path: Path) -> str:
    advice = "Give --data a UTF-8 text file, or JSONL with a field `text`."
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"the data file {path} does not exist. {advice}") from None
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read: {error.strerror or error}. {advice}") from None
    if len(raw) > _LARGEST_BYTES:
        raise DataError(
            f"the data file {path} is larger than {_LARGEST_BYTES >> 20} MiB. Give a part of it: a few MB do."
        )
    try:
        content = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the data file {path} is not UTF-8 text (byte {error.start}). {advice}") from None
    if "\0" in content:
        raise DataError(f"the data file {path} is binary (a zero byte at {raw.index(0)}). {advice}")
    if not content.strip():
        raise DataError(f"the data file {path} is empty. {advice}")
    return content


def _parse_lines(path: Path, content: str) -> Examples:
    texts: list[str] = []
    labels: list[Label] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place} is not JSON ({error.msg}). JSONL has one object a line.") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits; brackets without end
            raise DataError(f"{place} cannot be read as JSON ({error}).") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{place} has no text. Each line is an object like {{"text": "…", "label": 0}}.')
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(f"{place} has half a character, an escape from \\ud800 to \\udfff alone. Give it whole.")
        label = row.get("label")
        if label is not None and not isinstance(label, int | float | str):
            raise DataError(f"{place}: the label is a {type(label).__name__}; it must be a number or a class's name.")
        if texts and (label is None) != (not labels):
            raise DataError(f"{place} has {'no' if label is None else 'a'} label, unlike the lines before it.")
        texts.append(text)
        if label is not None:
            labels.append(label)
    return Examples(tuple(texts), tuple(labels) or None, str(path), False)


def label_ids(examples: Examples, *, classes: int, names: Mapping[str, int]) -> Examples:
    """Return the examples with their labels as class numbers below `classes`; `names` is the model's label2id.

    With one class the labels stay numbers.

    Raises:
        DataError: a label that is no class of the model.
    """
    if examples.labels is None:
        return examples
    found: list[Label] = []
    for index, label in enumerate(examples.labels, start=1):
        value = names.get(label, label) if isinstance(label, str) else label
        fits = isinstance(value, int) and 0 <= value < classes or (classes == 1 and not isinstance(value, str))
        if not fits:
            known = ", ".join(list(names)[:8])
            raise DataError(
                f"label {label!r} of example {index} in {examples.source} is no class of the model: "
                f"it has {classes} ({known}). Use those names, or numbers from 0 to {classes - 1}."
            )
        found.append(value if classes == 1 else int(value))
    return replace(examples, labels=tuple(found))


def make_batches(
    examples: Examples,
    tokenizer: Any,
    *,
    task: Task,
    batch_size: int,
    seq_len: int,
    batches: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Return `batches` distinct batches, each spread over the whole text; `seed` decides what is masked.

    Shapes: [batch_size, seq_len] for language models, [batch_size, longest of the batch] for classification and
    encoders (with `attention_mask`); labels [batch_size] for classification, absent for encoders.

    Raises:
        DataError: too little text, a task that takes no text, or a tokenizer without what the task needs.
    """
    wanted = batch_size * batches
    if task is Task.IMAGE:
        raise DataError("text cannot feed an image model. Give file.py:function returning a Workload with images.")
    if task in (Task.CLASSIFICATION, Task.ENCODER):
        rows = _pick(examples, wanted)
        return [_padded(examples, rows[index::batches], tokenizer, task, seq_len) for index in range(batches)]
    head, tail = _frame(tokenizer)
    if task is Task.CAUSAL_LM:
        tail = []
    inside = seq_len - len(head) - len(tail)
    if inside < 2:
        raise DataError(f"a sequence of {seq_len} tokens has no room for text. Choose a larger --seq-len.")
    length = 2 * inside if task is Task.SEQ2SEQ else inside
    windows = torch.tensor(_windows(examples, tokenizer, wanted, length))
    generator = torch.Generator().manual_seed(seed)
    return [
        _language_batch(windows[index::batches], task, head, tail, tokenizer, generator) for index in range(batches)
    ]


def _language_batch(
    windows: Tensor, task: Task, head: list[int], tail: list[int], tokenizer: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    if task is Task.SEQ2SEQ:
        source, target = windows.chunk(2, dim=1)
        return {"input_ids": _framed(source, head, tail), "labels": target.contiguous()}
    ids = _framed(windows, head, tail)
    if task is Task.CAUSAL_LM:
        return {"input_ids": ids, "labels": ids.clone()}
    if tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token, so masked language modelling cannot be measured with it.")
    count = max(1, round(_MASKED_SHARE * windows.shape[1]))
    order = torch.rand(windows.shape, generator=generator).argsort(dim=1)
    places = order[:, :count] + len(head)
    labels = torch.full_like(ids, IGNORED).scatter(1, places, ids.gather(1, places))
    return {"input_ids": ids.scatter(1, places, int(tokenizer.mask_token_id)), "labels": labels}


def _framed(windows: Tensor, head: list[int], tail: list[int]) -> Tensor:
    around = [torch.tensor(part, dtype=torch.long).expand(windows.shape[0], len(part)) for part in (head, tail)]
    return torch.cat([around[0], windows, around[1]], dim=1)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    bare, full = _encode(tokenizer, "a", special=False), _encode(tokenizer, "a", special=True)
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    with quiet():  # a whole text is longer than the model's maximum, and that is as meant
        return [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]]


def _windows(examples: Examples, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Return `count` windows of `length` tokens, evenly spread over the text."""
    text = examples.separator.join(examples.texts)
    excerpt = length * _CHARACTERS_A_TOKEN
    if len(text) > 2 * count * excerpt:
        starts = [text.find(" ", index * len(text) // count) for index in range(count)]
        found = [_encode(tokenizer, text[start : start + excerpt], special=False)[:length] for start in starts]
        if all(len(window) == length for window in found):
            return found
    tokens = _encode(tokenizer, text, special=False)
    available = len(tokens) // length
    if available < count:
        raise DataError(
            f"{examples.source} has {len(tokens)} tokens; {count} sequences of {length} need {count * length}. "
            "Give more text (--data), or lower --batches, --batch-size or --seq-len."
        )
    picked = [index * available // count for index in range(count)]
    return [tokens[index * length : (index + 1) * length] for index in picked]


def _pick(examples: Examples, count: int) -> list[int]:
    available = len(examples.texts)
    if available < count:
        raise DataError(
            f"{examples.source} has {available} examples; {count} are needed (batches x batch size). "
            "Give more (--data), or lower --batches or --batch-size."
        )
    return [index * available // count for index in range(count)]


def _padded(examples: Examples, rows: list[int], tokenizer: Any, task: Task, seq_len: int) -> dict[str, Tensor]:
    encoded = [
        [int(token) for token in tokenizer(examples.texts[row], truncation=True, max_length=seq_len)["input_ids"]]
        for row in rows
    ]
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            raise DataError(f"example {row + 1} of {examples.source} has no tokens for this model. Remove it.")
    longest = max(len(ids) for ids in encoded)
    pad = pad_token_id(tokenizer)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded]),
    }
    if task is Task.CLASSIFICATION and examples.labels is not None:
        batch["labels"] = torch.tensor([examples.labels[row] for row in rows])
    return batch


def pad_token_id(tokenizer: Any) -> int:
    """Return the token to pad with: the tokenizer's own, else its end of text, else 0 (masked out in any case)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
