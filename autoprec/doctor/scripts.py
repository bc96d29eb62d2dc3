"""Training scripts read as text: the calls in them, with what their arguments plainly are. Nothing is ever executed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoprec.errors import DataError

__all__ = ["Call", "Script", "notebook_source", "read_script"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call in a script: its dotted name with imports resolved, arguments as far as they are plain, and the calls
    of the `with` around it."""

    name: str
    line: int
    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[Call, ...] = ()
    receiver: str = ""  #: source of what the method is called on
    target: str = ""  #: the name that what comes of it is given

    @property
    def last(self) -> str:
        """The name's last part: `from_pretrained` of `AutoModel.from_pretrained`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a script does, as far as its text says."""

    calls: tuple[Call, ...]
    imports: frozenset[str]
    #: dictionaries written out, with their line: DeepSpeed settings are often given so
    tables: tuple[tuple[int, Mapping[str, Any]], ...]
    #: `a.b = value` with a plain value
    assigned: tuple[tuple[str, Any, int], ...]

    def named(self, *names: str) -> Iterator[Call]:
        """Yield the calls whose last name is one of `names`."""
        return (call for call in self.calls if call.last in names)


def read_script(source: str, path: str) -> Script:
    """Read a script's text.

    Raises:
        DataError: it is no Python that this interpreter can parse, with the line.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
        line = getattr(fault, "lineno", None)
        raise DataError(
            f"--args {path} is no Python that can be read{f' (line {line})' if line else ''}: {fault}. "
            "Give the script as it runs, or its settings as JSON or YAML."
        ) from None
    reader = _Reader()
    reader.constants = _constants(tree)
    reader.visit(tree)
    return Script(
        calls=tuple(reader.calls),
        imports=frozenset(reader.imports),
        tables=tuple(reader.tables),
        assigned=tuple(reader.assigned),
    )


def notebook_source(text: str, path: str) -> str:
    """Return the code of a notebook's cells as one script; shell lines and magics become comments.

    Raises:
        DataError: it is no notebook.
    """
    try:
        cells = [c for c in json.loads(text)["cells"] if c.get("cell_type") == "code"]
        lines = [line for c in cells for line in ("".join(c["source"]) + "\n").splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"--args {path} is no notebook that can be read. Save it again, or export it as a script."
        ) from None
    return "\n".join(f"# {line}" if line.lstrip().startswith(("!", "%")) else line for line in lines)


def _constants(tree: ast.AST) -> dict[str, ast.expr]:
    """Return names that are assigned once, with what they are assigned."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        for target in targets:
            if isinstance(target, ast.Name):
                found[target.id] = None if target.id in found else value
    return {name: value for name, value in found.items() if value is not None}


class _Reader(ast.NodeVisitor):
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.imports: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.tables: list[tuple[int, Mapping[str, Any]]] = []
        self.assigned: list[tuple[str, Any, int]] = []
        self.constants: dict[str, ast.expr] = {}
        self._with: list[Call] = []
        self._target = ""

    def visit_Import(self, node: ast.Import) -> None:
        self.imports |= {alias.name for alias in node.names}
        self.aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self.imports |= {f"{node.module}.{alias.name}" for alias in node.names}
            self.aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        around = []
        for item in node.items:
            self.visit(item.context_expr)
            if isinstance(item.context_expr, ast.Call):
                around.append(self._call(item.context_expr))
        self._with += around
        for child in node.body:
            self.visit(child)
        del self._with[len(self._with) - len(around) :]

    visit_AsyncWith = visit_With

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self._with = self._with, []  # a function defined in a `with` runs outside it
        decorators = [self._call(d) for d in node.decorator_list if isinstance(d, ast.Call)]
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._with = [d for d in decorators if d.last == "autocast"]
        for child in (node.args, *node.body):
            self.visit(child)
        self._with = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> None:
        self.calls.append(self._call(node))
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        value = self._plain(node)
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            self.tables.append((node.lineno, value))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            value = self._plain(node.value)
            if isinstance(target, ast.Attribute) and value is not _UNKNOWN:
                self.assigned.append((ast.unparse(target), value, node.lineno))
            if isinstance(target, ast.Subscript) and value is not _UNKNOWN:  # os.environ["…"] = "…"
                self.assigned.append((ast.unparse(target), value, node.lineno))
        self._target = ast.unparse(node.targets[0]) if isinstance(node.value, ast.Call) else ""
        self.generic_visit(node)
        self._target = ""

    def _call(self, node: ast.Call) -> Call:
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self._plain(keyword.value)
            if keyword.arg is not None:
                keywords[keyword.arg] = None if value is _UNKNOWN else value
            elif isinstance(value, dict):  # **{…}
                keywords |= {k: v for k, v in value.items() if isinstance(k, str)}
        values = tuple(None if (v := self._plain(a)) is _UNKNOWN else v for a in node.args)
        receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        return Call(
            name=self._full(node.func),
            line=node.lineno,
            args=values,
            keywords=keywords,
            inside=tuple(self._with),
            receiver=receiver,
            target=self._target,
        )

    def _full(self, node: ast.expr) -> str:
        """Return a dotted name with what its first part was imported from."""
        first, dot, rest = _dotted(node).partition(".")
        return f"{self.aliases.get(first, first)}{dot}{rest}"

    def _plain(self, node: ast.expr, depth: int = 0) -> Any:
        """Return a plain value, a dtype as the text 'torch.float16', or `_UNKNOWN`."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return f"{self.aliases.get(node.value.id, node.value.id)}.{node.attr}"
        if isinstance(node, ast.Name) and self.aliases.get(node.id, "").startswith("torch."):
            return self.aliases[node.id]
        if isinstance(node, ast.Name) and depth < 4 and node.id in self.constants:
            return self._plain(self.constants[node.id], depth + 1)
        if isinstance(node, ast.List | ast.Tuple):
            return [None if (v := self._plain(e, depth)) is _UNKNOWN else v for e in node.elts]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found = {self._plain(k, depth): self._plain(v, depth) for k, v in pairs if isinstance(k, ast.Constant)}
            return {k: None if v is _UNKNOWN else v for k, v in found.items()}
        if isinstance(node, ast.Call) and _dotted(node.func) == "dict":
            call = self._call(node)
            return dict(call.keywords)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _UNKNOWN


_UNKNOWN: Any = object()


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return _dotted(node.func) if isinstance(node, ast.Call) else ""
