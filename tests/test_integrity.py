"""A model changed after its plan was applied is told before its first step, with the module and the mend."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO, Case

from autoprec import Plan, applied, apply
from autoprec.errors import PlanError
from autoprec.runtime import integrity
from autoprec.runtime.integrity import not_in_force


def half(case: Case) -> Plan:
    """BF16 but for the FFN of the first block."""
    return Plan.uniform(case.model, "bf16").replace({"blocks.0.ffn": "fp32", "lm_head": "fp16"})


@pytest.fixture
def case() -> Case:
    return ZOO["llama"]()


def test_a_replaced_module_is_named(case: Case) -> None:
    apply(case.model, half(case))
    case.model.lm_head = nn.Linear(32, 96, bias=False)
    with pytest.raises(PlanError, match=r"module 'lm_head' had the scope .* is a Linear without it now.*replaced"):
        case.run()


def test_float8_conversion_afterwards_is_named(case: Case) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    apply(case.model, half(case))
    config = Float8LinearConfig(emulate=True)
    convert_to_float8_training(case.model, config=config, module_filter_fn=lambda m, name: name == "lm_head")
    with pytest.raises(PlanError, match=r"module 'lm_head' .* Float8Linear without it now"):
        case.run()


@pytest.mark.parametrize("choice", ["mixed", "bf16"])
def test_weights_cast_afterwards_are_named(case: Case, choice: str) -> None:
    apply(case.model, half(case) if choice == "mixed" else Plan.uniform(case.model, "bf16"))
    case.model.to(torch.bfloat16)
    with pytest.raises(PlanError, match=r"held float32 when the plan was applied and holds bfloat16 now"):
        case.run()


def test_a_patched_forward_is_named_and_a_wrapped_one_is_not(case: Case) -> None:
    apply(case.model, half(case))
    head: Any = case.model.lm_head
    inner = head.forward

    @functools.wraps(inner)
    def logged(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    head.forward = logged
    case.run()
    other = ZOO["llama"]()
    apply(other.model, half(other))
    bare: Any = other.model.lm_head
    bare.forward = types.MethodType(lambda self, x: x @ self.weight.t(), bare)
    with pytest.raises(PlanError, match=r"module 'lm_head' got a forward of its own .*lambda.*Patch the model first"):
        other.run()


def test_after_a_pause_it_is_checked_at_once_and_not_in_the_next_step(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check takes milliseconds, a third of a small step: what is timed beside a reference must not hold it."""
    handle = apply(case.model, half(case))
    with handle.suspended():
        case.run()
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "_check", lambda root: pytest.fail("checked in a step"))
        case.run()
    with pytest.raises(PlanError, match=r"module 'lm_head' .* is a Linear without it now"), handle.suspended():
        case.model.lm_head = nn.Linear(32, 96, bias=False)


def test_copies_are_checked_again(case: Case) -> None:
    apply(case.model, half(case))
    case.run()
    other = copy.deepcopy(case.model)
    other.lm_head = nn.Linear(32, 96, bias=False)
    with pytest.raises(PlanError, match="module 'lm_head' had the scope"):
        Case(other, case.batch, case.loss).run()
    case.run()


def test_a_compiled_model_is_checked_while_it_is_traced(case: Case) -> None:
    apply(case.model, half(case))
    case.model.lm_head = nn.Linear(32, 96, bias=False)
    compiled: Any = torch.compile(case.model, backend="eager")
    # whatever the compiler wraps it in, the message arrives
    with pytest.raises(Exception, match="module 'lm_head' had the scope"):
        Case(compiled, case.batch, case.loss).run()
    torch.compiler.reset()


def test_a_forward_set_on_the_instance_before_is_refused(case: Case) -> None:
    head: Any = case.model.lm_head
    head.forward = types.MethodType(lambda self, x: x @ self.weight.t(), head)
    before = {n: type(m) for n, m in case.model.named_modules()}
    with pytest.raises(PlanError, match=r"module 'lm_head' has a forward set on the instance.*Apply the plan first"):
        apply(case.model, half(case))
    assert {n: type(m) for n, m in case.model.named_modules()} == before


def test_a_class_patched_between_two_plans_runs_patched(case: Case) -> None:
    calls: list[int] = []
    mlp: Any = type(case.model.get_submodule("model.layers.0.mlp"))
    original = mlp.forward
    with applied(case.model, half(case)):
        case.run()

    def counted(self: Any, x: Any) -> Any:
        calls.append(1)
        return original(self, x)

    try:
        mlp.forward = counted
        with applied(case.model, half(case)):
            case.run()
    finally:
        mlp.forward = original
    assert len(calls) == 2


def test_weights_on_two_devices_are_refused(case: Case) -> None:
    plan = half(case)
    case.model.lm_head.to("meta")
    with pytest.raises(PlanError, match=r"on several devices \(cpu, meta\)"):
        apply(case.model, plan)


def test_a_plan_naming_a_second_name_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = self.first
            self.head = nn.Linear(16, 4)

    model = Twice()
    plan = Plan.uniform(model, "bf16")
    data = plan.to_json()
    data["units"][0]["modules"] = ["second"]
    with pytest.raises(PlanError, match=r"module 'second', which is another name of 'first'"):
        apply(model, Plan.from_json(data))


def test_packed_weights_and_convolutions_refuse_fp8() -> None:
    case = ZOO["batchnorm_cnn"]()
    with pytest.raises(PlanError, match="cannot take fp8"):
        Plan.uniform(case.model, "bf16").replace({"conv": "fp8"})


def test_in_force_is_told_from_another_plan_and_from_none(case: Case) -> None:
    plan, other = half(case), Plan.uniform(case.model, "bf16")
    assert "no plan is in force" in str(not_in_force(case.model, plan))
    with applied(case.model, plan):
        assert not_in_force(case.model, plan) is None
        assert not_in_force(copy.deepcopy(case.model), plan) is None
        assert "blocks.0.ffn: fp32 in force, bf16 given" in str(not_in_force(case.model, other))
        case.model.lm_head = nn.Linear(32, 96, bias=False)
        assert "module 'lm_head'" in str(not_in_force(case.model, plan))
