"""Text to batches: what is read, what is refused, and where in the text the windows lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SPECIAL, tokenizer

from autoprec.errors import DataError
from autoprec.probe.text import Examples, label_ids, make_batches, read_examples
from autoprec.records import Task

EOS, MASK, CLS, SEP = (SPECIAL.index(name) for name in ("<eos>", "<mask>", "<cls>", "<sep>"))


def examples(*texts: str, labels: tuple[int | float | str, ...] | None = None) -> Examples:
    """Return examples as if read from a file."""
    return Examples(texts, labels, "data.txt", False)


def batches(given: Examples, task: Task, *, tokens: Any = None, **changes: Any) -> list[dict[str, torch.Tensor]]:
    """Make two batches of two sequences of eight tokens, unless told otherwise."""
    settings = {"batch_size": 2, "seq_len": 8, "batches": 2, "seed": 0, **changes}
    return make_batches(given, tokens or tokenizer(), task=task, **settings)


def text_of(ids: torch.Tensor) -> str:
    """Return the text of a row of token ids."""
    decoded: str = tokenizer().decode(ids.tolist())
    return decoded


def test_reads_paragraphs_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\nthrée".encode())
    assert read_examples(path) == Examples(("one\ntwo", "thrée"), None, str(path), False)
    path.write_text("one\ntwo\n")
    assert read_examples(path) == Examples(("one", "two"), None, str(path), False, "\n")


def test_reads_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028", "label": 1}\n\n{"text": "two", "label": "spam", "id": 7}\n')
    assert read_examples(path) == Examples(("one\u2028", "two"), (1, "spam"), str(path), False)


def test_the_shipped_text_is_said_to_be_shipped() -> None:
    found = read_examples(None)
    assert found.shipped and "ships" in found.source
    assert sum(map(len, found.texts)) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ab\0cd", "binary (a zero byte at 2)"),
        ("a.txt", b"ab\xff\xfe", "not UTF-8 text (byte 2)"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8 text (byte 0)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 has no text"),
        ("a.jsonl", b'{"content": "a"}\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": " "}\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "a", "label": [1]}\n', "line 1: the label is a list"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2 has no label, unlike"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "label": 1}\n', "line 2 has a label, unlike"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_examples(path)
    assert str(path) in str(caught.value)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist.*--data"):
        read_examples(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path)


def test_causal_windows_are_consecutive_tokens_spread_over_the_text() -> None:
    text = "".join(chr(ord("A") + index // 8 % 26) for index in range(8 * 20))  # 20 windows: AAAAAAAA, BBBBBBBB, ...
    made = batches(examples(text), Task.CAUSAL_LM)
    # 4 of 20 windows: every fifth, and each batch has its share of the beginning and of the end
    assert [[text_of(row) for row in batch["input_ids"]] for batch in made] == [
        ["A" * 8, "K" * 8],
        ["F" * 8, "P" * 8],
    ]
    for batch in made:
        assert set(batch) == {"input_ids", "labels"}
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_windows_of_a_long_text_are_sampled_from_all_of_it() -> None:
    words = [f"{index:06d}" for index in range(2000)]  # 14,000 characters, far above the 4 * 8 * 16 that suffice
    made = batches(examples(" ".join(words)), Task.CAUSAL_LM)
    starts = sorted(int(text_of(row)[1:7]) for batch in made for row in batch["input_ids"])
    # a window every quarter of the text, from the next space on
    assert starts == [1, 500, 1000, 1500]
    assert all(batch["input_ids"].shape == (2, 8) for batch in made)


def test_a_text_without_spaces_is_windowed_all_the_same() -> None:
    made = batches(examples("abcdefgh" * 1000), Task.CAUSAL_LM)
    assert [text_of(row) for batch in made for row in batch["input_ids"]] == ["abcdefgh"] * 4


def test_a_tokenizer_that_begins_with_a_token_keeps_it_in_every_causal_window() -> None:
    made = batches(examples("abcdefgh" * 20), Task.CAUSAL_LM, tokens=tokenizer(framed=True))
    for batch in made:
        assert batch["input_ids"].shape == (2, 8)
        assert bool((batch["input_ids"][:, 0] == CLS).all())
        assert not bool((batch["input_ids"] == SEP).any())


def test_too_little_text_says_how_much_there_is_and_is_needed() -> None:
    with pytest.raises(DataError, match="data.txt has 31 tokens; 4 sequences of 8 need 32"):
        batches(examples("x" * 31), Task.CAUSAL_LM)
    assert len(batches(examples("x" * 32), Task.CAUSAL_LM)) == 2
    with pytest.raises(DataError, match="data.txt has 3 examples; 4 are needed"):
        batches(examples("a", "b", "c"), Task.CLASSIFICATION)


def test_masked_windows_are_framed_and_fifteen_percent_masked() -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(42 * 8))
    made = batches(examples(text), Task.MASKED_LM, tokens=tokenizer(framed=True), seq_len=42)
    original = batches(examples(text), Task.CAUSAL_LM, seq_len=40)
    for batch, plain in zip(made, original, strict=True):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape == (2, 42)
        assert bool((ids[:, 0] == CLS).all()) and bool((ids[:, -1] == SEP).all())
        masked = ids == MASK
        assert masked.sum(dim=1).tolist() == [6, 6]  # 15 % of the 40 tokens of text
        assert torch.equal(masked, labels != -100)
        restored = torch.where(masked, labels, ids)[:, 1:-1]
        assert torch.equal(restored, plain["input_ids"])
    again = batches(examples(text), Task.MASKED_LM, tokens=tokenizer(framed=True), seq_len=42)
    other = batches(examples(text), Task.MASKED_LM, tokens=tokenizer(framed=True), seq_len=42, seed=1)
    assert torch.equal(again[0]["labels"], made[0]["labels"])
    assert not torch.equal(other[0]["labels"], made[0]["labels"])


def test_masking_needs_a_mask_token() -> None:
    plain = tokenizer()
    plain.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        batches(examples("x" * 64), Task.MASKED_LM, tokens=plain)


def test_sequence_to_sequence_continues_the_window() -> None:
    made = batches(examples("abcdefghABCDEFGH" * 4), Task.SEQ2SEQ)
    for batch in made:
        assert [text_of(row) for row in batch["input_ids"]] == ["abcdefgh"] * 2
        assert [text_of(row) for row in batch["labels"]] == ["ABCDEFGH"] * 2


@pytest.mark.parametrize(("pad", "filler"), [(True, 0), (False, EOS)], ids=["pad-token", "no-pad-token"])
def test_classification_pads_truncates_and_labels(pad: bool, filler: int) -> None:
    given = examples("abc", "abcdefghijk", "ab", "a", labels=(0, 1, 2, 1))
    first, second = batches(given, Task.CLASSIFICATION, tokens=tokenizer(pad=pad))
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert int(first["input_ids"][1, 2]) == filler
    assert [text_of(first["input_ids"][0]), first["labels"].tolist()] == ["abc", [0, 2]]
    assert [text_of(second["input_ids"][0]), second["labels"].tolist()] == ["abcdefgh", [1, 1]]


def test_encoder_has_no_labels() -> None:
    made = batches(examples("a", "b", "c", "d", labels=(0, 1, 0, 1)), Task.ENCODER, tokens=tokenizer(framed=True))
    assert [set(batch) for batch in made] == [{"input_ids", "attention_mask"}] * 2
    assert made[0]["input_ids"][0].tolist()[::2] == [CLS, SEP]


def test_images_are_no_text() -> None:
    with pytest.raises(DataError, match="image model"):
        batches(examples("x" * 64), Task.IMAGE)


def test_labels_become_class_numbers() -> None:
    names = {"ham": 0, "spam": 1}
    found = label_ids(examples("a", "b", labels=("spam", 0)), classes=2, names=names)
    assert found.labels == (1, 0)
    assert label_ids(examples("a", labels=(3.5,)), classes=1, names={}).labels == (3.5,)
    for bad in ("eggs", 2, -1, 0.5):
        with pytest.raises(DataError, match=r"label .* of example 1 .*2 \(ham, spam\).*from 0 to 1"):
            label_ids(examples("a", labels=(bad,)), classes=2, names=names)


def test_batches_of_jsonl_from_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab" * (n + 1), "label": n % 2}) for n in range(9)))
    made = batches(read_examples(path), Task.CLASSIFICATION, batch_size=3, batches=3)
    assert [batch["labels"].tolist() for batch in made] == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert len({tuple(row.tolist()) for batch in made for row in batch["input_ids"]}) > 3
