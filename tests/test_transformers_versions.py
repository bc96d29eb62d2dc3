"""The Trainer's tests under the oldest supported transformers and under the newest, in environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

TESTS = Path(__file__).parent


@pytest.mark.parametrize("wanted", ["transformers==5.0.0", "transformers"])
def test_plans_train_under(wanted: str, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = tmp_path / "lib" / version / "site-packages"
    # everything else, torch above all, is this environment's
    (own / "zz_shared.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", wanted], check=True)
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    found = subprocess.run([python, "-c", "import transformers; print(transformers.__file__)"], capture_output=True)
    assert str(own) in found.stdout.decode() or wanted == "transformers"
    # another version has deprecations of its own, which are no error here
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        str(TESTS / "test_trainer.py"),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
