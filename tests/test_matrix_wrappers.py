"""Every architecture with its plan in what people put around models: checkpoints, adapters, exports, inference.

All cells run the kernels of the eager cell on the same operands, so all are compared bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import test_matrix
import torch
from reference_meaning import meaning
from test_matrix import CHOICES, assert_equal, case_of, plan_of, step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from zoo import ZOO, Case

from autoprec import Plan, applied, probe_units
from autoprec.records import LeafKind

pytestmark = test_matrix.pytestmark
one_thread = test_matrix.one_thread

#: these have adapters already
ADAPTED = ("peft_lora", "qlora")
#: models that cannot be exported without a plan either: bitsandbytes makes its tensors anew in a way that no export
#: follows, and a Switch decoder without a cache fails by itself
NO_EXPORT: dict[str, type[Exception]] = {"qlora": RuntimeError, "switch": TypeError}
#: models whose exported program computes in another order without a plan too
OTHER_WHEN_EXPORTED = ("qwen3_next",)


def uncached(name: str) -> Case:
    """Return a case whose model keeps no cache: a second forward would find it longer, and no export holds one."""
    case = case_of(name)
    for module in case.model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False
    return case


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, also those in tuples; caches are left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors(value)


def outputs(case: Case) -> list[Tensor]:
    """Return what the model gives without gradients, Hugging Face's hidden states too."""
    more = {"output_hidden_states": True} if hasattr(case.model, "config") else {}
    with torch.no_grad():
        if isinstance(case.batch, dict):
            return list(tensors(case.model(**case.batch, **more)))
        return list(tensors(case.model(case.batch)))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert_equal(list(found), list(expected))


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that stand in a list of their like."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1:
            found += [m for m in module if not any(m in set(outer.modules()) for outer in found)]
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", list(ZOO))
def test_inference_is_what_the_plan_means(name: str, choice: str) -> None:
    case = uncached(name)
    plan = plan_of(case.model, choice)
    with applied(case.model, plan, emulate=True):
        found = outputs(case)
    with meaning(case.model, plan):
        expected = outputs(case)
    assert_same(found, expected)


# under autocast a 4-bit layer computes in the type it first read, under a plan in its unit's format
@pytest.mark.parametrize("choice", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [n for n in ZOO if n != "qlora"])
def test_uniform_is_autocast_of_the_whole(name: str, choice: str) -> None:
    case = case_of(name)
    with applied(case.model, plan_of(case.model, choice)):
        found = step(case)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[choice]
    # PyTorch's own encoder leaves autocast's lists where it computes whole layers at once: not while it trains
    assert_equal(found, step(case, around=torch.autocast("cpu", dtype=dtype, cache_enabled=False)))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", list(ZOO))
def test_checkpointed_blocks_equal_plain_ones(name: str, before: bool) -> None:
    case = uncached(name)
    plan = plan_of(case.model, "mixed")
    with applied(case.model, plan, emulate=True):
        expected = step(case)
    held = set(blocks(case.model))
    assert held

    def wrap() -> None:
        apply_activation_checkpointing(case.model, check_fn=held.__contains__)

    if before:
        wrap()
    with applied(case.model, plan, emulate=True):
        if not before:
            wrap()
        assert_equal(step(case), expected)


def targets(model: nn.Module) -> list[str]:
    """Return the linear leaves of the blocks' units that can take an adapter."""
    found, profile = [], probe_units(model)
    fused = any(leaf.kind is LeafKind.EXPERTS for leaf in profile.leaves)
    for unit in profile.units:
        for name in unit.modules if unit.role not in ("embedding", "lm_head") else ():
            if fused and name.endswith(("gate_proj", "up_proj", "down_proj")):
                continue  # PEFT takes these names for those of the fused experts
            leaf = model.get_submodule(name)
            plain = isinstance(leaf, nn.Linear | nn.Conv2d) or type(leaf).__name__ == "Conv1D"
            # PEFT refuses Mamba's last projection, which fused kernels read past its module
            if plain and type(model.get_submodule(name.rpartition(".")[0])).__name__ != "MambaMixer":
                found.append(name)
            elif plain and name.endswith("in_proj"):
                found.append(name)
    return found


def adapted(model: nn.Module) -> tuple[Any, list[str]]:
    """Return the model with adapters that change its output, and the names of the leaves that have one."""
    names = targets(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of PEFT, on experts that are not adapted
        wrapped: Any = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped, names


@pytest.mark.parametrize("choice", ["fp8", "mixed"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ADAPTED])
def test_plan_on_an_adapted_model(name: str, choice: str) -> None:
    case = case_of(name)
    model, _ = adapted(case.model)
    plan = plan_of(model, choice)
    with applied(model, plan, emulate=True):
        found = step(case, model)
    assert_equal(found, step(case, model, around=meaning(model, plan)))


@pytest.mark.parametrize("choice", ["fp8", "mixed"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ADAPTED])
def test_adapters_put_on_under_a_plan(name: str, choice: str) -> None:
    """The base keeps its formats; an adapter computes in what its surroundings have."""
    case = case_of(name)
    plan = plan_of(case.model, choice)
    with applied(case.model, plan, emulate=True):
        model, names = adapted(case.model)
        found = step(case, model)
    assert any("lora_B" in n and p.grad is not None for n, p in model.named_parameters())
    assert_equal(found, step(case, model, around=meaning(model, inside(plan, names))))


def inside(plan: Plan, names: list[str]) -> Plan:
    """Return the plan with the leaves named as they stand in their adapters."""
    units = [replace(u, modules=tuple(f"{m}.base_layer" if m in names else m for m in u.modules)) for u in plan.units]
    return replace(plan, units=tuple(units))


@pytest.mark.parametrize("name", list(ZOO))
def test_exported_program_equals_eager_everywhere(name: str) -> None:
    case = uncached(name)
    args, kwargs = ((), case.batch) if isinstance(case.batch, dict) else ((case.batch,), {})

    def export() -> tuple[Any, list[Tensor]]:
        with torch.no_grad():
            expected = list(tensors(case.run()))
            return torch.export.export(case.model, args, kwargs, strict=False), expected

    if name in NO_EXPORT:
        with pytest.raises(NO_EXPORT[name]):
            export()
        return
    if name in OTHER_WHEN_EXPORTED:
        program, expected = export()
        assert not torch.equal(program.module()(**kwargs).logits, expected[-1])
        return
    with applied(case.model, plan_of(case.model, "mixed"), emulate=True):
        program, expected = export()
    # with the plan off: the program has it inside
    with torch.no_grad():
        assert_same(list(tensors(program.module()(*args, **kwargs))), expected)
