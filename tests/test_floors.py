"""The house as a test: a file imports only from lower floors, and each heavy library has one home.

Imports are read from the source, those inside functions too (a lazy import still ties two files); what stands under
`if TYPE_CHECKING` does not count, because it never runs.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import autoprec

PACKAGE = Path(autoprec.__file__).parent

#: the floor of each file or folder of the package; the package's own `__init__` is the facade and stands outside
FLOORS = {
    "errors": 0,
    "formats": 1,
    "files": 1,
    "quantities": 1,
    "records": 2,
    "plan": 3,
    "catalog": 3,
    "classes": 3,
    "facts": 3,
    "kept": 3,
    "models": 3,
    "demo": 3,
    "runtime": 4,
    "predict": 4,
    "report": 4,
    "probe": 5,
    "recommender": 5,
    "exporters": 5,
    "measurement": 6,
    "training": 6,
    "verification": 6,
    "comparison": 6,
    "doctor": 6,
    "study": 7,
    "integrations": 8,
    "cli": 9,
    "__main__": 10,
}

#: parts of one floor that may import another part of it; all other neighbours may not
NEIGHBOURS = {
    ("plan", "catalog"),
    ("catalog", "kept"),
    ("models", "catalog"),
    ("models", "facts"),
    ("classes", "catalog"),
    ("classes", "facts"),
    ("classes", "models"),
    ("recommender", "probe"),
    ("exporters", "probe"),
    ("doctor", "measurement"),
    ("verification", "measurement"),
    ("verification", "training"),
    ("comparison", "measurement"),
    ("comparison", "training"),
    ("comparison", "verification"),
    ("files", "formats"),
    ("quantities", "formats"),
}

#: where a library may be imported: the part of the package, or one file of it
HOMES = {
    "optuna": ("study",),
    "sklearn": ("recommender.tree",),
    "pandas": ("catalog", "report", "recommender.table"),
    "click": ("cli",),
    "torchao": ("runtime.fp8", "runtime.optimizers"),
    "torch_tensorrt": ("exporters.tensorrt",),
    "onnx": ("exporters.onnx_graph",),
    "plotly": ("report.html",),
    "jinja2": ("report.templates",),
    "rich": ("report", "cli"),
}


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its name without the leading `autoprec.`, with its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def part(module: str) -> str:
    return module.split(".")[0]


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def running_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports under `node` that run, at whatever depth."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from running_imports(ast.Module([other], []))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from running_imports(child)


def imported(source: str, module: str, *, is_package: bool) -> set[str]:
    """Return the full names that the source of `module` (a full name) imports."""
    names: set[str] = set()
    for node in running_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            around = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*around, base] if base else around)
        names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@cache
def graph() -> dict[str, frozenset[str]]:
    """Return which modules of the package each module imports."""
    edges = {}
    for name, path in modules().items():
        own = set()
        full = f"autoprec.{name}"
        for target in imported(path.read_text(), full, is_package=path.name == "__init__.py"):
            inside = target.removeprefix("autoprec.") if target.startswith("autoprec.") else None
            while inside and inside not in modules():  # `from module import name` names something in a module
                inside = inside.rpartition(".")[0]
            if inside and inside != name:
                own.add(inside)
        edges[name] = frozenset(own)
    return edges


def lazily() -> Iterator[tuple[str, str]]:
    """Yield modules that call `import_module`, which the reader of imports cannot follow."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("import_module", "__import__"):
                    yield name, ast.unparse(node)


def test_the_reader_sees_imports_at_any_depth_but_not_those_for_types() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from autoprec.cli import main
else:
    import pandas
def late():
    from autoprec.study import run
    class Inner:
        import optuna.trial
from . import formats
from .runtime.scope import enter_scope
"""
    assert imported(source, "autoprec.plan", is_package=False) == {
        "typing.TYPE_CHECKING",
        "pandas",
        "autoprec.study.run",
        "optuna.trial",
        "autoprec.formats",
        "autoprec.runtime.scope.enter_scope",
    }


def test_every_part_has_a_floor() -> None:
    unknown = {part(name) for name in modules()} - set(FLOORS)
    assert not unknown, f"give {sorted(unknown)} a floor in FLOORS"


def test_files_import_only_from_lower_floors() -> None:
    wrong = []
    for name, targets in graph().items():
        for target in sorted(targets):
            here, there = part(name), part(target)
            if here != there and FLOORS[there] >= FLOORS[here] and (here, there) not in NEIGHBOURS:
                wrong.append(f"{name} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_facade_or_the_command_line() -> None:
    wrong = []
    for name, path in modules().items():
        for target in imported(path.read_text(), f"autoprec.{name}", is_package=path.name == "__init__.py"):
            facade = target == "autoprec" or (target.startswith("autoprec.") and target.split(".")[1] not in FLOORS)
            # the command line stands above everything, and speaks to the library as its users do
            allowed = part(name) in ("cli", "integrations") or target == "autoprec.__version__"
            if facade and not allowed:
                wrong.append(f"{name} imports the facade: {target}")
            if target.startswith("autoprec.cli") and part(name) not in ("cli", "__main__"):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph()[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph():
        walk(name, ())


def test_imports_by_name_stay_inside_a_part() -> None:
    # an export target or a command is found by its name inside its own package: nothing crosses a floor there
    allowed = {"cli", "exporters"}
    assert {part(name) for name, _ in lazily()} <= allowed, sorted(lazily())


def test_heavy_libraries_stay_at_home() -> None:
    wrong = []
    for name, path in modules().items():
        for target in imported(path.read_text(), f"autoprec.{name}", is_package=path.name == "__init__.py"):
            homes = HOMES.get(target.split(".")[0])
            if homes is not None and not any(name == home or name.startswith(f"{home}.") for home in homes):
                wrong.append(f"{name} imports {target}, which belongs in {' or '.join(homes)}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_called_like_a_public_name() -> None:
    # `import autoprec.search` would put the module where the function was. Commands are inside autoprec.cli, so theirs
    # are attributes of that package only.
    names = {name for name in modules() if "." not in name}
    assert not names & set(autoprec.__all__)


def test_public_names_survive_the_import_of_every_module() -> None:
    for module in pkgutil.walk_packages(autoprec.__path__, "autoprec."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in autoprec.__all__:
        assert callable(getattr(autoprec, name)), f"autoprec.{name} is {getattr(autoprec, name)!r}"


HEAVY = ("torch", "transformers", "optuna", "sklearn", "pandas", "scipy", "torchao", "accelerate", "pydantic")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        pytest.param(["-c", "import autoprec"], (*HEAVY, "click", "rich", "numpy"), id="import"),
        pytest.param(["-c", "from autoprec.plan import Plan"], (*HEAVY, "click", "numpy"), id="plan"),
        pytest.param(["-m", "autoprec.cli.main", "--help"], HEAVY, id="help"),
    ],
)
def test_what_starts_fast_loads_nothing_heavy(arguments: list[str], absent: tuple[str, ...]) -> None:
    run = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in run.stderr.splitlines() if "|" in line}
    assert "autoprec" in loaded, run.stderr
    assert not loaded & set(absent)
