"""What every test starts from: seeds, few threads, no network."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="autoprec-tests-")  # what tests find out is not the user's
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"])
# a search elsewhere on this machine, or one that was stopped, shall not have tests wait for its turn
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"])
# of tests side by side, two threads would wait for the others'; commands they start read the variable
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# a model's first forward takes longer than Hypothesis allows an example by default
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


#: as it was made here: what the variable says in the end may be somebody's own
_ROOM = os.environ["XDG_CACHE_HOME"]


def pytest_unconfigure() -> None:
    shutil.rmtree(_ROOM, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give each test the same random numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let searches measure shortly, on a device whose profile is the same everywhere."""
    from searching import sample_device, short

    from autoprec.measurement import evaluate
    from autoprec.study import measuring

    monkeypatch.setattr("autoprec.study.run.probe_device", sample_device)
    monkeypatch.setattr(measuring, "evaluate", lambda request: evaluate(short(request)))
    monkeypatch.setattr("autoprec.study.patience.SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other where another process has a core
    yield
    torch.set_num_threads(threads)
