"""The catalogue: every shipped file, the names it answers to, and what damaged files say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoprec import catalog
from autoprec.catalog import (
    catalogue_match,
    device_names,
    find_device,
    find_entry,
    search_space_file,
    search_space_names,
)
from autoprec.errors import AutoprecError, DeviceError
from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.records import Origin, Support


@pytest.mark.parametrize("name", device_names())
def test_every_device_file(name: str) -> None:
    entry = find_entry(name)
    device = entry.profile
    assert name == name.lower() and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert device.origin is Origin.DATASHEET and set(device.formats) == set(Format)
    assert all(support.reason for support in (*device.formats.values(), device.tf32))
    # no figure without a source
    for key in device.peak_tflops:
        assert "peak_tflops" in device.sources or f"peak_tflops.{key}" in device.sources, key
    assert device.bandwidth_gb_per_s is None or "bandwidth_gb_per_s" in device.sources
    assert not entry.achieved_fraction or "achieved_fraction" in device.sources
    # a peak is given only for what the device computes in natively
    for key in device.peak_tflops:
        assert (device.tf32 if key == "tf32" else device.formats[Format(key)]).support is Support.NATIVE
    # cards clock above the boost figure that the peak is counted at, by 15 % at most
    assert all(0 < share <= 1.15 for share in entry.achieved_fraction.values())
    assert set(entry.achieved_fraction) <= set(device.peak_tflops)


@pytest.mark.parametrize("name", [n for n in device_names() if find_entry(n).vendor == "nvidia"])
def test_support_follows_capability(name: str) -> None:
    device = find_device(name)
    assert device.compute_capability is not None
    bf16 = Support.NATIVE if device.compute_capability >= (8, 0) else Support.EMULATED
    assert device.supports(Format.BF16) is bf16
    assert (device.supports(Format.FP8) is Support.NATIVE) == (device.compute_capability >= (8, 9))
    assert (device.supports(Format.FP16) is Support.NATIVE) == (device.compute_capability >= (7, 0))
    assert (device.tf32.support is Support.NATIVE) == (device.compute_capability >= (8, 0))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("h100-sxm", "h100-sxm-80gb"),
        ("a100-sxm", "a100-sxm-80gb"),
        ("H100-SXM", "h100-sxm-80gb"),
        ("a10", "a10"),  # exact beats the prefix of a100
        ("l4", "l4"),  # exact beats the prefix of l40s
        ("l40", "l40"),  # exact beats the prefix of l40s
        ("rtx-2080", "rtx-2080"),
        ("rtx-2080-t", "rtx-2080-ti"),
        ("v100-pcie", "v100-pcie-32gb"),
        ("4090", "rtx-4090"),
        ("mi300", "mi300x"),
    ],
)
def test_names(asked: str, found: str) -> None:
    assert find_device(asked).name == found


def test_ambiguous_prefix_lists_the_candidates() -> None:
    with pytest.raises(DeviceError, match="'v100-sxm2' could be any of v100-sxm2-16gb, v100-sxm2-32gb"):
        find_device("v100-sxm2")


def test_unknown_name_gives_the_closest() -> None:
    with pytest.raises(DeviceError, match="no device 'rtx-4080' here or in the catalogue; closest: rtx-4090"):
        find_device("rtx-4080")
    with pytest.raises(DeviceError, match="Choose auto, cpu"):
        find_device("")


@pytest.mark.parametrize(
    ("torch_name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-sxm-141gb"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA H800", "h800-sxm-80gb"),
        ("NVIDIA H800 PCIe", "h800-pcie-80gb"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX A4000", "rtx-a4000"),
        ("NVIDIA RTX A400", None),
        ("Tesla V100-PCIE-16GB", "v100-pcie-16gb"),
        ("Tesla V100S-PCIE-32GB", "v100s-pcie-32gb"),
        ("Tesla P4", "p4"),
        ("Tesla P40", "p40"),
        ("Tesla M40", "m40-12gb"),
        ("Tesla M40 24GB", None),
        ("NVIDIA GeForce RTX 2080", "rtx-2080"),
        ("NVIDIA GeForce RTX 2080 SUPER", None),
        ("NVIDIA GeForce RTX 3080", "rtx-3080"),
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3070 Ti", None),
        ("NVIDIA L40", "l40"),
        ("AMD Instinct MI250", "mi250"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI325X", "mi325x"),
        ("AMD Radeon RX 7900 XT", "rx-7900-xt"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_torch_names(torch_name: str, found: str | None) -> None:
    entry = catalogue_match(torch_name)
    assert (entry.profile.name if entry else None) == found


def test_fp8_families() -> None:
    assert find_device("mi300x").fp8_family is Fp8Family.FNUZ
    assert find_device("h100-sxm").fp8_family is Fp8Family.OCP
    assert find_device("h100-sxm").fp8_recipes == (Fp8Recipe.TENSORWISE, Fp8Recipe.ROWWISE)
    assert find_device("t4").fp8_family is None


def _table(**changes: Any) -> dict[str, Any]:
    support = {"support": "native", "reason": "units"}
    table: dict[str, Any] = {
        "name": "x",
        "kind": "cuda",
        "vendor": "nvidia",
        "architecture": "x",
        "verified": True,
        "formats": {f: support for f in ("fp32", "bf16", "fp16", "tf32")}
        | {"fp8": {"support": "absent", "reason": "none"}},
    }
    return table | changes


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"memory": 16}, "memory"),
        ({"peak_tflops": {"fp64": 1.0}}, "peak_tflops.fp64"),
        ({"peak_tflops": {"fp32": -1.0}}, "peak_tflops.fp32"),
        ({"peak_tflops": {"fp32": "fast"}}, "peak_tflops.fp32"),
        ({"peak_tflops": {"fp32": float("nan")}}, "peak_tflops.fp32: nan is no finite number"),
        ({"memory_gb": float("inf")}, "memory_gb: inf is no finite number"),
        ({"achieved_fraction": {"bf16": 0.5}}, "achieved_fraction.bf16: give the peak too"),
        ({"peak_tflops": {"bf16": 10.0}, "achieved_fraction": {"bf16": 1.2}}, "achieved_fraction.bf16"),
        ({"formats": {}}, "formats.bf16"),
        ({"fp8": {"family": "ocp", "recipes": ["tensorwise"]}}, "at fp8"),
        ({"fp8": {"family": "ieee", "recipes": []}}, "fp8.family"),
    ],
)
def test_damaged_device_table_names_file_and_field(changes: dict[str, Any], place: str) -> None:
    assert catalog._device_entry(_table(), "device file x.toml").profile.name == "x"
    with pytest.raises(AutoprecError, match=r"device file x\.toml is not valid at .*" + place.removeprefix("at ")):
        catalog._device_entry(_table(**changes), "device file x.toml")


def test_search_space_files(tmp_path: Path) -> None:
    for name in search_space_names():
        assert search_space_file(name)
    file = tmp_path / "mine.toml"
    file.write_text('title = "mine"\n')
    assert search_space_file(file) == {"title": "mine"}
    file.write_text("title = \n")
    with pytest.raises(AutoprecError, match=r"mine\.toml is no valid TOML.*line 1"):
        search_space_file(file)
    with pytest.raises(AutoprecError, match="does not exist"):
        search_space_file(tmp_path / "none.toml")
    with pytest.raises(AutoprecError, match="no search space 'nosuch'"):
        search_space_file("nosuch")


def test_names_come_without_torch_from_an_empty_folder(tmp_path: Path) -> None:
    code = (
        "import json, sys; from autoprec.catalog import device_names;"
        "print(json.dumps([len(device_names()), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(device_names()), False]
