"""The public names: `__all__`, the map of their homes, and what type checkers see are one and the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autoprec


def names_for_type_checkers() -> dict[str, str]:
    """Return the home of each name that `__init__` imports under TYPE_CHECKING."""
    homes: dict[str, str] = {}
    for node in ast.parse(Path(autoprec.__file__).read_text()).body:
        if isinstance(node, ast.If):
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                homes |= {alias.name: line.module or "" for alias in line.names}
    return homes


def test_all_is_sorted_and_matches_the_lazy_map() -> None:
    assert autoprec.__all__ == sorted(set(autoprec.__all__))
    assert set(autoprec.__all__) == set(autoprec._HOMES)


def test_type_checkers_see_the_same_homes() -> None:
    assert names_for_type_checkers() == autoprec._HOMES


@pytest.mark.parametrize("name", autoprec.__all__)
def test_each_public_name_is_what_its_home_says(name: str) -> None:
    value = getattr(autoprec, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__, f"autoprec.{name} has no docstring"


def test_dir_lists_the_public_names() -> None:
    assert set(autoprec.__all__) <= set(dir(autoprec))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        autoprec.aply  # noqa: B018


def test_each_module_of_the_ground_floors_exports_what_it_has() -> None:
    from autoprec import errors, files, formats, plan, quantities, records

    for module in (errors, formats, files, quantities, records, plan):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.__all__ names {name}, which is not there"
