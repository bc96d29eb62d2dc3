"""Jinja2's home: pages filled from templates, in which every value is escaped unless it is one of our own files."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["asset", "fill"]


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("autoprec.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False}  # NaN is no JSON, and would stop the page's script
    return made


def fill(template: str, **values: Any) -> str:
    """Return a page: `template` with its values, escaped."""
    return _environment().get_template(template).render(**values)


def asset(name: str) -> Markup:
    """Return one of the pages' own files, to stand in a page as it is."""
    return Markup((files("autoprec.report") / "page" / name).read_text(encoding="utf-8"))  # noqa: S704 our own file
