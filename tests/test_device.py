"""The device probe on the CPU that is here, and what it says of devices that are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprec.catalog import device_names, find_device
from autoprec.errors import DeviceError
from autoprec.formats import Format, Fp8Family
from autoprec.probe.device import probe_device, resolve_device
from autoprec.probe.host import slug
from autoprec.probe.rates import Trial, copy_rate, gemm_trials, matmuls, median_interval, strict_fp32
from autoprec.records import DeviceProfile, Origin, Support
from autoprec.runtime.cpu import INSTRUCTIONS

CPU = torch.device("cpu")
MKLDNN: Any = torch.backends.mkldnn


@pytest.fixture(scope="module")
def here() -> DeviceProfile:
    return probe_device("cpu", seconds=1.0)


def test_cpu_facts(here: DeviceProfile) -> None:
    assert (here.kind, here.origin) == ("cpu", Origin.MEASURED)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = set(cpuinfo.read_text().split())
        assert set(here.instructions) == flags & set(INSTRUCTIONS)
    assert here.threads == torch.get_num_threads()
    assert here.memory_bytes is not None and here.memory_bytes > 2**28
    assert here.versions["torch"] == torch.__version__
    assert here.name == slug(here.name)


def test_cpu_formats_are_judged_by_what_was_seen(here: DeviceProfile) -> None:
    assert here.supports(Format.FP32) is Support.NATIVE
    for choice in (Format.BF16, Format.FP16):
        # both run on any CPU since torch 2.2, so neither is absent; which is native depends on the CPU
        support = here.formats[choice]
        assert support.support in (Support.NATIVE, Support.EMULATED)
        assert "measured" in support.reason
    if {"amx_fp16", "avx512_fp16"}.isdisjoint(here.instructions):
        # widening through scalar code was seen at a sixth of FP32's rate: far from any noise
        assert here.supports(Format.FP16) is Support.EMULATED
    assert here.supports(Format.FP8) is Support.ABSENT and "no FP8 matmul unit" in here.formats[Format.FP8].reason
    assert here.fp8_family is None and here.fp8_recipes == ()
    assert here.tf32.support is Support.ABSENT


def test_cpu_rates(here: DeviceProfile) -> None:
    for rate in here.gemm_rates:
        assert 0 < rate.tflops_low <= rate.tflops <= rate.tflops_high < 1000
    assert {r.size for r in here.gemm_rates if r.format is Format.FP32} == {256, 512, 1024}
    assert len({(r.format, r.size) for r in here.gemm_rates}) == len(here.gemm_rates)
    copy = here.copy_gb_per_s
    assert copy is not None and copy.origin is Origin.MEASURED and 0 < copy.low <= copy.value <= copy.high


def test_probe_leaves_global_state_alone() -> None:
    MKLDNN.matmul.fp32_precision = "bf16"
    try:
        before = (torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.is_grad_enabled())
        probe_device("cpu", seconds=0.05)
        after = (torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.is_grad_enabled())
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        assert MKLDNN.matmul.fp32_precision == "bf16"
    finally:
        MKLDNN.matmul.fp32_precision = "none"


def test_fp32_is_timed_without_shortcuts() -> None:
    MKLDNN.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(ZeroDivisionError), strict_fp32():
            assert MKLDNN.matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert MKLDNN.matmul.fp32_precision == "bf16"
    finally:
        MKLDNN.matmul.fp32_precision = "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "CUDA:0"])
def test_absent_cuda_says_which_torch_and_what_to_try(device: str) -> None:
    version = torch.__version__.replace("+", r"\+")
    with pytest.raises(DeviceError, match=f"'{device}' here: torch {version} .* sees no cuda.*Use --device cpu"):
        probe_device(device)


def test_unknown_and_out_of_range_devices() -> None:
    with pytest.raises(DeviceError, match="no device 'h101-sxm' here or in the catalogue; closest: h100-sxm"):
        probe_device("h101-sxm")
    with pytest.raises(DeviceError, match="cpu has 1, counted from 0"):
        probe_device("cpu:3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a catalogued GPU may be here")
@pytest.mark.parametrize("name", device_names())
def test_a_catalogued_device_that_is_not_here(name: str) -> None:
    assert probe_device(name) == find_device(name)
    assert resolve_device(name) == (None, find_device(name))


def test_auto_is_here() -> None:
    device, _ = resolve_device("auto")
    assert device is not None
    torch.ones(2, device=device)


def test_what_does_not_run_is_absent_with_its_error() -> None:
    def refuse(size: int) -> Callable[[], Any]:
        raise RuntimeError(f"no kernel for {size}\nand a long trace")

    ways = {"fp32": matmuls(CPU, None)["fp32"], "odd": refuse}
    failed, trials = gemm_trials(ways, (16, 32), CPU, 0.01)
    assert failed == {"odd": "RuntimeError: no kernel for 16"}
    assert [t.size for t in trials] == [16, 32] and all(t.gain == (1.0, 1.0, 1.0) for t in trials)


def test_hopelessly_slow_ways_are_not_timed_at_larger_sizes() -> None:
    fp32 = matmuls(CPU, None)["fp32"]

    def slow(size: int) -> Callable[[], Any]:
        call = fp32(1024)  # thousands of times the work of a matmul of size 16
        return lambda: [call() for _ in range(2)]

    _, trials = gemm_trials({"fp32": fp32, "slow": slow}, (16, 256), CPU, 0.01)
    assert [t.size for t in trials if t.way == "slow"] == [16]
    assert next(t for t in trials if t.way == "slow").gain[2] < 1


def test_fp8_matmul_of_the_probe_multiplies() -> None:
    # torch's CPU fallback computes the product of the rounded operands exactly enough to compare in FP32
    ways = matmuls(CPU, Fp8Family.OCP)
    product = ways["fp8-tensorwise"](64)()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn).float() for _ in range(2))
    # bf16 results: half a unit in the last of 8 bits
    torch.testing.assert_close(product.float(), left @ right, rtol=2**-8, atol=2**-8)


def test_median_interval() -> None:
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    assert median_interval([1.0, 2.0, 9.0]) == (2.0, 1.0, 9.0)
    # n = 25: the 8th and the 18th value (Conover, table of confidence intervals of the median)
    assert median_interval([float(i) for i in range(1, 26)]) == (13.0, 8.0, 18.0)


def test_median_interval_covers_the_median() -> None:
    rng = random.Random(0)
    inside = 0
    for _ in range(1000):
        _, low, high = median_interval([rng.gauss(0, 1) ** 3 for _ in range(11)])
        inside += low <= 0 <= high
    # at least 95 % by construction; three standard deviations of a share of 1000 below it
    assert inside / 1000 > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_trial_rates() -> None:
    trial = Trial("bf16", 1000, (0.002, 0.001, 0.004), (1.0, 2.0, 0.5))
    assert trial.tflops == pytest.approx((1.0, 0.5, 2.0))
    assert trial.gain == (1.0, 0.5, 2.0)


def test_copy_rate_counts_both_directions() -> None:
    assert copy_rate(CPU, 0.01, mebibytes=4).value > 0.1


def test_slug() -> None:
    assert slug("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz") == "intel-xeon-platinum-8488c"
    assert slug("AMD EPYC 9654 96-Core Processor") == "amd-epyc-9654-96-core"


@pytest.mark.gpu
def test_cuda_probe() -> None:
    device = probe_device("cuda", seconds=4.0)
    assert device.kind == "cuda" and device.origin is Origin.MEASURED
    assert device.compute_capability is not None
    native = device.compute_capability >= (8, 0)
    assert (device.supports(Format.BF16) is Support.NATIVE) == native
    if device.compute_capability >= (9, 0):
        assert device.supports(Format.FP8) is Support.NATIVE and device.fp8_recipes
