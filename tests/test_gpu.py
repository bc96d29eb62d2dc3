"""The same promises on a CUDA device: autocast equality, real FP8 beside its emulation, switches put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_runtime import VOCAB, assert_same, gpt2, llama
from torch import Tensor, nn
from torch.nn import functional as F

from autoprec import Plan, applied, apply
from autoprec.formats import Fp8Recipe
from autoprec.runtime.fp8 import fp8_emulated_matmul, fp8_matmul, fp8_missing

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


def test_tf32_is_set_while_applied_and_put_back() -> None:
    model = llama().to(CUDA)
    before = torch.backends.cuda.matmul.fp32_precision
    handle = apply(model, Plan.uniform(model, "fp32", tf32=True))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    handle.remove()
    assert torch.backends.cuda.matmul.fp32_precision == before


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
