"""Records that show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Shown", "set_page"]

_page: Callable[[Any], str] | None = None


def set_page(page: Callable[[Any], str]) -> None:
    """Set what turns a record into HTML: pages are above records, so the package joins the two."""
    global _page
    _page = page


class Shown:
    """A record with a page of its own; without the package around it, it shows as its text."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        return None if _page is None else _page(self)
