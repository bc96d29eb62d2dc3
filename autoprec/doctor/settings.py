"""Settings of a training run as people keep them: training arguments, DeepSpeed and accelerate files, YAML of trainers,
a launch script, a Python script. All become names with values and places; what is unknown is kept and harms nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoprec.doctor.reading import UserText, read_text
from autoprec.doctor.scripts import Script, notebook_source, read_script
from autoprec.errors import DataError
from autoprec.files import DEEPEST

__all__ = ["Setting", "Settings", "read_settings_file", "settings_from"]

#: calls whose keywords are settings of the run
_ARGUMENT_CALLS = re.compile(
    r"Arguments$|^(?:SFT|DPO|GRPO|PPO|RLOO|KTO|ORPO|CPO|GKD|Reward|OnlineDPO|BCO|XPO|PRM|NashMD)Config$"
    r"|^(?:Trainer|Accelerator|Fabric|DataLoader|TrainingArgs)$"
)
#: settings of libraries that stand under a heading of their own in other files
_MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Setting:
    """A name of dotted parts in lower case, its value, and where it stands."""

    name: str
    value: Any
    place: str

    @property
    def on(self) -> bool:
        """Whether it switches something on; 'auto' does not say."""
        if isinstance(self.value, str):
            return self.value.strip().lower() in ("true", "1", "yes", "on")
        return self.value is True or self.value == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one file, and its calls where it is a script."""

    path: str
    values: tuple[Setting, ...]
    script: Script | None = None

    def get(self, *names: str) -> Iterator[Setting]:
        """Yield the settings of a name, or whose name ends in one after a dot."""
        for setting in self.values:
            if any(setting.name == name or setting.name.endswith(f".{name}") for name in names):
                yield setting


def read_settings_file(path: str) -> tuple[Settings, tuple[str, ...]]:
    """Read a file of settings; and what was left out of a huge one.

    Raises:
        DataError: it is missing, empty, binary, or damaged as what its name or content says it is.
    """
    read = read_text(path, what="--args")
    return settings_from(read), (read.cut,) if read.cut else ()


def settings_from(read: UserText) -> Settings:
    """Return the settings in a file's text, by its ending, else by what it looks like."""
    path, text = read.path, read.text
    ending = path.rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""
    if ending == "ipynb":
        return _of_script(notebook_source(text, path), path)
    if ending in ("py", "pyw"):
        return _of_script(text, path)
    if (
        ending in ("sh", "bash", "zsh", "slurm", "sbatch", "bat", "ps1")
        or text.startswith("#!")
        and "python" not in text.splitlines()[0]
    ):
        return _of_shell(text, path)
    if ending == "toml":
        return _of_table(_toml(text, path), path, text)
    if ending in ("json", "jsonc", "json5") or text.lstrip().startswith("{"):
        return _of_table(_json(text, path), path, text)
    if ending in ("yaml", "yml"):
        return _of_table(_yaml(text, path), path, text)
    if re.search(r"(?:^|\s)--[a-z]", text):
        return _of_shell(text, path)
    if re.search(r"^(?:import|from)\s+\w+", text, re.MULTILINE) or re.search(r"^\w[\w.]*\(", text, re.MULTILINE):
        return _of_script(text, path)
    return _of_table(_yaml(text, path), path, text)


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        try:  # DeepSpeed's examples have comments and trailing commas
            bare = re.sub(r"^\s*//.*$|(?<=[,{\[\s])//.*$", "", text, flags=re.MULTILINE)
            return json.loads(re.sub(r",(\s*[}\]])", r"\1", bare))
        except (ValueError, RecursionError):
            raise DataError(f"--args {path} is damaged or cut off: {fault}. Give a file that is whole.") from None


def _yaml(text: str, path: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """PyYAML takes the square of the depth of brackets, so it stops at what no settings need."""

        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level >= DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST} levels")
            super().fetch_flow_collection_start(token)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as fault:
        said = " ".join(str(fault).split())
        raise DataError(
            f"--args {path} is no YAML that can be read: {said[:200]}. Give a file that is whole."
        ) from None


