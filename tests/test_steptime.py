"""Predicted times: what must hold of any card and model, and what is said where nothing can be predicted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprec.catalog import device_names, find_device
from autoprec.errors import AutoprecError, DeviceError, PlanError, UsageError
from autoprec.formats import Format
from autoprec.models import catalogued_profile
from autoprec.plan import Plan
from autoprec.predict import gemm_ms, step_ms, step_time
from autoprec.predict.card import card_of
from autoprec.predict.coefficients import coefficients, read_coefficients
from autoprec.predict.kernels import Kind, Phase
from autoprec.records import DeviceProfile, Estimate, FormatSupport, GemmRate, Hardware, Origin, Support

GPUS = [n for n in device_names() if find_device(n).kind == "cuda" and "fp32" in find_device(n).peak_tflops]
SIZES = st.integers(min_value=1, max_value=16384)


@given(m=SIZES, n=SIZES, k=SIZES, gpu=st.sampled_from(GPUS), key=st.sampled_from(["fp32", "tf32", "bf16", "fp8"]))
@settings(max_examples=150, deadline=None)
def test_no_matmul_is_faster_than_its_peak_and_larger_ones_take_no_less(
    m: int, n: int, k: int, gpu: str, key: str
) -> None:
    profile = find_device(gpu)
    card = card_of(profile, coefficients())
    if key not in card.rates:
        with pytest.raises(DeviceError, match=f"no matmul in {key}"):
            gemm_ms(gpu, m, n, k, key)
        return
    found = gemm_ms(gpu, m, n, k, key)
    # clocks above the nominal explain 15 % (kept.BOOST)
    least = 2e-9 * m * n * k / (1.15 * card.rate(key).flops / 1e12)
    assert found.value >= least
    assert found.low < found.value < found.high and found.origin is Origin.PREDICTED
    assert gemm_ms(gpu, 2 * m, n, k, key).value >= 0.999 * found.value
    assert gemm_ms(gpu, m, n, k, key, batch=2).value >= 0.999 * found.value


def test_large_matmuls_come_near_the_sustained_rate_and_small_ones_do_not() -> None:
    rate = card_of(find_device("h100-sxm"), coefficients()).rate("bf16").flops
    shares = {n: 2.0 * n**3 / (1e-3 * gemm_ms("h100-sxm", n, n, n, "bf16").value) / rate for n in (256, 1024, 8192)}
    assert shares[8192] > 0.8 and shares[256] < 0.1 and shares[256] < shares[1024] < shares[8192]


def test_a_wave_more_costs_time() -> None:
    # 132 multiprocessors: 11 x 12 tiles of 128 x 256 are one wave, one row of tiles more is a second
    full = gemm_ms("h100-sxm", 12 * 128, 11 * 256, 8192, "bf16").value
    more = gemm_ms("h100-sxm", 24 * 128, 11 * 256, 8192, "bf16").value
    assert 1.6 < more / full < 2.1


def test_the_narrower_format_is_the_faster_where_the_card_has_units_for_it() -> None:
    times = {key: gemm_ms("h100-sxm", 8192, 8192, 8192, key).value for key in ("fp32", "tf32", "bf16", "fp8")}
    assert sorted(times, key=lambda key: -times[key]) == ["fp32", "tf32", "bf16", "fp8"]
    # a V100 only widens bf16 (pytorch/pytorch#148322)
    assert gemm_ms("v100-pcie", 4096, 4096, 4096, "bf16").value > gemm_ms("v100-pcie", 4096, 4096, 4096, "fp32").value


def test_an_interval_is_wider_where_nobody_measured_the_card_and_outside_what_was_fitted() -> None:
    def width(device: str | DeviceProfile, n: int) -> float:
        found = gemm_ms(device, n, n, n, "fp32")
        return found.high / found.low

    measured = find_device("a100-pcie-40gb")
    assert measured.hardware is not None
    unknown = dataclasses.replace(measured, hardware=dataclasses.replace(measured.hardware, achieved_fraction={}))
    assert width(unknown, 4096) > width(measured, 4096)
    assert width(measured, 32768) > width(measured, 4096), "70 TFLOP are more than any row had"


def test_a_format_that_the_card_lacks_is_refused_with_the_reason() -> None:
    with pytest.raises(DeviceError, match=r"t4 has no matmul in fp8: FP8 matmul units came .* Choose one of bf16"):
        step_ms("gpt2", "t4", "fp8")
    with pytest.raises(DeviceError, match="the time model knows GPUs of amd and nvidia"):
        step_ms("gpt2", "cpu-avx512-bf16", "bf16")
    with pytest.raises(DeviceError, match="there is no device 'h1000'"):
        gemm_ms("h1000", 1, 1, 1, "bf16")
    with pytest.raises(UsageError, match="'int8' is no format; choose one of fp32"):
        gemm_ms("h100-sxm", 1, 1, 1, "int8")
    with pytest.raises(UsageError, match="k must be 1 or more, got 0"):
        gemm_ms("h100-sxm", 1, 1, 0, "bf16")
    with pytest.raises(PlanError, match="'int8' is no format"):
        step_ms("gpt2", "h100-sxm", "int8")


def test_figures_that_contradict_each_other_are_named() -> None:
    good = find_device("h100-sxm")
    swapped = dataclasses.replace(good, peak_tflops={**good.peak_tflops, "fp8": 500.0})
    with pytest.raises(DeviceError, match="its peak in bf16 is 989.4 TFLOP/s and in fp8 only 500"):
        gemm_ms(swapped, 64, 64, 64, "bf16")
    too_fast = GemmRate(format=Format.BF16, size=8192, tflops=2000.0, tflops_low=1990.0, tflops_high=2010.0)
    with pytest.raises(DeviceError, match="2000 TFLOP/s measured in bf16, and a peak of 989.4"):
        gemm_ms(dataclasses.replace(good, gemm_rates=(too_fast,)), 64, 64, 64, "bf16")


def test_a_new_card_needs_its_peaks_and_no_more() -> None:
    native = FormatSupport(Support.NATIVE, "says its datasheet")
    absent = FormatSupport(Support.ABSENT, "not there")
    new = DeviceProfile(
        name="new", kind="cuda", origin=Origin.DATASHEET,
        formats={f: native if f is not Format.FP8 else absent for f in Format}, tf32=absent,
        peak_tflops={"fp32": 40.0, "bf16": 400.0, "fp16": 400.0}, bandwidth_gb_per_s=2000.0,
        hardware=Hardware(vendor="nvidia", multiprocessors=100),
    )  # fmt: skip
    found = step_time("gpt2", new, "bf16")
    assert any("was not measured" in doubt for doubt in found.doubts)
    twice = dataclasses.replace(
        new, peak_tflops={"fp32": 80.0, "bf16": 800.0, "fp16": 800.0}, bandwidth_gb_per_s=4000.0,
        hardware=Hardware(vendor="nvidia", multiprocessors=200),
    )  # fmt: skip
    assert (
        0.45
        < step_time("gpt2", twice, "bf16", 64, 1024).step_ms.value
        / step_time("gpt2", new, "bf16", 64, 1024).step_ms.value
        < 0.65
    )


def test_the_parts_of_a_step_add_up_and_name_every_unit() -> None:
    found = step_time("bert-base-uncased", "a100-sxm", "fp16", 32, 384)
    assert sum(found.phases_ms.values()) == pytest.approx(found.step_ms.value)
    assert {u.name for u in catalogued_profile("bert-base-uncased").units} == set(found.units_ms)
    assert found.kinds_ms[Kind.MATMUL] > 0 and Phase.OPTIMIZER in found.phases_ms
    device = sum(found.kinds_ms.values())
    assert sum(found.units_ms.values()) + found.kinds_ms[Kind.OPTIMIZER] == pytest.approx(device)
    # products and fused attention, by the format of their operands
    assert set(found.products_ms) == {"fp16"}
    assert found.kinds_ms[Kind.MATMUL] <= found.products_ms["fp16"] < device


def test_what_a_step_does_more_takes_longer() -> None:
    def ms(*, mode: str = "train", plan: str = "bf16", **choices: object) -> float:
        return step_ms("meta-llama/Llama-3.2-1B", "a100-sxm", plan, 4, 1024, mode, **choices).value  # type: ignore[arg-type]

    plain = ms()
    assert ms(mode="infer") < plain / 2
    assert ms(optimizer=None) < plain < ms(checkpointing="full")
    assert ms(checkpointing="selective") < ms(checkpointing="full")
    assert ms(compile=True) < plain < ms(attention="eager")
    assert ms(plan="fp32") > ms(plan="tf32") > plain
    assert ms(method="lora") < plain


def test_fp8_pays_on_large_layers_when_compiled_and_never_in_eager_mode() -> None:
    def gain(model: str, tokens: int, compiled: bool) -> float:
        low, high = (
            step_ms(model, "h100-sxm", f, 1, tokens, optimizer=None, compile=compiled).value for f in ("fp8", "bf16")
        )
        return high / low

    # torchao measured 1.25 on Llama 3 8B; nanochat 0.2 without a compiler
    assert 1.1 < gain("meta-llama/Meta-Llama-3-8B", 8192, True) < 1.5
    assert gain("meta-llama/Meta-Llama-3-8B", 8192, False) < 1.0
    assert gain("gpt2", 512, True) < 1.05


def test_a_small_step_waits_for_the_host() -> None:
    found = step_time("gpt2", "h100-sxm", "bf16", 1, 128)
    assert Phase.FORWARD in found.host_bound
    assert not step_time("gpt2-xl", "t4", "fp16", 8, 1024).host_bound


#: card, its host's µs a launch, format, mode, and ms of a step of GPT-2 on 8x512 tokens: profiles/measured/
SLOW_HOSTS = (
    ("h200-sxm-141gb", 20.0, "bf16", "infer", 18.3),
    ("h200-sxm-141gb", 20.0, "fp32", "infer", 28.9),
    ("h100-sxm-80gb", 20.8, "fp16", "infer", 13.0),
    ("h100-sxm-80gb", 20.8, "bf16", "train", 46.2),
    ("h100-sxm-80gb", 20.8, "fp8", "infer", 56.4),
    ("h100-sxm-80gb", 20.8, "fp8", "train", 175.7),
)


def launching(card: str, launch_us: float) -> DeviceProfile:
    known = Estimate(launch_us, launch_us, launch_us, Origin.MEASURED)
    return dataclasses.replace(find_device(card), launch_us=known)


@pytest.mark.parametrize(("card", "launch", "choice", "mode", "seen"), SLOW_HOSTS)
def test_intervals_hold_steps_that_wait_for_a_slow_host(
    card: str, launch: float, choice: str, mode: str, seen: float
) -> None:
    devices = (find_device(card), launching(card, launch), launching(card, 4.0))
    there, here, quick = (step_time("gpt2", device, choice, 8, 512, mode).step_ms for device in devices)
    assert there.low <= seen <= there.high
    assert here.low <= seen <= here.high
    assert quick.value <= here.value


_FURTHEST = pytest.mark.xfail(reason="0.68 of it: the factor is the best for all steps of that card, not for this one")


@pytest.mark.parametrize(
    ("card", "launch", "choice", "mode", "seen"),
    [pytest.param(*SLOW_HOSTS[0], marks=_FURTHEST), *SLOW_HOSTS[1:]],
)
def test_a_known_host_makes_steps_predictable(card: str, launch: float, choice: str, mode: str, seen: float) -> None:
    found = step_time("gpt2", launching(card, launch), choice, 8, 512, mode).step_ms
    assert found.value == pytest.approx(seen, rel=0.3)


def test_what_the_host_takes_is_doubted_where_nobody_measured_it() -> None:
    known = find_device("h200-sxm-141gb")
    slow = launching("h200-sxm-141gb", 20.0)
    small = step_time("gpt2", known, "bf16", 1, 128)
    assert any("depends on the host, which was not measured" in doubt for doubt in small.doubts)
    assert not any("host" in doubt for doubt in step_time("gpt2", slow, "bf16", 1, 128).doubts)
    # a large model computes for longer than any host takes
    large = step_time("meta-llama/Meta-Llama-3-8B", known, "bf16", 1, 8192).step_ms
    assert large.high < 1.6 * large.value


def test_a_mixed_plan_lies_between_its_formats() -> None:
    profile = catalogued_profile("gpt2-large")
    plans = {f: Plan.uniform(profile, f) for f in ("fp32", "bf16")}
    mixed = plans["bf16"].replace({u.name: "fp32" for u in profile.units if ".ffn" in u.name})
    times = {k: step_ms("gpt2-large", "h100-sxm", p, 8, 1024).value for k, p in {**plans, "mixed": mixed}.items()}
    assert times["bf16"] < times["mixed"] < times["fp32"]


def test_the_table_of_coefficients_is_read_strictly() -> None:
    with pytest.raises(AutoprecError, match="not of schema autoprec/timing@1"):
        read_coefficients({"schema": "other"})
    with pytest.raises(AutoprecError, match="families"):
        read_coefficients({"schema": "autoprec/timing@1", "coefficients": {}})


def test_predictions_of_catalogued_models_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, json; from autoprec.predict import gemm_ms, step_ms;"
        "a = step_ms('gpt2-large', 'h100-sxm', 'bf16', 4, 1024); b = gemm_ms('t4', 512, 512, 512, 'fp16');"
        "print(json.dumps([a.value, b.value, [m for m in ('torch', 'transformers') if m in sys.modules]]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    step, gemm, loaded = json.loads(run.stdout)
    assert step > 0 and gemm > 0 and loaded == []
