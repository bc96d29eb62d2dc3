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
from reference_meaning import meaning, unpacked
from test_matrix import CHOICES, MIXED_FIRST, assert_equal, case_of, in_force, plan_of, step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from zoo import ZOO, Case

from autoprec import Plan, probe_units
from autoprec.formats import Format
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
    with in_force(case.model, plan):
        found = outputs(case)
    with meaning(case.model, plan):
        expected = outputs(case)
    assert_same(found, expected)


@pytest.mark.parametrize("choice", ["bf16", "fp16"])
@pytest.mark.parametrize("name", list(ZOO))
def test_uniform_is_autocast_of_the_whole(name: str, choice: str) -> None:
    case = case_of(name)
    with in_force(case.model, plan_of(case.model, choice)):
        found = step(case)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[choice]
    # a 4-bit layer knows no autocast and computes in the type it first read: its plain twin is what is meant.
    # PyTorch's own encoder leaves autocast's lists where it computes whole layers at once: not while it trains
    with unpacked(case.model):
        expected = step(case, around=torch.autocast("cpu", dtype=dtype, cache_enabled=False))
    assert_equal(found, expected)


@pytest.mark.parametrize("choice", MIXED_FIRST)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", list(ZOO))
def test_checkpointed_blocks_equal_plain_ones(name: str, before: bool, choice: str) -> None:
    case = uncached(name)
    plan = plan_of(case.model, choice)
    with in_force(case.model, plan):
        expected = step(case)
    held = set(blocks(case.model))
    assert held

    def wrap() -> None:
        apply_activation_checkpointing(case.model, check_fn=held.__contains__)

    if before:
        wrap()
    with in_force(case.model, plan):
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


@pytest.mark.parametrize("choice", MIXED_FIRST)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ADAPTED])
def test_plan_on_an_adapted_model(name: str, choice: str) -> None:
    case = case_of(name)
    model, _ = adapted(case.model)
    plan = plan_of(model, choice)
    with in_force(model, plan):
        found = step(case, model)
    assert_equal(found, step(case, model, around=meaning(model, plan)))


@pytest.mark.parametrize("choice", MIXED_FIRST)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ADAPTED])
def test_adapters_put_on_under_a_plan(name: str, choice: str) -> None:
    """The base keeps its formats; an adapter computes in what its surroundings have."""
    case = case_of(name)
    plan = plan_of(case.model, choice)
    with in_force(case.model, plan):
        model, names = adapted(case.model)
        found = step(case, model)
    assert any("lora_B" in n and p.grad is not None for n, p in model.named_parameters())
    assert_equal(found, step(case, model, around=meaning(model, inside(plan, names))))


def inside(plan: Plan, names: list[str]) -> Plan:
    """Return the plan with the leaves named as they stand in their adapters."""
    units = [replace(u, modules=tuple(f"{m}.base_layer" if m in names else m for m in u.modules)) for u in plan.units]
    return replace(plan, units=tuple(units))


#: exported always; the others, which take a second each, at night
SOON = ("llama", "gpt2", "bert", "vit", "mixtral")
EXPORTED = [
    pytest.param(name, choice, marks=() if name in SOON and choice == "mixed" else pytest.mark.nightly)
    for name in ZOO
    for choice in CHOICES
    if name not in NO_EXPORT and name not in OTHER_WHEN_EXPORTED
]


def exported(case: Case) -> Any:
    args, kwargs = ((), case.batch) if isinstance(case.batch, dict) else ((case.batch,), {})
    return torch.export.export(case.model, args, kwargs, strict=False).module()


@pytest.mark.parametrize(("name", "choice"), EXPORTED)
def test_exported_program_equals_eager(name: str, choice: str) -> None:
    case = uncached(name)
    with in_force(case.model, plan_of(case.model, choice)), torch.no_grad():
        expected = list(tensors(case.run()))
        program = exported(case)
    # with the plan off: the program has it inside
    with torch.no_grad():
        assert_same(list(tensors(Case(program, case.batch, case.loss).run())), expected)


@pytest.mark.parametrize("name", NO_EXPORT)
def test_what_is_not_exported_is_not_without_a_plan(name: str) -> None:
    with torch.no_grad(), pytest.raises(NO_EXPORT[name]):
        exported(uncached(name))


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHER_WHEN_EXPORTED)
def test_what_computes_otherwise_when_exported_does_without_a_plan(name: str) -> None:
    case = uncached(name)
    with torch.no_grad():
        assert not torch.equal(Case(exported(case), case.batch, case.loss).run().logits, case.run().logits)


def low(model: nn.Module) -> Plan:
    """Return the mixed plan with FP16 for FP8."""
    plan = plan_of(model, "mixed")
    return plan.replace({u.name: "fp16" for u in plan.units if u.format is Format.FP8})


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n in ZOO if n not in NO_EXPORT])
def test_gradients_of_exported_programs(name: str) -> None:
    case = uncached(name)
    with in_force(case.model, low(case.model)):
        expected = step(case)
        program = exported(case)
    program.zero_grad()
    loss = case.loss(Case(program, case.batch, case.loss).run())
    loss.backward()
    held = dict(program.named_parameters(remove_duplicate=False))
    found = [loss.detach(), *(held[key].grad for key, _ in case.model.named_parameters())]
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        # programs sum what comes to one tensor from several in an order of their own, each time in its own dtype:
        # that of BF16 keeps 8 bits
        assert a is None or b is None or (a - b).abs().max() <= 2**-7 * b.abs().max()


def test_exports_have_no_backward_of_functions() -> None:
    """Without a plan: what a program computes forward is differentiated, so FP8 rounds there and has no gradient."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    class Rounds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Straight.apply(super().forward(x))  # type: ignore[no-untyped-call]
            return result

    case = Case(Rounds(4, 4), torch.randn(2, 4), lambda y: y.sum())
    program = exported(case)
    case.loss(program(case.batch)).backward()
    assert program.weight.grad.abs().max() == 0 != step(case)[1].abs().max()  # type: ignore[union-attr]
