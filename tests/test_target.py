"""A device that is not here: its autocast lists, TF32 and FP8 in emulation, and searches and verifications for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from test_verification import workload as sample
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from autoprec.catalog import find_device
from autoprec.cli.main import main
from autoprec.errors import DeviceError
from autoprec.formats import TF32, Format
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.directions import draw_direction
from autoprec.probe.replay import Replayer
from autoprec.probe.sites import find_sites
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import CheckOutcome, Direction, Figure, LeafKind, Mode, OpKind, Origin
from autoprec.runtime import layout, target
from autoprec.runtime.attach import applied
from autoprec.runtime.emulate import round_to
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.target import RMS_NORM_WIDENED, target_lists
from autoprec.study.away import away
from autoprec.study.run import search
from autoprec.verification import audited_step, verify


def tiny_llama_workload() -> Workload:
    return sample("llama")


WIDENED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "tensor softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "rms norm": lambda x: F.rms_norm(x, (8,)),
    "power": lambda x: x**2,
    "sum": lambda x: x.sum(-1),
    "exp": torch.exp,
    "reciprocal": lambda x: 1 / x,
}


@pytest.mark.parametrize("name", WIDENED)
def test_what_cuda_widens_gives_fp32_under_its_lists_and_bf16_under_those_of_a_cpu(name: str) -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert WIDENED[name](x).dtype is torch.bfloat16, "CPU autocast widens it as well: the list is of no use here"
        with target_lists(tf32=False):
            listed = name != "rms norm" or RMS_NORM_WIDENED
            assert WIDENED[name](x).dtype is (torch.float32 if listed else torch.bfloat16)
    with target_lists(tf32=False):  # without autocast CUDA widens nothing
        assert WIDENED[name](x).dtype is torch.bfloat16


def test_products_stay_low_and_follow_their_inputs() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), target_lists(tf32=True):
        assert (a @ b).dtype is torch.bfloat16
        assert F.gelu(a.bfloat16()).dtype is torch.bfloat16


def test_tf32_rounds_operands_forward_and_backward() -> None:
    layer = nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    g = torch.randn(16, 32)
    with target_lists(tf32=True):
        y = layer(x)
    y.backward(g)
    x8, w8, g8 = (round_to(t.detach(), TF32) for t in (x, layer.weight, g))
    assert torch.equal(y, F.linear(x8, w8, layer.bias))
    assert x.grad is not None and layer.weight.grad is not None
    assert torch.allclose(x.grad, g8 @ w8, rtol=1e-6, atol=1e-6)
    assert torch.allclose(layer.weight.grad, g8.t() @ x8, rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, F.linear(x, layer.weight, layer.bias))


def test_a_plan_for_cuda_is_emulated_with_cudas_lists_also_where_blocks_run_again() -> None:
    workload = sample("gpt2")
    model: Any = workload.model
    model.set_attn_implementation("eager")  # its softmax is written out, without a dtype
    profile = probe_units(model)
    plans = [Plan.uniform(profile, "bf16", device=d, mode="train") for d in (find_device("h100-sxm"), None)]
    seen = []
    for plan in plans:
        with applied(model, plan, emulate=True), torch.no_grad():
            seen.append(workload.forward(workload.batches[0]).logits)
    assert not torch.equal(*seen), "the lists change nothing: norms and softmax run as a CPU runs them"
    model.activation_checkpointing_enable()
    model.train()
    with applied(model, plans[0], emulate=True):
        workload.training_loss(workload.batches[0], workload.forward(workload.batches[0])).backward()


def test_a_search_for_a_card_that_is_not_here_says_of_every_figure_where_it_is_from(tmp_path: Path) -> None:
    result = search(tiny_llama_workload(), budget="40s", trials=3, device="mi300x", space="roles", out=tmp_path)
    assert result.device == "mi300x"
    for m in (*result.baselines, *result.front):
        if m.drop is not None:
            assert m.origin.drop is Origin.EMULATED and m.origin.step_ms is Origin.PREDICTED, m.name
            assert m.origin.peak_bytes is Origin.PREDICTED and m.step_ms_ci95 is not None
    assert {m.name for m in result.baselines if m.drop is not None} >= {"uniform fp32", "uniform tf32", "uniform fp8"}
    tf32 = next(m for m in result.baselines if m.name == "uniform tf32")
    assert tf32.drop is not None and 0 < tf32.drop < 1e-3, "TF32 is not emulated"
    assert result.confirm and result.confirm.startswith("autoprec ")
    assert any("mi300x is not here" in note for note in result.notes)


def test_a_device_of_which_nothing_can_be_predicted_ends_a_search_at_once(tmp_path: Path) -> None:
    workload = tiny_llama_workload()
    with pytest.raises(DeviceError, match="no time can be predicted for cpu-amx-bf16"):
        search(workload, budget="20s", device="cpu-amx-bf16", out=tmp_path / "a")
    with pytest.raises(DeviceError, match="is on cpu, not on 'cuda:1'"):
        search(workload, budget="20s", device="cuda:1", out=tmp_path / "b")


def test_verify_emulates_a_card_and_on_it_compares_prediction_and_measurement() -> None:
    workload = tiny_llama_workload()
    plan = Plan.uniform(probe_units(workload.model), "fp8", mode=workload.mode)
    plan, forecast = away(workload, plan, "h100-sxm")
    assert forecast is not None and plan.device.name == "h100-sxm-80gb"
    found = verify(workload, plan, True, forecast=forecast)
    assert found.device == "h100-sxm-80gb" and found.measurement.origin.step_ms is Origin.PREDICTED
    assert any("to confirm: autoprec verify" in warning for warning in found.warnings)
    # as if this were the card: a plan whose prediction misses is told so, and is none the worse
    here = dataclasses.replace(plan, device=dataclasses.replace(plan.device, name="any"))
    said = Figure(value=1e6, ci95=(9e5, 1.1e6), unit="ms", origin=Origin.PREDICTED)
    again = verify(workload, here.with_evidence(dataclasses.replace(here.evidence, step_ms=said)), True)
    step = next((check for check in again.checks if check.figure == "step_ms"), None)
    assert step is not None and step.outcome is CheckOutcome.NOT_COMPARED, "FP8 is emulated here: it has no time"
    plain = Plan.uniform(probe_units(workload.model), "fp32", mode=workload.mode)
    timed = verify(workload, plain.with_evidence(dataclasses.replace(plain.evidence, step_ms=said)))
    assert any("was predicted as 1000000" in warning for warning in timed.warnings) and timed.holds


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w, w[:, 0]),
    "addmm": lambda x, w: torch.addmm(w[:, 0], x, w.t()),
    "@": lambda x, w: x @ w.t(),
    "bmm": lambda x, w: torch.bmm(x[None], w.t()[None]),
    "einsum": lambda x, w: torch.einsum("ik,jk->ij", x, w),
    "conv1d": lambda x, w: F.conv1d(x.t()[None], w[:, :, None]),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_a_cpu_is_slow_at_are_the_same_in_fp32_but_for_the_order_of_sums(
    name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_slow", lambda: frozenset({torch.bfloat16, torch.float16}))
    seen: list[list[Tensor]] = []
    for wide in (False, True):
        torch.manual_seed(0)
        x, w = (torch.randn(12, 32).to(torch.float32 if autocast else dtype).requires_grad_() for _ in range(2))
        with torch.autocast("cpu", dtype=dtype, enabled=autocast, cache_enabled=False):
            with target_lists(tf32=False) if wide else contextlib.nullcontext():
                result = PRODUCTS[name](x, w)
        assert result.dtype is dtype
        result.float().square().sum().backward()
        seen.append([result.detach(), *(t.grad for t in (x, w) if t.grad is not None)])
    for one, other in zip(*seen, strict=True):
        # sums of 32 that are rounded to the neighbour, and for gradients of such sums, twice
        step = 4 * torch.finfo(dtype).eps
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=step, atol=step * float(one.abs().max()))


def test_a_product_beyond_fp16_overflows_as_it_would_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_slow", lambda: frozenset({torch.float16}))
    x = torch.full((1, 4), 256.0, dtype=torch.float16)
    with target_lists(tf32=False):
        assert float(x @ x.t()) == float("inf")
        assert (x.float() @ x.float().t()).dtype is torch.float32


def test_replays_within_a_backward_multiply_in_fp32_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_slow", lambda: frozenset({torch.float16}))
    made = Mock(side_effect=target._in_fp32)
    monkeypatch.setattr(target, "_in_fp32", made)
    workload = tiny_llama_workload().with_mode("infer")
    profile, modules = probe_units(workload.model), canonical_modules(workload.model)
    sites = find_sites(profile, modules, [Format.FP16], Format.BF16, emulated=True)
    replayer = Replayer(workload, sites, modules, Format.BF16)
    replayer.run(workload.batches[0], [Format.FP16], lambda read: draw_direction(read, 0))
    linear = [leaf for leaf in profile.leaves if leaf.kind is LeafKind.LINEAR]
    assert len(linear) == 15 and made.call_count == len(linear)


def test_the_device_of_a_plan_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # a name that is not in the catalogue takes 5 ms, and was looked up for each layer
    found, model = Mock(side_effect=find_device), tiny_llama_workload().model
    monkeypatch.setattr(layout, "find_device", found)
    with applied(model, Plan.uniform(model, "fp8"), emulate=True):
        assert found.call_count == 1
    with applied(model, Plan.uniform(model, "bf16")):
        assert found.call_count == 1


def test_packed_operands_are_left_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_slow", lambda: frozenset({torch.bfloat16}))

    class Packed(Tensor):
        __torch_function__: Any = torch._C._disabled_torch_function_impl

    weight = torch.randn(4, 4, dtype=torch.bfloat16).as_subclass(Packed)
    seen: list[Any] = []
    monkeypatch.setattr(target, "_in_fp32", lambda *given: seen.append(given))
    with target_lists(tf32=False):
        F.linear(torch.randn(2, 4, dtype=torch.bfloat16), weight)
        assert not seen
        F.linear(torch.randn(2, 4, dtype=torch.bfloat16), weight.as_subclass(Tensor))
    assert len(seen) == 1


@pytest.mark.parametrize("slow", [frozenset({torch.bfloat16, torch.float16}), frozenset()])
@pytest.mark.parametrize("choice", ["bf16", "fp16", "fp8"])
def test_an_audit_knows_emulated_products(
    choice: str, slow: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_slow", lambda: slow)
    workload = tiny_llama_workload()
    plan = Plan.uniform(workload.model, choice, device=find_device("h100-sxm-80gb"), mode="infer")
    report = audited_step(workload.with_mode("infer"), plan, workload.batches[0], emulate=True)
    assert report.disagreements == ()
    ran = {row.executed for row in report.rows if row.unit and row.kind is OpKind.MATMUL}
    assert f"{choice} (emulated)" in ran if slow or choice == "fp8" else ran == {choice}


def wide_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """Multiply in FP32 whatever autocast says, values that BF16 holds."""
    k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (k, v))
    with torch.autocast("cpu", enabled=False):
        q, k, v = (t.bfloat16().float() for t in (q, k, v))
        scores = ((q @ k.transpose(2, 3)).softmax(-1).bfloat16().float() @ v).bfloat16()
    return scores.transpose(1, 2), None


@pytest.mark.parametrize("slow", [frozenset({torch.bfloat16, torch.float16}), frozenset()])
def test_an_audit_takes_no_real_fp32_product_for_an_emulated_one(
    slow: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_slow", lambda: slow)
    AttentionInterface.register("wide", wide_attention)
    workload = tiny_llama_workload()
    model: Any = workload.model
    model.config._attn_implementation = "wide"
    plan = Plan.uniform(model, "bf16", device=find_device("h100-sxm-80gb"))
    report = audited_step(workload, plan, workload.batches[0], emulate=True)
    wrong = [row for row in report.rows if row.agrees is False]
    assert wrong and {(row.executed, row.kind, row.planned) for row in wrong} == {("fp32", OpKind.MATMUL, Format.BF16)}
    assert {row.direction for row in wrong} == set(Direction)


def test_forecasts_name_the_surer_ratio_and_every_unit() -> None:
    workload = tiny_llama_workload()
    profile = probe_units(workload.model)
    forecast = Forecast(
        device=find_device("h100-sxm"), profile=profile, facts=None, mode=Mode.TRAIN, batch_size=8, seq_len=512
    )
    found = forecast.of(Plan.uniform(profile, "bf16"))
    assert found.speedup.low < found.speedup.value < found.speedup.high
    assert found.speedup.high / found.speedup.value <= found.step_ms.high / found.step_ms.value * 1.0001
    assert forecast.of(Plan.uniform(profile, "fp32")).speedup.value == 1.0
    assert set(forecast.unit_ms(profile.units[0].formats[0])) == {unit.name for unit in profile.units}


def test_recommend_ends_with_what_to_run_on_the_card(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["recommend", "gpt2", "--device", "rtx-4090", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "ms [" in done.output and "(predicted)" in done.output
    assert done.output.rstrip().splitlines()[-1].startswith("on rtx-4090, to confirm  autoprec verify ")
