"""Functions of the user's own files, named `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoprec.errors import AutoprecError, ModelError, closest

__all__ = ["is_function", "load_function"]

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def is_function(text: str) -> bool:
    """Say whether a text has the form file.py:function."""
    return _SPEC.fullmatch(text) is not None


def load_function(text: str, *, what: str = "MODEL", error: type[AutoprecError] = ModelError) -> Callable[..., Any]:
    """Run the file and return its function; errors raised inside it later become `error`, with file and line.

    The file's folder is searched for imports while it is read and while the function runs.

    Raises:
        `error`: no such file or function, or the file cannot be run.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise error(f"{what} '{text}' is not of the form file.py:function.")
    path, name = Path(match["file"]).expanduser().resolve(), match["name"]
    if not path.is_file():
        raise error(f"{what} {text}: there is no file {path}.")
    module_name = f"autoprec_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise error(f"{what} {text}: {path} cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # classes of the file can then be pickled
    _guarded(spec.loader.exec_module, path, f"{what} {text}: running {path.name}", error)(module)
    function = vars(module).get(name)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{what} {text}: {path.name} has no function '{name}'{closest(name, functions)}.")
    return _guarded(function, path, f"{what} {text}", error)


def _guarded(function: Callable[..., Any], path: Path, what: str, error: type[AutoprecError]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        sys.path.insert(0, str(path.parent))
        try:
            return function(*args, **named)
        except AutoprecError:
            raise
        except Exception as fault:
            frames = traceback.extract_tb(fault.__traceback__)
            own = [frame for frame in frames if frame.filename == str(path)]
            line = getattr(fault, "lineno", None) if isinstance(fault, SyntaxError) else own and own[-1].lineno
            place = f" at {path.name} line {line}" if line else ""
            raise error(f"{what} raised {type(fault).__name__}{place}: {fault}") from fault
        finally:
            if str(path.parent) in sys.path:
                sys.path.remove(str(path.parent))

    return call
