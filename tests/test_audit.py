"""The audit finds no disagreement where there is none, and finds every lie planted."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_matrix import CHOICES, case_of, plan_of
from torch import Tensor, nn
from zoo import ZOO

import autoprec
from autoprec import Plan, applied, apply, audit
from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.records import Direction, OpKind

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, which wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", list(ZOO))
def test_what_ran_is_what_was_planned(name: str, choice: str) -> None:
    case = case_of(name)
    plan = plan_of(case.model, choice)
    with applied(case.model, plan, emulate=True):
        report = audit(case.model, plan, case.batch, loss=case.loss)
    assert report.disagreements == ()
    assert report.unused == ()
    # every unit was seen; these never call the lookup whose table their encoder and decoder share
    missing = {u.name for u in plan.units} - {row.unit for row in report.rows}
    assert missing == ({"embeddings"} if name in ("t5", "bart", "switch") else set())
    products = [r for r in report.rows if r.kind in (OpKind.MATMUL, OpKind.CONVOLUTION) and r.unit]
    assert {r.direction for r in products} == {Direction.FORWARD, Direction.BACKWARD}
    if choice == "fp8":
        able = any(u.format is Format.FP8 for u in plan.units)
        assert able is any(r.executed == "fp8 (emulated)" for r in products)
        assert able or name == "upsampler"


def test_nothing_is_left_changed() -> None:
    case = ZOO["batchnorm_cnn"]()
    case.model.train()
    case.loss(case.run()).backward()
    plan = plan_of(case.model, "mixed")
    with applied(case.model, plan, emulate=True):
        held = [t.clone() for t in (*case.model.parameters(), *case.model.buffers())]
        gradients = [p.grad for p in case.model.parameters()]
        random = torch.get_rng_state()
        audit(case.model, plan, case.batch, loss=case.loss)
        now = [*case.model.parameters(), *case.model.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
        assert all(p.grad is g for p, g in zip(case.model.parameters(), gradients, strict=True))
        assert torch.equal(torch.get_rng_state(), random)
    assert case.model.training


def test_a_plan_not_in_force_is_refused() -> None:
    case = ZOO["llama"]()
    plan = plan_of(case.model, "mixed")
    with pytest.raises(PlanError, match=r"cannot audit: no plan is in force .* call autoprec\.apply"):
        audit(case.model, plan, case.batch)
    with applied(case.model, Plan.uniform(case.model, "bf16")), pytest.raises(PlanError, match="another plan"):
        autoprec.audit(case.model, plan, case.batch)


def test_a_scope_taken_off_by_hand_is_refused() -> None:
    case = ZOO["llama"]()
    plan = Plan.uniform(case.model, "bf16").replace({"lm_head": "fp32"})
    apply(case.model, plan)
    case.model.lm_head.__class__ = nn.Linear
    with pytest.raises(PlanError, match="cannot audit: module 'lm_head' had the scope"):
        audit(case.model, plan, case.batch)


def test_a_class_that_computes_otherwise_is_named() -> None:
    case = ZOO["llama"]()
    plan = Plan.uniform(case.model, "bf16")
    mlp: Any = type(case.model.get_submodule("model.layers.0.mlp"))
    original = mlp.forward

    def wide(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = original(self, x.float())
        return y

    try:
        mlp.forward = wide
        with applied(case.model, plan):
            report = audit(case.model, plan, case.batch)
    finally:
        mlp.forward = original
    assert len(report.disagreements) == 2 * 3 * 2  # two blocks, three leaves, two directions
    assert "unit 'blocks.0.ffn': model.layers.0.mlp.gate_proj is planned in bf16 and ran in fp32" in "\n".join(
        report.disagreements
    )


def test_a_weight_used_behind_its_module_is_named() -> None:
    case = ZOO["llama"]()
    plan = Plan.uniform(case.model, "bf16").replace({"lm_head": "fp32"})
    model: Any = case.model

    def fused(self: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = hidden @ self.lm_head.weight.t()
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    kind: Any = type(model)
    original = kind.forward
    try:
        kind.forward = fused
        with applied(model, plan):
            report = audit(model, plan, case.batch)
    finally:
        kind.forward = original
    assert [(u.unit, u.parameter, u.executed, u.agrees) for u in report.behind] == [
        ("lm_head", "lm_head.weight", "bf16", False)
    ]
    assert "while its own module was not running" in report.disagreements[-1]


def test_a_layer_that_never_runs_is_listed() -> None:
    case = ZOO["llama"]()
    model: Any = case.model
    model.model.layers[1].forward = types.MethodType(
        lambda self, hidden_states, **_: hidden_states, model.model.layers[1]
    )
    plan = Plan.uniform(model, "bf16")
    with applied(model, plan):
        report = audit(model, plan, case.batch)
    assert {name.split(".")[2] for name in report.unused} == {"1"}
    assert len(report.unused) == 7


def test_casts_are_counted_by_unit() -> None:
    case = ZOO["bare_gpt"]()
    plan = Plan.uniform(case.model, "fp32").replace({"lm_head": "bf16"})
    with applied(case.model, plan):
        report = audit(case.model, plan, case.batch, loss=case.loss, backward=False)
    # the head casts its input and its weight, and nothing else is cast
    assert [(c.unit, c.source, c.target, c.calls) for c in report.casts if c.unit] == [("lm_head", "fp32", "bf16", 2)]
    assert all(c.bytes > 0 and c.ms >= 0 for c in report.casts)
