"""The script for owners of a card, as far as it runs without one."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autoprec.runtime.target import WIDENED

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"
OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = runpy.run_path(str(SCRIPT))["_ONE"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    code: int = runpy.run_path(str(SCRIPT))["main"]()
    return code


@pytest.mark.slow
def test_the_check_of_a_card_measures_and_writes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "card.json"
    assert run(monkeypatch, "--device", "cpu", "--quick", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["schema"] == "autoprec/card@1" and found["device"]["kind"] == "cpu"
    names = {row["what"].removeprefix("autocast ") for row in found["numerics"]}
    assert {"softmax", "layer_norm", "gelu"} <= names and len(names & WIDENED) > 25
    assert {row["format"] for row in found["matmuls"]} >= {"fp32"} and all(row["ms"] > 0 for row in found["matmuls"])
    assert {row["mode"] for row in found["steps"]} == {"train", "infer"}
    assert "no time can be predicted" in found["summary"]["steps, predicted from probed"]
    assert out.stat().st_size < 100_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 1
    assert "torch sees no CUDA device here" in capsys.readouterr().out


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_widened_is_what_this_torchs_cuda_widens(name: str) -> None:
    """Tensors without data tell what autocast does on a card that is not here; its list differs by version."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            there = OPERATIONS[name](torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")).dtype
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
    assert there is (torch.float32 if name in WIDENED else torch.bfloat16)
