"""The wheel, installed where no checkout is near, finds its search spaces, profiles and demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

#: what goes into a wheel; a copy is built, so that what old builds left in the checkout cannot help
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "autoprec", "search_spaces", "profiles")

#: run by the clean Python; prints what the installed package finds
LOOK = """
import json
from importlib.metadata import entry_points, version
from importlib.resources import files

import autoprec
from autoprec import catalog, demo, models

def below(folder):
    return sorted(x.name for x in folder.iterdir() if not x.name.startswith("__"))

print(json.dumps({
    "package": autoprec.__file__,
    "version": [version("autoprec"), autoprec.__version__],
    "script": [e.value for e in entry_points(group="console_scripts", name="autoprec")],
    "search_spaces": below(files("autoprec.search_spaces")),
    "devices": below(files("autoprec.profiles") / "devices"),
    "models": below(files("autoprec.profiles") / "models"),
    "catalogued": [list(catalog.search_space_names()), list(catalog.device_names()), list(models.model_names())],
    "demo": [below(demo.folder()), demo.text_path().stat().st_size],
}))
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """A wheel in a clean environment: `python` runs there, from the empty folder `folder`."""

    wheel: Path
    python: Path
    folder: Path

    def run(self, arguments: Sequence[str | Path]) -> str:
        # -P: the folder itself is no place to import from, though it is empty
        return call([self.python, "-P", *arguments], self.folder)


def call(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel and install it alone in an environment of its own.

    The dependencies are lent by the environment of the tests, through a .pth file: installing them again would fetch
    half a gigabyte. Python puts them behind the clean environment's own packages and reads no .pth file among them, so
    an editable autoprec there stays unseen.
    """
    room = tmp_path_factory.mktemp("wheel")
    source, home, folder = room / "source", room / "venv", room / "empty"
    source.mkdir()
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", room, source], room)
    (wheel,) = room.glob("autoprec-*.whl")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    call([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], room)
    own = call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], room).strip()
    Path(own, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(wheel, python, folder)


@pytest.fixture(scope="module")
def seen(installed: Installed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(installed.run(["-c", LOOK]))
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("__"))


def test_the_installed_package_is_the_wheels(installed: Installed, seen: dict[str, Any]) -> None:
    assert seen["package"].startswith(str(installed.python.parent.parent))
    assert len(set(seen["version"])) == 1
    assert seen["script"] == ["autoprec.cli.main:main"]


def test_search_spaces_and_profiles_are_found_from_an_empty_folder(seen: dict[str, Any]) -> None:
    assert seen["search_spaces"] == names(ROOT / "search_spaces")
    assert seen["devices"] == names(ROOT / "profiles" / "devices")
    assert seen["models"] == names(ROOT / "profiles" / "models")
    spaces, devices, models = seen["catalogued"]
    assert len(models) == sum(name.endswith(".toml") for name in seen["models"])
    assert sorted(f"{s}.toml" for s in spaces) == seen["search_spaces"]
    assert sorted(f"{d}.toml" for d in devices) == seen["devices"]
    assert "default" in spaces and "h100-sxm-80gb" in devices


def test_the_demo_is_found_from_an_empty_folder(seen: dict[str, Any]) -> None:
    model, text_bytes = seen["demo"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model)
    assert text_bytes == (ROOT / "autoprec" / "demo" / "text.txt").stat().st_size


def test_the_command_starts(installed: Installed) -> None:
    assert "Usage: autoprec" in call([installed.python.with_name("autoprec"), "--help"], installed.folder)
    assert "Usage: autoprec" in installed.run(["-m", "autoprec", "--help"])


def test_the_wheel_holds_the_whole_package_and_nothing_else(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    packages = {name for name in held if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in packages} == {"autoprec"}, "a top-level module would be everyone's"
    expected = {
        inside / path.relative_to(ROOT / folder)
        for folder, inside in {
            "autoprec": Path("autoprec"),
            "search_spaces": Path("autoprec/search_spaces"),
            "profiles": Path("autoprec/profiles"),
        }.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = sorted(str(p) for p in expected if str(p) not in packages)
    assert not missing, f"add their packages, or package data, to pyproject.toml: {missing}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
