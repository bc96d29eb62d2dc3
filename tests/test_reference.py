"""The reference pages say what there is: every command, every public name with its arguments."""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autoprec
from autoprec import predict

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))
API = (ROOT / "docs" / "api.md").read_text()
FUNCTIONS = [
    pytest.param(value, id=name)
    for package in (autoprec, predict)
    for name in package.__all__
    if inspect.isfunction(value := getattr(package, name))
]


def test_the_page_of_commands_is_what_help_prints() -> None:
    assert SCRIPT["PAGE"].read_text() == SCRIPT["page"](), "run `python scripts/cli_reference.py`"


@pytest.mark.parametrize("name", [*autoprec.__all__, *predict.__all__])
def test_public_names_have_a_place_in_the_reference(name: str) -> None:
    assert re.search(rf"^::: [\w.]+\.{name}$", API, re.MULTILINE)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions_tell_their_arguments_and_errors(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    untold = [name for name in inspect.signature(function).parameters if not re.search(rf"\b{name}\b", text)]
    assert not untold, f"{function.__name__} does not speak of {untold}"
    assert "Raises:" in text


def test_the_chinese_readme_has_the_same_code() -> None:
    def code(name: str) -> list[str]:
        text = (ROOT / name).read_text()
        return re.findall(r"^```\w*\n(?:.*\n)*?```|(?:^ {4}.*\n)+", text, re.MULTILINE)

    assert code("README.zh-CN.md") == code("README.md")
