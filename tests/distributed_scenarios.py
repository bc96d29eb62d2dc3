"""What two processes do with a plan besides one step: remove it, save, train, be told of conflicts in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import (
    Work,
    alone,
    average,
    batch_of,
    blocks,
    differences,
    group_gradients,
    step,
    trained,
    wrap,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from zoo import ZOO, Case

from autoprec import Plan, apply, probe_units
from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.records import Role
from autoprec.runtime.identity import canonical_modules, fingerprint

__all__ = ["SCENARIOS"]

Scenario = Callable[[Work], list[str]]

SCENARIOS: dict[str, Scenario] = {}
_LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
_WIDE = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)


def _scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def _here(model: str) -> Case:
    return batch_of(ZOO[model](), dist.get_rank())


def _classes(model: nn.Module) -> list[str]:
    return [f"{name}: {cls.__mro__}" for name, module in canonical_modules(model).items() for cls in (type(module),)]


def _removed(work: Work, wrapper: str, order: str) -> list[str]:
    """A plan put on a model and taken off again leaves what the wrapper alone would have made."""
    plain = wrap(_here("llama").model, wrapper, work.mesh)
    plan, wanted = work.reference("llama", "mixed")
    case = _here("llama")
    model = case.model
    handle = apply(model, plan, emulate=True) if order == "before" else None
    model = wrap(model, wrapper, work.mesh)
    handle = handle or apply(model, plan, emulate=True)
    wrong = differences(step(case, model), wanted)
    handle.remove()
    model.zero_grad()
    wrong += [f"class of {a}, not {b}" for a, b in zip(_classes(model), _classes(plain), strict=True) if a != b]
    if wrapper == "fsdp2" and not all(isinstance(b, FSDPModule) for b in (model, *blocks(model))):
        wrong.append("blocks are sharded no more")
    wrong += differences(step(case, model), alone(ZOO["llama"], None))
    model.zero_grad()
    apply(model, plan, emulate=True)
    return wrong + differences(step(case, model), wanted)


@_scenario
def remove_from_ddp(work: Work) -> list[str]:
    return _removed(work, "ddp", "before") + _removed(work, "ddp", "after")


@_scenario
def remove_after_fully_shard(work: Work) -> list[str]:
    return _removed(work, "fsdp2", "before")


@_scenario
def remove_what_was_applied_after_fully_shard(work: Work) -> list[str]:
    return _removed(work, "fsdp2", "after")


@_scenario
def checkpoints_load_into_plain_models(work: Work) -> list[str]:
    wrong = []
    plan, _ = work.reference("llama", "mixed")
    for wrapper in ("ddp", "fsdp2"):
        for order in ("before", "after"):
            plain, model = ZOO["llama"]().model, ZOO["llama"]().model
            if order == "before":
                apply(model, plan, emulate=True)
            wrapped = wrap(model, wrapper, work.mesh)
            if order == "after":
                apply(wrapped, plan, emulate=True)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    parameter.mul_(3)
            for saved in (
                get_model_state_dict(
                    wrapped, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
                ),
                {k: _whole(v) for k, v in model.state_dict().items()},
            ):
                loaded = ZOO["llama"]().model
                loaded.load_state_dict(saved)
                for (name, one), (_, other) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
                    if not torch.equal(one, 3 * other):
                        wrong.append(f"{wrapper} {order}: {name}")
    return wrong


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@_scenario
def fingerprint_stays(work: Work) -> list[str]:
    wrong = []
    for name in ("llama_tied", "albert", "peft_lora"):
        before = fingerprint(ZOO[name]().model)
        wrong += [
            f"{name} {w}" for w in ("ddp", "fsdp2") if fingerprint(wrap(_here(name).model, w, work.mesh)) != before
        ]
    return wrong


@_scenario
def training_keeps_step(work: Work) -> list[str]:
    """Three steps of AdamW give the weights that plain models with averaged gradients get."""
    wrong = []
    for name in ("llama", "peft_lora", "bart"):
        plan, _ = work.reference(name, "mixed")
        for wrapper in ("ddp", "fsdp2"):
            plain = _here(name)
            if wrapper == "fsdp2":
                group_gradients(plain.model)
            wanted = _train(plain, None, plan, work)
            got = _train(_here(name), wrapper, plan, work)
            wrong += [f"{name} {wrapper}: {key}" for key in wanted if not torch.equal(got[key], wanted[key])]
    return wrong


def _train(case: Case, wrapper: str | None, plan: Plan, work: Work) -> dict[str, Tensor]:
    model = case.model
    apply(model, plan, emulate=True)
    if wrapper is not None:
        model = wrap(model, wrapper, work.mesh)
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=1e-2)
    for _ in range(3):
        step(case, model)
        if wrapper is None:
            for _, parameter in trained(model):
                average(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return {name: _whole(p.detach()) for name, p in trained(model)}


@_scenario
def accumulation_without_sync(work: Work) -> list[str]:
    """Two micro-batches, the first without communication, give the averaged sum."""
    plan, _ = work.reference("llama", "mixed")
    wrong = []
    plain = _here("llama")
    apply(plain.model, plan, emulate=True)
    for _ in range(2):
        step(plain, plain.model)
    for _, parameter in trained(plain.model):
        average(parameter)
    wanted = {name: p.grad for name, p in trained(plain.model)}
    for wrapper in ("ddp", "fsdp2"):
        case = _here("llama")
        apply(case.model, plan, emulate=True)
        model: Any = wrap(case.model, wrapper, work.mesh)
        if wrapper == "ddp":
            with model.no_sync():
                step(case, model)
        else:
            model.set_requires_gradient_sync(False)
            case.loss(case.run()).backward()
            model.set_requires_gradient_sync(True)
        got = step(case, model).gradients
        wrong += [f"{wrapper}: {name}" for name in wanted if not torch.equal(_given(got[name]), _given(wanted[name]))]
    return wrong


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@_scenario
def packed_weights_shard_nowhere(work: Work) -> list[str]:
    """FSDP2 on 4-bit weights fails without any plan, which is why they are ignored in the cells."""
    case = _here("qlora")
    for block in blocks(case.model):
        fully_shard(block, mesh=work.mesh)
    fully_shard(case.model, mesh=work.mesh)
    try:
        step(case, case.model)
    except ValueError as error:
        return [] if "quant_state" in str(error) else [str(error)]
    return ["a plain model runs, so the cells could shard its packed weights too"]


# policies that lower precision


def _lowered(case: Case, policy: MixedPrecisionPolicy, work: Work) -> nn.Module:
    for block in blocks(case.model):
        fully_shard(block, mesh=work.mesh, mp_policy=policy)
    fully_shard(case.model, mesh=work.mesh, mp_policy=policy)
    return case.model


@_scenario
def a_lowering_policy_is_refused_by_apply(work: Work) -> list[str]:
    plan, _ = work.reference("llama", "mixed")
    model = _lowered(_here("llama"), MixedPrecisionPolicy(param_dtype=torch.bfloat16), work)
    try:
        apply(model, plan, emulate=True)
    except PlanError as error:
        return [] if "param_dtype" in str(error) else [str(error)]
    return ["apply took a model whose weights arrive in bf16"]


@_scenario
def a_lowering_policy_set_after_apply_stops_the_first_forward(work: Work) -> list[str]:
    plan, _ = work.reference("llama", "mixed")
    case = _here("llama")
    apply(case.model, plan, emulate=True)
    model = _lowered(case, MixedPrecisionPolicy(param_dtype=torch.bfloat16), work)
    try:
        step(case, model)
    except PlanError as error:
        wrong = [] if "param_dtype" in str(error) else [str(error)]
        return wrong + [f"{name} has a gradient" for name, p in trained(model) if p.grad is not None]
    return ["the forward ran with weights that arrived in bf16"]


@_scenario
def what_a_wrapper_holds_in_fp32_is_not_stored_low(work: Work) -> list[str]:
    wrong = []
    for wrapper in ("ddp", "fsdp2"):
        case = _here("llama")
        plan = Plan.cast(case.model, "bf16")
        try:
            apply(wrap(case.model, wrapper, work.mesh), plan)
            wrong.append(f"{wrapper}: apply took it")
        except PlanError as error:
            wrong += [] if "Apply the plan before" in str(error) else [str(error)]
    return wrong


@_scenario
def the_mend_is_right(work: Work) -> list[str]:
    """What the error tells to do gives the plan's bits: FP32 units sharded by themselves, the rest gathered in BF16."""
    profile = probe_units(ZOO["llama"]().model)
    plan = Plan.uniform(profile, "bf16")
    fp32 = [u.name for u in profile.units if u.role in (Role.EMBEDDING, Role.LM_HEAD) or ".1.ffn" in u.name]
    plan = plan.replace(dict.fromkeys(fp32, Format.FP32))
    wanted = alone(ZOO["llama"], plan)
    case = _here("llama")
    apply(case.model, plan)
    modules = canonical_modules(case.model)
    for name in [n for u in plan.units if u.format is Format.FP32 for n in u.modules]:
        fully_shard(modules[name], mesh=work.mesh, mp_policy=_WIDE)
    got = step(case, _lowered(case, _LOW, work))
    # norms are in no unit: they take the policy's bf16, and so do their gradients; their ones lose nothing by it
    for gradients in (got.gradients, wanted.gradients):
        for name in [n for n in gradients if "norm" in n]:
            del gradients[name]  # type: ignore[attr-defined]
    return differences(got, wanted)
