"""Every architecture in every format, plain and in what people put around models, against the meaning of the plan.

Eager cells are compared with `reference_meaning`, which shares no code with the runtime; the cells of a wrapper with
the eager ones. Both run the same kernels on the same operands, so all are compared bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch._functorch.config
from reference_meaning import meaning
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import ZOO, Case

from autoprec import Plan, applied, apply, probe_units
from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.runtime.scope import Scope

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # bitsandbytes and PEFT import torch.jit
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what Transformers says of tiny configurations
]

CHOICES = ["fp32", "bf16", "fp16", "fp8", "mixed"]
#: of a wrapper the plan that has every format is tried always, the others at night
MIXED_FIRST = ["mixed", *(pytest.param(c, marks=pytest.mark.nightly) for c in CHOICES if c != "mixed")]

functorch: Any = torch._functorch.config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sum in one order: how work is split over threads may change with the load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(name: str) -> Case:
    case = ZOO[name]()
    # 4-bit layers repack their weights in eval mode; nothing in the zoo drops anything out
    case.model.train(name == "qlora")
    return case


def plan_of(model: nn.Module, choice: str) -> Plan:
    """Return a uniform plan, or every format in turn over the units."""
    profile = probe_units(model)
    if choice != "mixed":
        return Plan.uniform(profile, choice)
    turn = [Format.BF16, Format.FP32, Format.FP16, Format.FP8]
    wanted = {u.name: turn[i % 4] for i, u in enumerate(profile.units)}
    able = {u.name: wanted[u.name] if wanted[u.name] in u.formats else Format.FP16 for u in profile.units}
    return Plan.uniform(profile, "bf16").replace(able)


def switches() -> tuple[Any, ...]:
    autocast = (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
    fast, tf32 = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.matmul.fp32_precision
    return (fast, tf32, functorch.backward_pass_autocast, *autocast)


@contextmanager
def in_force(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Apply a plan for a block; whatever was put around the model meanwhile, no trace of the plan stays."""
    before, classes = switches(), {module: type(module) for module in model.modules()}
    with applied(model, plan, emulate=True):
        yield
    assert switches() == before
    assert {module: type(module) for module in classes} == classes
    for module in model.modules():  # also those that came meanwhile
        assert not isinstance(module, Scope)
        assert not any(key.startswith("_autoprec_") for key in vars(module))


def step(case: Case, model: nn.Module | None = None, around: Any = None) -> list[Tensor | None]:
    """Return the loss and every parameter's gradient; `around` holds for the forward."""
    runner = case if model is None else Case(model, case.batch, case.loss)
    runner.model.zero_grad()
    with around or nullcontext():
        loss = runner.loss(runner.run())
    loss.backward()
    return [loss.detach(), *(None if p.grad is None else p.grad.clone() for p in runner.model.parameters())]


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), f"gradient {index - 1} is there on one side only"
        assert a is None or b is None or torch.equal(a, b), f"tensor {index} (0 is the loss) differs"


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", list(ZOO))
def test_eager_is_what_the_plan_means(name: str, choice: str) -> None:
    case = case_of(name)
    plan = plan_of(case.model, choice)
    with applied(case.model, plan, emulate=True):
        found = step(case)
    assert_equal(found, step(case, around=meaning(case.model, plan)))


@pytest.mark.parametrize("choice", MIXED_FIRST)
@pytest.mark.parametrize("name", list(ZOO))
def test_copies_and_saved_models_carry_the_plan(name: str, choice: str) -> None:
    case = case_of(name)
    plan = plan_of(case.model, choice)
    with in_force(case.model, plan):
        # before a step, whose hidden state some models keep and cannot copy
        copies = [copy.deepcopy(case.model)]
        if any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in case.model.modules()):
            with pytest.raises(RuntimeError, match="only supported through state_dict"):  # as without a plan
                pickle.dumps(case.model)
        else:
            file = io.BytesIO()
            torch.save(case.model, file)
            file.seek(0)
            copies += [pickle.loads(pickle.dumps(case.model)), torch.load(file, weights_only=False)]
        expected = step(case)
        for model in copies:
            assert_equal(step(case, model), expected)
        state = copy.deepcopy(case.model.state_dict())
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    # bitsandbytes writes what its weights need beside them, and reads it when a model is built, not into one
    case.model.load_state_dict(state, strict=name != "qlora")
    with in_force(case.model, plan):
        assert_equal(step(case), expected)


@pytest.mark.parametrize("name", list(ZOO))
def test_remove_restores_the_very_object_and_every_switch(name: str) -> None:
    case = case_of(name)
    plain = step(case)
    classes = {n: type(m) for n, m in case.model.named_modules()}
    contents = {n: set(vars(m)) for n, m in case.model.named_modules()}
    before = switches()
    parameters, keys = [id(p) for p in case.model.parameters()], list(case.model.state_dict())
    plan = plan_of(case.model, "mixed")
    handle = apply(case.model, plan, emulate=True)
    with pytest.raises(PlanError, match="in force on this model already"):
        apply(case.model, plan, emulate=True)
    step(case)
    assert list(case.model.state_dict()) == keys
    handle.remove()
    assert {n: type(m) for n, m in case.model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in case.model.named_modules()} == contents
    assert [id(p) for p in case.model.parameters()] == parameters
    assert switches() == before
    assert_equal(step(case), plain)
    with pytest.raises(PlanError, match="removed before"):
        handle.remove()


