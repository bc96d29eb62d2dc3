"""The demo that ships with the package: a small trained GPT-2 and text it has not seen (see README.md here)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["folder", "text_path"]


def folder() -> Path:
    """Return the Hugging Face folder of the demo model, about a million parameters in FP32, with its tokenizer."""
    return Path(str(files(__name__))) / "model"


def text_path() -> Path:
    """Return the file of held-out English text, about 300 KB of UTF-8 with one paragraph a line."""
    return Path(str(files(__name__))) / "text.txt"
