"""Weights stored low: no result changes by a bit, no cast is left, and training keeps what its policy promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_trainer import data_of, model_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autoprec import Plan, applied, apply
from autoprec.errors import PlanError, UsageError
from autoprec.integrations.kv import PrecisionCache
from autoprec.records import Role
from autoprec.runtime.optimizers import MasterWeights, stochastic_adamw

STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def low(model: nn.Module, choice: str = "bf16", mode: str = "infer") -> Plan:
    """Everything in `choice`, the looked-up values too, so that tied weights can be stored so."""
    plan = Plan.uniform(model, choice, mode=mode)
    return plan.replace({u.name: choice for u in plan.units})


def ids(vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [lambda: model_of().eval(), llama, lambda: llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("choice", ["bf16", "fp16"])
def test_stored_low_gives_the_same_bits_and_back(make: Any, choice: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    plan = low(model, choice)
    with torch.no_grad():
        with applied(model, plan):
            expected = model(ids()).logits
        with applied(model, plan, storage="bf16"):
            stored = {p.dtype for u in plan.units for n in u.modules for p in model.get_submodule(n).parameters()}
            assert stored == {getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[choice])}
            assert torch.equal(model(ids()).logits, expected)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype is after[k].dtype for k in before)


def test_a_mixed_plan_stores_only_what_is_low() -> None:
    model = llama(tie_word_embeddings=True)
    plan = Plan.uniform(model, "bf16", mode="infer")
    ffn = next(u for u in plan.units if u.role is Role.FFN)
    plan = plan.replace({ffn.name: "fp32"})
    with torch.no_grad(), applied(model, plan):
        expected = model(ids()).logits
    with torch.no_grad(), applied(model, plan, storage="bf16"):
        assert torch.equal(model(ids()).logits, expected)
        assert model.get_submodule(ffn.modules[0]).weight.dtype is torch.float32
        # the embedding's values are handed on in fp32, so the tied weight stays
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype is torch.float32
        assert model.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16
        assert model.model.norm.weight.dtype is torch.float32


def casts(model: nn.Module) -> int:
    """Count casts of whole weights in a compiled forward's graph."""
    with torch.no_grad():
        graph = torch.export.export(model, (ids(),), {"use_cache": False}).run_decompositions({}).graph
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    nodes = [n for n in graph.nodes if n.op == "call_function" and "_to_copy" in str(n.target)]
    return sum(tuple(n.meta["val"].shape) in shapes for n in nodes)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch.export's own
def test_no_weight_is_cast_at_a_call_also_after_export() -> None:
    model = llama()
    plan = low(model)
    weights = sum(len(u.modules) for u in plan.units if u.role is not Role.EMBEDDING)
    with applied(model, plan):
        assert casts(model) == weights
    with applied(model, plan, storage="bf16"):
        assert casts(model) == 0


def test_stored_low_compiles_whole() -> None:
    model = llama()
    with torch.no_grad(), applied(model, low(model), storage="bf16"):
        expected = model(ids(), use_cache=False).logits
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids(), use_cache=False).logits, expected)
    torch.compiler.reset()


def test_settled_weights_stay_low() -> None:
    model = llama()
    handle = apply(model, low(model), storage="bf16")
    handle.settle()
    handle.remove()
    assert model.lm_head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("make", [llama, lambda: llama(num_key_value_heads=2)])
def test_a_cache_in_the_plans_formats_gives_the_same_bits(make: Any) -> None:
    model = make()
    attention = [u.name for u in Plan.uniform(model, "bf16").units if u.role is Role.ATTENTION]
    plan = low(model).replace({attention[1]: "fp16"})
    with torch.no_grad(), applied(model, plan):
        plain = model(ids(), use_cache=True)
        cache = PrecisionCache(model, plan)
        held = model(ids(), past_key_values=cache, use_cache=True)
        assert torch.equal(plain.logits, held.logits)
        token = plain.logits[:, -1:].argmax(-1)
        again = model(token, past_key_values=plain.past_key_values).logits
        assert torch.equal(model(token, past_key_values=cache).logits, again)
        assert [layer.keys.dtype for layer in cache.layers] == [torch.bfloat16, torch.float16]
        assert cache.layers[0].keys.shape[-2] == 13


@pytest.mark.parametrize(
    ("mode", "storage", "message"),
    [("train", "bf16", "is for inference.*'bf16-master'"), ("infer", "bf16-master", "is for training.*Use 'bf16'")],
)
def test_a_storage_that_does_not_go_with_the_mode(mode: str, storage: str, message: str) -> None:
    model = llama()
    with pytest.raises(PlanError, match=message):
        apply(model, Plan.uniform(model, "bf16", mode=mode), storage=storage)
    with pytest.raises(UsageError, match="storage 'int8' is not known"):
        apply(model, Plan.uniform(model, "bf16"), storage="int8")
    with pytest.raises(PlanError, match="stores everything in bf16 already"):
        apply(model, Plan.cast(model, "bf16"), storage=storage)


# training


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 5) -> list[float]:
    losses = []
    for row in data_of(count):
        loss = model(**{k: v[None] for k, v in row.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_master_copies_take_the_steps_of_fp32_weights_to_the_bit() -> None:
    model, other = model_of(**STILL), model_of(**STILL)
    plan = Plan.uniform(model, "bf16")
    # no fused kernels: they round the update of another dtype in other places
    options: dict[str, Any] = {"lr": 1e-3, "foreach": False}
    with applied(model, plan), applied(other, plan, storage="bf16-master") as handle:
        assert other.transformer.h[0].mlp.c_fc.weight.dtype is torch.bfloat16
        optimizer = MasterWeights(other.parameters(), originals=handle.originals, **options)
        assert steps(model, torch.optim.AdamW(model.parameters(), **options)) == steps(other, optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        again = MasterWeights(other.parameters(), **options)
        again.load_state_dict(state)
        assert torch.equal(again.state_dict()["masters"][0], state["masters"][0])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert theirs.dtype is torch.float32 and torch.equal(mine, theirs)  # the copies came back


def test_a_scheduler_reaches_the_optimizer_behind_the_copies() -> None:
    model = model_of(**STILL)
    with applied(model, Plan.uniform(model, "bf16"), storage="bf16-master"):
        optimizer = MasterWeights(model.parameters(), lr=1e-3)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = [p.detach().clone() for p in model.parameters()]
        steps(model, optimizer, 2)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_small_updates_are_lost_in_bf16_and_kept_by_copies_or_chance() -> None:
    """A hundred updates of 1/8 of a step of the format each move a weight by 12 steps, or not at all."""
    torch.manual_seed(0)
    start = torch.full((64, 64), 1.0)
    makers: dict[str, Any] = {"plain": torch.optim.AdamW, "master": MasterWeights, "chance": stochastic_adamw}
    moved = {}
    for name in makers:
        weight = nn.Parameter(start.bfloat16())
        options: dict[str, Any] = {"lr": 2.0**-10, "weight_decay": 0.0, "betas": (0.0, 0.0)}
        with torch.compiler.set_stance("force_eager"):
            optimizer = makers[name]([weight], **options)
            for _ in range(100):
                weight.grad = -torch.ones_like(weight)
                optimizer.step()
        moved[name] = float(weight.detach().float().mean()) - 1.0
    expected = 100 * 2.0**-10
    assert moved["plain"] == 0.0
    assert moved["master"] == pytest.approx(expected, abs=2.0**-8)
    # each weight goes up one step of 2^-7 with a chance of 1/8: 12.5 ± 3.3 of them, and 4096 weights' mean ± 0.05
    assert moved["chance"] == pytest.approx(expected, rel=0.02)
