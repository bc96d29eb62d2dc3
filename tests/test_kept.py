"""Measured profiles: kept whole, found before the datasheet, and refused where a figure cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprec.catalog import device_names, find_device, find_entry
from autoprec.errors import DeviceError
from autoprec.formats import Format
from autoprec.kept import BOOST, keep_profile, kept_names, profile_folder
from autoprec.probe import host
from autoprec.probe.known import KINDS, certainly_absent, named_profile
from autoprec.recommender.features import rate_tflops
from autoprec.recommender.recommender import recommend
from autoprec.records import DeviceProfile, Estimate, GemmRate, Origin

RATES = {Format.FP32: 50.0, Format.BF16: 700.0, Format.FP16: 690.0, Format.FP8: 1300.0}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def rate(choice: Format, tflops: float, size: int = 8192) -> GemmRate:
    return GemmRate(format=choice, size=size, tflops=tflops, tflops_low=0.99 * tflops, tflops_high=1.01 * tflops)


def measured(name: str = "h100-sxm-80gb", **changes: Any) -> DeviceProfile:
    """Return the catalogue's profile as if it had been measured."""
    figures: dict[str, Any] = {
        "gemm_rates": tuple(rate(choice, tflops) for choice, tflops in RATES.items()),
        "copy_gb_per_s": Estimate(2900.0, 2850.0, 2950.0, Origin.MEASURED),
        "versions": {"torch": torch.__version__, "driver": "550.54.15"},
    }
    return dataclasses.replace(find_entry(name).profile, origin=Origin.MEASURED, **(figures | changes))


def test_a_kept_profile_beats_the_datasheet() -> None:
    before = find_device("h100-sxm")
    assert before.origin is Origin.DATASHEET and kept_names() == ()
    path = keep_profile(measured())
    assert path.parent == profile_folder() and "550.54.15" in path.name and kept_names() == ("h100-sxm-80gb",)
    after = find_device("h100-sxm")
    assert after.origin is Origin.MEASURED and after.peak_tflops == before.peak_tflops
    found = rate_tflops(after, "bf16")
    assert found is not None and (found.value, found.origin) == (700.0, Origin.MEASURED)
    assert str(path) in after.notes[-1] and "may differ" not in after.notes[-1]
    # the catalogue itself, and other devices, stay as they are
    assert find_entry("h100-sxm").profile == before
    assert find_device("h200-sxm-141gb").origin is Origin.DATASHEET


def test_recommend_takes_measured_rates() -> None:
    keep_profile(measured())
    advice = recommend("demo", device="h100-sxm", mode="infer")
    assert advice.plan.device.origin is Origin.MEASURED
    rates = advice.expected["rates_tflops"]
    assert rates["fp32"] == {"value": 50.0, "origin": "measured"}


def test_a_device_without_a_file_in_the_catalogue_is_found_by_its_measured_profile() -> None:
    keep_profile(measured(name="h100-sxm-80gb"))
    odd = dataclasses.replace(measured(), name="radeon-9999", peak_tflops={}, bandwidth_gb_per_s=None)
    keep_profile(odd)
    assert find_device("radeon").name == "radeon-9999" and "radeon-9999" not in device_names()
    with pytest.raises(DeviceError, match="no device 'radeon-9998'.*closest: radeon-9999"):
        find_device("radeon-9998")


def test_the_profile_of_the_torch_installed_here_is_taken_before_a_newer_file() -> None:
    here = keep_profile(measured())
    other = keep_profile(dataclasses.replace(measured(), versions={"torch": "1.0"}, memory_bytes=1))
    assert here != other
    os.utime(here, (0, 0))
    assert find_device("h100-sxm").memory_bytes != 1
    here.unlink()
    found = find_device("h100-sxm")
    assert found.memory_bytes == 1 and "may differ" in found.notes[-1]


def spoil(change: Callable[[dict[str, Any]], object]) -> Path:
    path = keep_profile(measured())
    document = json.loads(path.read_text())
    change(document["profile"])
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["gemm_rates"][1].update(tflops=0.0), "matmul rate in bf16 at 8192 .* is 0"),
        (lambda p: p["gemm_rates"][1].update(tflops=float("nan")), r"gemm_rates\.1\.tflops: nan is no finite number"),
        (lambda p: p["gemm_rates"][1].update(tflops=-3.0), "matmul rate in bf16 at 8192 .* is -3"),
        (lambda p: p["gemm_rates"][1].update(tflops=989.4 * 1.16), "is 1147.7, and the vendor's peak is 989.4"),
        (lambda p: p["gemm_rates"][1].pop("tflops"), r"gemm_rates\.1\.tflops: Field required"),
        (lambda p: p["gemm_rates"].pop(3), "lacks a figure: a matmul rate in fp8"),
        (lambda p: p["copy_gb_per_s"].update(value=float("inf")), r"copy_gb_per_s\.value: inf is no finite number"),
        (lambda p: p.update(copy_gb_per_s=None), "lacks a figure: the copy bandwidth"),
        (lambda p: p["copy_gb_per_s"].update(value=5000.0), "copy bandwidth .* is 5000, and the vendor's peak is 3350"),
        (lambda p: p.update(origin="datasheet"), "holds a datasheet profile"),
        (lambda p: p.update(name="t4"), "profile of 't4'"),
    ],
)
def test_missing_and_impossible_figures_name_file_and_figure(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = spoil(change)
    with pytest.raises(DeviceError, match=said) as caught:
        find_device("h100-sxm")
    assert str(path) in str(caught.value) and "delete the file" in str(caught.value)
    # the rest of the catalogue is as usable as before
    assert find_device("t4").name == "t4"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "autoprec/device@9"}', "\x00"])
def test_damaged_files(content: str) -> None:
    keep_profile(measured()).write_text(content)
    with pytest.raises(DeviceError, match=r"measured profile .*h100-sxm-80gb_.*\. Measure again"):
        find_device("h100-sxm")


def test_clocks_above_the_nominal_are_believed() -> None:
    keep_profile(measured())
    spoil(lambda p: p["gemm_rates"][1].update(tflops=989.4 * 0.999 * BOOST))
    found = rate_tflops(find_device("h100-sxm"), "bf16")
    assert found is not None and found.value > 989.4


def test_only_possible_measurements_are_kept(home: Path) -> None:
    with pytest.raises(DeviceError, match="from a datasheet; only measured ones"):
        keep_profile(find_device("t4"))
    with pytest.raises(DeviceError, match="impossible figure"):
        keep_profile(measured(gemm_rates=tuple(rate(choice, 1e6) for choice in RATES)))
    assert not list(home.rglob("*.json"))


def test_what_is_known_by_name() -> None:
    assert named_profile("auto") is None and named_profile("CUDA:1") is None and named_profile("cpu") is None
    known = named_profile("cpu-avx2")
    assert known is not None and certainly_absent(known)  # a class of CPUs is no CPU


@pytest.mark.parametrize(
    ("platform", "possible"),
    [("darwin", {"cpu", "mps"}), ("win32", {"cpu", "cuda", "xpu"}), ("linux", {"cpu"})],
)
def test_where_a_kind_of_device_could_be(platform: str, possible: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(host, "_NODES", {"cuda": ("no-such-node",), "xpu": ("no-such-node",)})
    assert {kind for kind in KINDS if host.may_have(kind)} == possible
