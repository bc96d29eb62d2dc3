"""What tests of searches share: a small model to search, short measurements, and what a run folder holds."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import tiny_models
import torch
from torch import nn

from autoprec import Workload
from autoprec.files import from_json, read_json
from autoprec.measurement import Request, evaluate
from autoprec.records import (
    DeviceProfile,
    Measurement,
    SearchResult,
)
from autoprec.runtime.scope import Scope
from autoprec.study import measuring

FILES = {
    "device.json",
    "units.json",
    "sensitivity.json",
    "speed.json",
    "study.journal",
    "trials.csv",
    "result.json",
    "report.html",
    "run.lock",
}
RESULT_KEYS = {
    "schema", "reference", "baselines", "front", "chosen", "verdict", "trials", "evaluations", "seconds",
    "predicted_bound",
}  # fmt: skip
MEASUREMENT_KEYS = {
    "name", "assignment", "drop", "drop_ci95", "drop_percent", "loss_rise", "grad_error", "step_ms", "step_ms_ci95",
    "speedup", "speedup_over_uniform", "peak_bytes", "metric", "origin", "plan",
}  # fmt: skip
RUNNABLE = ["uniform fp32", "uniform bf16", "uniform fp16", "cast bf16"]

Evaluate = Callable[[Request], Measurement]


def sample_device(device: str = "auto", *, seconds: float = 8.0) -> DeviceProfile:
    return samples.device_profile()


def short(request: Request) -> Request:
    return dataclasses.replace(request, timing_seconds=0.0, min_pairs=4, stop_slower=None)


def instead(monkeypatch: pytest.MonkeyPatch, change: Callable[[Request, Evaluate], Measurement]) -> None:
    """Have `change` measure, with the real function at hand."""
    monkeypatch.setattr(measuring, "evaluate", lambda request: change(request, lambda r: evaluate(short(r))))


def workload(mode: str = "infer", *, model_seed: int = 0, data_seed: int = 0) -> Workload:
    torch.manual_seed(model_seed)
    model = tiny_models.gpt2(vocab_size=64, n_embd=32, n_layer=2)
    generator = torch.Generator().manual_seed(data_seed)
    batches = [torch.randint(2, 64, (2, 12), generator=generator) for _ in range(2)]
    return Workload(model, [{"input_ids": ids, "labels": ids} for ids in batches], mode=mode, model_id="tiny")


def names_of(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((path / "trials.csv").read_text().splitlines()))


def trials_of(path: Path) -> list[int]:
    return [int(row["trial"]) for row in table(path) if row["trial"]]


def saved(path: Path) -> SearchResult:
    return from_json(SearchResult, read_json(path / "result.json", what="result"), what="result")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a search must give back: bits, classes, train flags, gradients, hooks."""
    return {
        "bits": {k: v.clone() for k, v in model.state_dict(keep_vars=True).items()},
        "pointers": [p.data_ptr() for p in model.parameters()],
        "classes": [type(m) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
    }


def assert_as_found(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, value in before.pop("bits").items():
        assert torch.equal(value, after["bits"][name]) and value.dtype == after["bits"][name].dtype, name
    del after["bits"]
    assert after == before
    assert not any(isinstance(m, Scope) for m in model.modules())
    assert not torch.is_autocast_enabled("cpu")
