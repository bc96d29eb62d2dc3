"""The same promises on a CUDA device: autocast equality, real FP8 beside its emulation, switches put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from test_runtime import VOCAB, assert_same, gpt2, llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from autoprec import Plan, applied, apply, audit
from autoprec.formats import Fp8Recipe
from autoprec.probe.units import probe_units
from autoprec.records import AuditReport, Direction, OpKind, Role
from autoprec.runtime.fp8 import fp8_emulated_matmul, fp8_matmul, fp8_missing
from autoprec.runtime.tf32 import tf32_set

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # two runs are compared bit for bit
    yield request.param().eval().to(CUDA)
    torch.use_deterministic_algorithms(False)


def run(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1)).to(CUDA)
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return logits.detach(), grads


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_uniform_is_autocast_bit_for_bit(model: nn.Module, choice: str, dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype=dtype, cache_enabled=False):
        expected = run(model)
    with applied(model, Plan.uniform(model, choice)):
        assert_same(run(model), expected)


def fast_fp32() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture
def tensor_cores() -> None:
    if not fast_fp32():
        pytest.skip(f"{torch.cuda.get_device_name()} has no TF32")


def error(layer: nn.Module, x: Tensor) -> float:
    """Return the relative error of a layer's forward and of its weight's gradient, against FP64: the larger."""
    layer.zero_grad()
    exact = copy.deepcopy(layer).double()
    result, expected = layer(x), exact(x.double())
    result.sin().sum().backward()
    expected.sin().sum().backward()
    weight, exact_weight = next(layer.parameters()), next(exact.parameters())
    assert weight.grad is not None and exact_weight.grad is not None
    pairs = [(result, expected), (weight.grad, exact_weight.grad)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "matmul": (nn.Linear(512, 512, bias=False), torch.randn(256, 512)),
        "convolution": (nn.Conv2d(128, 128, 3, bias=False), torch.randn(16, 128, 32, 32)),
    }


#: TF32 keeps 10 bits of each operand, so a sum of products errs by about 3e-4 of itself; in FP32 by 1e-6
ROUNDED = 5e-5


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("before", [True, False], ids=["user has it on", "user has it off"])
@pytest.mark.parametrize("kind", ["matmul", "convolution"])
def test_tf32_changes_results_while_in_force_and_no_longer(kind: str, before: bool) -> None:
    layer, x = layers()[kind]
    layer, x = layer.to(CUDA), x.to(CUDA)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
        assert (error(layer, x) > ROUNDED) is before
        for on in (True, False):
            with tf32_set(on, "cuda"):
                assert (error(layer, x) > ROUNDED) is on
                assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is on
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (before, before)
            assert (error(layer, x) > ROUNDED) is before
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def wide() -> nn.Module:
    """Return a model whose matmuls are large enough for tensor cores to be chosen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=VOCAB
    )
    return cast(nn.Module, LlamaForCausalLM(config)).eval()


@pytest.mark.usefixtures("tensor_cores")
def test_a_plans_tf32_is_in_force_until_it_is_removed() -> None:
    model = wide().to(CUDA)
    exact = run(model)[0]
    before = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    handle = apply(model, Plan.uniform(model, "fp32", tf32=True))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.equal(run(model)[0], exact)
    with handle.suspended():
        assert torch.equal(run(model)[0], exact)
    handle.remove()
    assert (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()) == before
    assert torch.equal(run(model)[0], exact)


def audited(plan: Plan, model: nn.Module) -> AuditReport:
    """Audit a training step of a model on the device."""
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1)).to(CUDA)
    with applied(model, plan):
        return audit(model, plan, {"input_ids": ids, "labels": ids})


def executed(report: AuditReport, choice: str) -> set[str]:
    """Return what the matmuls ran in that a plan gives one format."""
    return {row.executed for row in report.rows if row.planned == choice and row.kind is OpKind.MATMUL}


def test_an_audit_of_a_mixed_plan_agrees() -> None:
    model = wide().to(CUDA)
    units = [unit.name for unit in probe_units(model).units if unit.role is not Role.EMBEDDING]
    formats = {name: ("bf16", "fp32", "fp16")[i % 3] for i, name in enumerate(units)}
    for tf32, wide_format in ((False, "fp32"), (True, "tf32")) if fast_fp32() else ((False, "fp32"),):
        report = audited(Plan.assign(model, formats, tf32=tf32), model)
        assert report.disagreements == () and report.backward and report.unused == ()
        assert {row.unit for row in report.rows if row.planned is not None} >= set(units)
        assert [executed(report, choice) for choice in ("bf16", "fp16", "fp32")] == [{"bf16"}, {"fp16"}, {wide_format}]
        assert {row.direction for row in report.rows if row.planned is not None} == set(Direction)
        assert report.kernels and all(row.ms > 0 and row.calls > 0 for row in report.kernels)
        assert any(row.ms > 0 for row in report.casts)
        assert all(row.ms > 0 for row in report.rows if row.kind is OpKind.MATMUL)


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_an_audit_of_real_fp8_finds_it(recipe: Fp8Recipe) -> None:
    missing = fp8_missing(CUDA)
    if missing:
        pytest.skip(missing)
    model = wide().to(CUDA)
    report = audited(Plan.uniform(model, "fp8", fp8_recipe=recipe), model)
    assert report.disagreements == ()
    assert executed(report, "fp8") == {"fp8"}  # and not "fp8 (emulated)"


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_real_fp8_agrees_with_its_emulation(recipe: Fp8Recipe) -> None:
    missing = fp8_missing(CUDA)
    if missing:
        pytest.skip(missing)
    torch.manual_seed(0)
    x = torch.randn(64, 128, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(256, 128, device=CUDA, dtype=torch.bfloat16) / 12
    real, emulated = fp8_matmul(x, weight.t(), recipe), fp8_emulated_matmul(x, weight.t(), recipe)
    # the same products; Hopper keeps 14 bits of their sums, and BF16 rounds the result to 8
    gap = (real.float() - emulated.float()).norm() / emulated.float().norm()
    assert float(gap) < 2**-8
