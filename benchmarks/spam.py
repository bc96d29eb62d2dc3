"""Mails of the SpamAssassin corpus, and a logistic head that makes the minilm encoder a spam classifier.

The row numbers follow from the order of reading, the removal of near-duplicates and the shuffle: rows 0-799 fit the
head, 800-1199 judge it, and only the first 4,000 are used at all.
"""

from __future__ import annotations

import email
import html
import json
import random
import re
from collections.abc import Mapping, Sequence
from email.message import Message
from pathlib import Path

import torch
from torch import nn

__all__ = ["SpamClassifier", "embed", "fit_head", "load_classifier", "read_mails"]

_GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
_KEPT_ROWS, _FIT_ROWS, _JUDGED_ROWS = 4000, 800, 1200
_CHARACTERS, _TOKENS, _BATCH = 800, 128, 16


class SpamClassifier(nn.Module):
    """An encoder, the mean over its tokens brought to unit length, and a linear head with one logit, that of spam."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(embed(self.encoder, input_ids, attention_mask))
        return logits


def embed(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return unit-length embeddings (texts, width): the mean of the last hidden states over attended tokens."""
    states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    keep = attention_mask[..., None].to(states.dtype)
    return nn.functional.normalize((states * keep).sum(1) / keep.sum(1), dim=-1)


def read_mails(folder: Path) -> list[dict[str, object]]:
    """Return the first 4,000 mails in a fixed order: id, label (1 is spam) and text (subject and body, no headers)."""
    rows: dict[str, dict[str, object]] = {}
    for group in _GROUPS:
        for path in sorted((folder / group).glob("*.json")):
            try:
                mail = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue  # a few files of the package are cut off
            text = _text_of(email.message_from_string(mail["text"]))
            if len(text) > 30:
                row = {"id": f"{group}/{mail['id']}", "label": int(group.startswith("spam")), "text": text[:4000]}
                rows.setdefault(text[:200], row)
    kept = list(rows.values())
    random.Random(0).shuffle(kept)
    return kept[:_KEPT_ROWS]


def _text_of(message: Message) -> str:
    """Return the subject and the first plain-text part, or the last HTML part where there is none, without tags."""
    body = ""
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            try:
                payload = part.get_payload(decode=True)
            except (ValueError, AssertionError):  # damaged encodings are common in spam
                payload = None
            body = payload.decode("latin-1") if isinstance(payload, bytes) else str(part.get_payload())
            if part.get_content_type() == "text/plain" and body.strip():
                break
    body = re.sub(r"(?is)<(script|style).*?</\1>", " ", body)
    body = html.unescape(re.sub(r"<[^>]+>", " ", body))
    return re.sub(r"\s+", " ", f"{message.get('Subject', '')}. {body}").strip()


@torch.no_grad()
def fit_head(minilm: Path, mails: Sequence[Mapping[str, object]], out: Path) -> float:
    """Fit the head on rows 0-799, write it to `out` and return its accuracy on rows 800-1199."""
    from safetensors.torch import save_file
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    encoder = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = [str(mail["text"])[:_CHARACTERS] for mail in mails[:_JUDGED_ROWS]]
    parts = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        parts.append(embed(encoder, inputs.input_ids, inputs.attention_mask))
    embeddings = torch.cat(parts).numpy()
    labels = [mail["label"] for mail in mails[:_JUDGED_ROWS]]
    fitted = LogisticRegression(C=30, max_iter=2000).fit(embeddings[:_FIT_ROWS], labels[:_FIT_ROWS])
    head = {name: torch.tensor(getattr(fitted, f"{kind}_"), dtype=torch.float32) for name, kind in _HEAD.items()}
    save_file(head, out)
    return float(fitted.score(embeddings[_FIT_ROWS:], labels[_FIT_ROWS:]))


_HEAD = {"weight": "coef", "bias": "intercept"}


def load_classifier(cache: Path) -> SpamClassifier:
    """Return the spam classifier from the parts `minilm` and `spam-head` of the cache folder."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    tensors = load_file(cache / "spam-head" / "head.safetensors")
    head = nn.Linear(tensors["weight"].shape[1], 1)
    head.load_state_dict(tensors)
    return SpamClassifier(AutoModel.from_pretrained(cache / "minilm", dtype=torch.float32), head).eval()