def checkpointed(model: nn.Module) -> bool:
    """Turn activation checkpointing on; say whether the model can."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return True


#: models with checkpointing of their own, or that say why not
CHECKPOINTED = [n for n in ZOO if n not in ("bare_gpt", "torch_encoder", "upsampler", "t5")]


def trained(name: str) -> Case:
    """Return a case in training mode, without the cache: checkpointing drops it, and what it holds is rounded anew."""
    case = ZOO[name]()
    case.model.train()
    config: Any = getattr(case.model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return case


@pytest.mark.parametrize("choice", MIXED_FIRST)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing_recomputes_in_the_same_formats(name: str, choice: str) -> None:
    case = trained(name)
    with in_force(case.model, plan_of(case.model, choice)):
        expected = step(case)
        if not checkpointed(case.model):
            # Transformers itself refuses these
            with pytest.raises(ValueError, match="does not support activation checkpointing"):
                case.model.gradient_checkpointing_enable()  # type: ignore[operator]
            return
        assert_equal(step(case), expected)


def test_t5_computes_otherwise_under_its_own_checkpointing() -> None:
    """Without a plan, in FP32; PyTorch's own checkpoints around its blocks change no bit, with a plan neither."""
    case = trained("t5")
    expected = step(case)
    assert checkpointed(case.model)
    assert not same(step(case), expected)


def compiled(case: Case) -> list[Tensor | None]:
    torch.compiler.reset()
    try:
        return step(case, torch.compile(case.model, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]
    finally:
        torch.compiler.reset()


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(found, expected, strict=True)
    )


def compare_compiled(name: str, choice: str) -> None:
    case = case_of(name)
    plain = step(case)
    exact = same(compiled(case), plain)
    with in_force(case.model, plan_of(case.model, choice)):
        expected = step(case)
        found = compiled(case)
    if exact:
        assert_equal(found, expected)
        return
    # Without a plan PyTorch's compiled backward sums in another order here, and gradients differ by up to 3e-7 of
    # their largest value: some roundings of FP32.
    for a, b in zip(found, expected, strict=True):
        assert a is None or b is None or (a - b).abs().max() <= 1e-6 * b.abs().max()


#: architectures of which the plain model makes no graph: capacities that depend on data, views that fake tensors refuse
NOT_COMPILED = ("switch", "qwen3_next")


@pytest.mark.parametrize("name", ["llama_tied", "opt", "albert", "torch_encoder", "batchnorm_cnn"])
def test_compiled_whole_equals_eager(name: str) -> None:
    compare_compiled(name, "mixed")


@pytest.mark.nightly
@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_does_not_compile_does_not_without_a_plan(name: str) -> None:
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported)):
        compiled(case_of(name))


@pytest.mark.nightly
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in NOT_COMPILED])
def test_compiled_whole_equals_eager_everywhere(name: str, choice: str) -> None:
    compare_compiled(name, choice)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_of_one_format_share_one_graph(name: str) -> None:
    case = case_of(name)
    assert isinstance(case.batch, dict)
    names = [u.name for u in probe_units(case.model).units if u.name.startswith("blocks.")]
    plan = Plan.uniform(case.model, "bf16").replace(dict.fromkeys([n for n in names if n.endswith("ffn")], "fp32"))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    with applied(case.model, plan), torch.no_grad():
        for block in case.model.get_submodule({"llama": "model.layers", "bert": "bert.encoder.layer"}[name]).children():
            block.compile(fullgraph=True, backend=counter)
        # a cache is written at each block's own index, which is one graph each with or without a plan
        case.model(**case.batch, **({"use_cache": False} if name == "llama" else {}))
    torch.compiler.reset()
    assert counter.frame_count == 1, "two blocks alike made more than one graph"


class Shared(nn.Module):
    """Two blocks of one storage, the first of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 64, bias=False), "down": nn.Linear(64, 16, bias=False)})
            for _ in range(2)
        )
        for name in ("up", "down"):
            self.blocks[1][name].weight = self.blocks[0][name].weight  # type: ignore[index]
        self.head = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[0], self.blocks[1]):
            x = x + block["down"](torch.relu(block["up"](x)))  # type: ignore[index]
        y: Tensor = self.head(x)
        return y


def test_one_weight_under_two_formats() -> None:
    torch.manual_seed(0)
    case = Case(Shared(), torch.randn(4, 16), lambda y: y.float().square().mean())
    plan = Plan.uniform(case.model, "bf16").replace({"blocks.0.ffn": "fp16", "blocks.1.ffn": "fp32"})
    with applied(case.model, plan):
        found = step(case)
    assert_equal(found, step(case, around=meaning(case.model, plan)))