def _toml(text: str, path: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise DataError(f"--args {path} is no valid TOML: {fault}. Give a file that is whole.") from None


def _of_table(data: Any, path: str, text: str) -> Settings:
    if not isinstance(data, Mapping):
        raise DataError(
            f"--args {path} holds {type(data).__name__}, not a table of settings. Give training arguments, a "
            f"DeepSpeed or "
            "accelerate configuration, a launch script or a Python script; a log goes to --log."
        )
    lines = text.splitlines()
    return Settings(path=path, values=tuple(_flat(data, path, lines)))


def _flat(data: Any, path: str, lines: list[str], name: str = "", depth: int = 0) -> Iterator[Setting]:
    if isinstance(data, Mapping) and depth < _MAX_DEPTH:
        for key, value in data.items():
            full = f"{name}.{key}" if name else str(key)
            yield from _flat(value, path, lines, full, depth + 1)
            if isinstance(value, Mapping) and value:
                yield Setting(_name(full), value, _place(path, lines, str(key)))
    else:
        yield Setting(_name(name), data, _place(path, lines, name.rpartition(".")[2]))


def _name(name: str) -> str:
    return name.lower().replace("-", "_")


def _place(path: str, lines: list[str], key: str) -> str:
    """Return where a key stands: the line of its first mention."""
    pattern = re.compile(rf"[\"']?(?<![\w-]){re.escape(key)}[\"']?\s*[:=]")
    number = next((i for i, line in enumerate(lines, 1) if pattern.search(line)), None)
    return f"{path}:{number}" if number else path


def _of_shell(text: str, path: str) -> Settings:
    """Read `--name value`, `--name=value`, `--flag` and `NAME=value` of a launch script, comments left out."""
    found: list[Setting] = []
    pending = ""
    for number, line in enumerate(text.splitlines(), 1):
        whole = pending + line
        if whole.rstrip().endswith(("\\", "^", "`")):
            pending = whole.rstrip()[:-1] + f" \0{number} "
            continue
        pending = ""
        words = _words(whole)
        found += _options(words, path, number)
    found += _options(_words(pending), path, text.count("\n") + 1)
    return Settings(path=path, values=tuple(found))


def _words(line: str) -> list[str]:
    if line.lstrip().startswith(("#", "REM ")):
        return []
    try:
        return shlex.split(line.replace("\0", ""), comments=True)
    except ValueError:  # an unbalanced quote
        return line.split()


def _options(words: list[str], path: str, number: int) -> Iterator[Setting]:
    place = f"{path}:{number}"
    for index, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            if not equals:
                after = words[index + 1] if index + 1 < len(words) else ""
                value = after if after and not after.startswith("--") and not after.endswith(".py") else "true"
            yield Setting(_name(name), _scalar(value), place)
        elif re.match(r"[A-Z][A-Z0-9_]+=", word):
            name, _, value = word.partition("=")
            yield Setting(_name(name), _scalar(value), place)


def _scalar(value: str) -> Any:
    lower = value.strip().lower()
    if lower in ("true", "false"):
        return lower == "true"
    try:
        return float(value) if re.search(r"[.eE]", value) else int(value)
    except ValueError:
        return value


def _of_script(source: str, path: str) -> Settings:
    script = read_script(source, path)
    values = []
    for call in script.calls:
        if _ARGUMENT_CALLS.search(call.last):
            values += [
                Setting(_name(k), v, f"{path}:{call.line}")
                for k, v in call.keywords.items()
                if not isinstance(v, Mapping)
            ]
            for key, value in call.keywords.items():
                if isinstance(value, Mapping):
                    values += [Setting(s.name, s.value, f"{path}:{call.line}") for s in _flat(value, path, [], key)]
    for line, table in script.tables:
        if {"fp16", "bf16", "zero_optimization", "torch_autocast", "amp"} & {str(k) for k in table}:
            values += [Setting(s.name, s.value, f"{path}:{line}") for s in _flat(table, path, [])]
    for target, value, line in script.assigned:
        name = target.rpartition(".")[2] if "environ[" not in target else target.partition("[")[2].strip("'\"]")
        values.append(Setting(_name(name), value, f"{path}:{line}"))
    return Settings(path=path, values=tuple(values), script=script)
