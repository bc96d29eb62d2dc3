"""Measuring a plan on real small models: what the figures mean, and that the model comes back as it was."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autoprec import Plan, Workload, applied, measure
from autoprec.errors import MeasurementError
from autoprec.measurement import Request, evaluate
from autoprec.probe.steps import peak_bytes
from autoprec.records import Origin
from autoprec.runtime.scope import Scope

VOCAB = 96


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        initializer_range=0.2,
    )
    return cast(nn.Module, LlamaForCausalLM(config))


def head_weight(model: nn.Module) -> Tensor:
    return cast(Tensor, model.get_submodule("lm_head").weight)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(0, VOCAB, (2, 24), generator=generator)
        labels = ids.clone()
        labels[0, :10] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def quick(workload: Workload, plan: Plan, **options: Any) -> Any:
    """One evaluation with as few timed pairs as an interval needs."""
    return evaluate(Request(workload=workload, plan=plan, min_pairs=6, max_pairs=6, timing_seconds=0.0, **options))


def plain_kl(model: nn.Module, plan: Plan, emulate: bool = False) -> tuple[float, float]:
    """The drop and the rise of the loss written out: KL over labels that count after the shift."""
    divergence = rise = count = 0.0
    model.eval()
    with torch.no_grad():
        for batch in batches():
            reference = model(batch["input_ids"]).logits.double()[:, :-1].log_softmax(-1)
            with applied(model, plan, emulate):
                lowered = model(batch["input_ids"]).logits.double()[:, :-1].log_softmax(-1)
            labels = batch["labels"][:, 1:]
            mask = labels != -100
            divergence += float((reference.exp() * (reference - lowered)).sum(-1)[mask].sum())
            picked = labels.clamp(min=0)[..., None]
            rise += float((reference - lowered).gather(-1, picked)[..., 0][mask].sum())
            count += float(mask.sum())
    return divergence / count, rise / count


@pytest.mark.parametrize(("choice", "emulate"), [("bf16", False), ("fp16", False), ("fp8", True)])
def test_drop_is_the_kl_over_counted_positions(choice: str, emulate: bool) -> None:
    model = llama()
    plan = Plan.uniform(model, choice)
    found = quick(Workload(model, batches(), mode="infer"), plan, emulate=emulate)
    drop, rise = plain_kl(model, plan, emulate)
    # sums of 200 FP64 terms in another order
    assert found.drop == pytest.approx(drop, rel=1e-9)
    assert found.loss_rise == pytest.approx(rise, rel=1e-6, abs=1e-12)
    assert found.drop_ci95[0] <= found.drop <= found.drop_ci95[1]


def test_the_reference_against_itself_drops_nothing() -> None:
    model = llama()
    found = quick(Workload(model, batches(), mode="infer"), Plan.uniform(model, "fp32"))
    assert found.drop == 0.0 and found.drop_percent == 0.0 and found.loss_rise == 0.0
    assert found.speedup > 0 and found.speedup_ci95 is not None
    assert found.origin.drop is Origin.MEASURED and found.origin.step_ms is Origin.MEASURED


def test_more_bits_drop_less() -> None:
    model = llama()
    workload = Workload(model, batches(), mode="infer")
    drops = [quick(workload, Plan.uniform(model, f), emulate=f == "fp8").drop for f in ("fp16", "bf16", "fp8")]
    assert drops[0] < drops[1] < drops[2]


def test_emulated_fp8_has_a_drop_and_no_speed() -> None:
    model = llama()
    found = quick(Workload(model, batches(), mode="infer"), Plan.uniform(model, "fp8"), emulate=True)
    assert found.origin.drop is Origin.EMULATED
    assert found.step_ms is None and found.speedup is None and found.peak_bytes is None
    assert "emulated" in found.reason


def test_train_mode_gives_the_gradients_error_and_its_limit() -> None:
    model = llama()
    plan = Plan.uniform(model, "bf16")
    found = quick(Workload(model, batches()), plan)
    error = size = 0.0
    model.eval()
    grads = []
    for batch in batches()[:2]:
        model.zero_grad()
        model(**batch).loss.backward()
        reference = [p.grad.double().clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with applied(model, plan):
            model(**batch).loss.backward()
        error += sum(
            float((p.grad.double() - r).square().sum())
            for p, r in zip(model.parameters(), reference, strict=True)
            if p.grad is not None
        )
        size += sum(float(r.square().sum()) for r in reference)
        grads.append(reference)
    between = sum(float((a - b).square().sum()) for a, b in zip(*grads, strict=True)) / 2
    # squared norms of FP32 differences
    assert found.grad_error == pytest.approx(error / size, rel=1e-4)
    assert found.grad_error_limit == pytest.approx(0.1 * between / (size / 2), rel=1e-4)


def test_the_model_comes_back_as_it_was() -> None:
    model = llama().train()
    model.get_submodule("model.norm").eval()
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    for choice in ("bf16", "fp16"):
        quick(Workload(model, batches()), Plan.uniform(model, choice))
    quick(Workload(model, batches()), Plan.cast(model, "bf16"))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[k], v) and before[k].dtype is v.dtype for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(isinstance(m, Scope) for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_overflow_is_said_and_leaves_the_model_whole() -> None:
    """Weights that push FP16 over 65504 while FP32 stays finite."""
    model = llama()
    with torch.no_grad():
        head_weight(model).mul_(1e6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    workload = Workload(model, batches(), mode="infer")
    found = quick(workload, Plan.uniform(model, "fp16"))
    assert found.drop is None and found.reason is not None
    assert "not finite on batch 0: values stop being finite in unit '" in found.reason
    assert quick(workload, Plan.uniform(model, "bf16")).drop is not None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_reference_that_is_not_finite_is_an_error() -> None:
    model = llama()
    with torch.no_grad():
        head_weight(model)[0, 0] = torch.nan
    with pytest.raises(MeasurementError, match="reference's output is not finite on batch 0"):
        quick(Workload(model, batches(), mode="infer"), Plan.uniform(model, "bf16"))
    assert not any(isinstance(m, Scope) for m in model.modules())


def test_dropout_is_off_where_drop_is_measured() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=VOCAB,
        n_positions=32,
        resid_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).train()
    found = quick(Workload(model, batches()), Plan.uniform(model, "fp32"))
    assert found.drop == 0.0 and found.grad_error == 0.0


def test_metric_is_the_users_own_under_the_plan() -> None:
    model = llama()

    def distinct(module: nn.Module, data: tuple[Any, ...]) -> float:
        logits = module(data[0]["input_ids"]).logits
        return 1.0 if logits.dtype is torch.bfloat16 else 0.0

    workload = Workload(model, batches(), mode="infer", metric=distinct)
    assert quick(workload, Plan.uniform(model, "bf16")).metric == 1.0
    assert quick(workload, Plan.uniform(model, "fp32")).metric == 0.0


def test_public_measure_names_the_plan() -> None:
    model = llama()
    found = measure(Workload(model, batches(1), mode="infer"), Plan.uniform(model, "fp32"))
    assert found.name == "uniform fp32" and found.step_ms is not None


def test_peak_of_memory_sees_a_large_tensor() -> None:
    small = peak_bytes(torch.device("cpu"), lambda: None)
    large = peak_bytes(torch.device("cpu"), lambda: torch.ones(64 * 2**20 // 4).sum())
    assert small.bytes is not None and large.bytes is not None, small.reason
    # 64 MB more, less what the allocator had at hand
    assert large.bytes - small.bytes > 48 * 2**20
