"""Blocks compiled by themselves run their backward pass in their units' formats, not in the autocast around them."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor
from zoo import ZOO

from autoprec import Plan, apply, probe_units
from autoprec.formats import Format
from autoprec.runtime import switches

# dynamo looks at .grad of each input, and a block's input is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

config: Any = torch._functorch.config


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(plan: Plan, compiled: bool) -> dict[str, Tensor]:
    case = ZOO["llama"]()
    handle = apply(case.model, plan, emulate=True)
    for block in case.model.get_submodule("model.layers").children() if compiled else ():
        block.compile(backend="aot_eager")
    case.loss(case.run()).backward()
    handle.remove()
    return {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}


def test_blocks_compiled_inside_the_ambient_have_their_own_backward() -> None:
    profile = probe_units(ZOO["llama"]().model)
    deal = itertools.cycle((Format.FP32, Format.FP8, Format.FP16))
    plan = Plan.assign(profile, {u.name: next(f for f in deal if f in u.formats) for u in profile.units})
    assert plan.ambient is Format.BF16 and len(plan.formats) == 3
    eager, compiled = gradients(plan, False), gradients(plan, True)
    assert eager.keys() == compiled.keys() and len(eager) > 10
    assert [name for name in eager if not torch.equal(eager[name], compiled[name])] == []


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be without plans that other tests left in force."""
    before = config.backward_pass_autocast
    monkeypatch.setattr(switches.COMPILED_BACKWARD_AS_EAGER, "_users", 0)
    monkeypatch.setattr(switches.FAST_ATTENTION_OFF, "_users", 0)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)
    config.backward_pass_autocast = "same_as_forward"
    yield
    config.backward_pass_autocast = before


def test_a_dropped_handle_leaves_the_switches_to_the_plan(unheld: None) -> None:
    model = ZOO["torch_encoder"]().model
    apply(model, Plan.uniform(model, "bf16"))  # nobody keeps what this returns
    gc.collect()
    assert config.backward_pass_autocast == "off"
    assert not torch.backends.mha.get_fastpath_enabled()


def test_the_switches_are_put_back_by_the_last_plan(unheld: None) -> None:
    models = [ZOO["torch_encoder"]().model for _ in range(2)]
    first, second = (apply(model, Plan.uniform(model, "bf16")) for model in models)
    first.remove()
    assert config.backward_pass_autocast == "off"
    assert not torch.backends.mha.get_fastpath_enabled()
    second.remove()
    assert config.backward_pass_autocast == "same_as_forward"
    assert torch.backends.mha.get_fastpath_enabled()
