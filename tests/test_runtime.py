"""A plan in force: equal to what autocast and casts do where it should be, and different where the plan says so."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from autoprec import Plan, applied, apply, probe_units
from autoprec.errors import DeviceError, PlanError
from autoprec.formats import Format, Fp8Recipe
from autoprec.records import Role
from autoprec.runtime.fp8 import fp8_emulated_matmul

VOCAB = 64


class Block(nn.Module):
    """A bare block: attention and FFN leaves side by side, the scaled dot product in the block's own forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, 2, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))  # type: ignore[no-any-return]


class BareGPT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lnf, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.lnf(x))  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return cast(nn.Module, GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
    )
    return cast(nn.Module, LlamaForCausalLM(config))


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB
    )
    return cast(nn.Module, BertForMaskedLM(config))


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "bare": BareGPT}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    # dropout off: two runs are compared bit for bit
    yield MODELS[request.param]().eval()


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module) -> Tensor:
    raw = model(ids())
    return cast(Tensor, raw if isinstance(raw, Tensor) else raw.logits)


def run(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Return logits and the gradient of every parameter of a next-token loss."""
    model.zero_grad()
    logits = logits_of(model)
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return logits.detach(), grads


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert one[0].dtype is other[0].dtype
    assert torch.equal(one[0], other[0]), f"largest difference {(one[0] - other[0]).abs().max()}"
    for index, (a, b) in enumerate(zip(one[1], other[1], strict=True)):
        assert a.dtype is b.dtype and torch.equal(a, b), f"gradient {index} differs by {(a - b).abs().max()}"


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_uniform_is_autocast_bit_for_bit(model: nn.Module, choice: str, dtype: torch.dtype) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        logits = logits_of(model)
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    with applied(model, Plan.uniform(model, choice)):
        assert_same((logits.detach(), grads), run(model))


def test_uniform_fp32_ignores_an_outer_autocast(model: nn.Module) -> None:
    plain = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), applied(model, Plan.uniform(model, "fp32")):
        logits = logits_of(model)
    assert torch.equal(logits, plain[0])


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_cast_is_model_to_bit_for_bit_and_gives_the_bits_back(
    model: nn.Module, choice: str, dtype: torch.dtype
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(copy.deepcopy(model).to(dtype))
    with applied(model, Plan.cast(model, choice)):
        assert_same(run(model), expected)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype is after[k].dtype for k in before)


def test_a_cast_for_training_says_that_updates_are_lost(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"1/512 of a weight is lost.*'bf16-stochastic'"):
        apply(model, Plan.cast(model, "bf16")).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, Plan.cast(model, "bf16", mode="infer")).remove()
        apply(model, Plan.uniform(model, "bf16")).remove()
        model.requires_grad_(False)
        apply(model, Plan.cast(model, "bf16")).remove()
    model.requires_grad_(True)


def test_cast_keeps_what_training_changed(model: nn.Module) -> None:
    weight = next(model.parameters())
    original = weight.detach().clone()
    with applied(model, Plan.cast(model, "bf16")), torch.no_grad():
        weight[0] += 1.0
    assert weight.dtype is torch.float32
    assert torch.equal(weight[1:], original[1:])
    # the original is rounded once and the sum once, each by half a bf16 step, which is 2**-6 for values under 4
    assert float((weight[0] - original[0] - 1).detach().abs().max()) <= 2**-6


def test_all_fp32_units_in_a_bf16_ambient_equal_plain_fp32_in_their_matmuls(model: nn.Module) -> None:
    """Norms see FP32 as well here, so the whole result is that of FP32."""
    plan = Plan.uniform(model, "bf16")
    plan = plan.replace({u.name: "fp32" for u in plan.units})
    plain = run(model)
    with applied(model, plan):
        assert_same(run(model), plain)


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes of all operands of every matrix product, forward and backward."""

    MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, frozenset[torch.dtype], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name.startswith(self.MATMULS):
            tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            shapes = tuple(sorted(s for t in tensors for s in t.shape))
            self.seen.append((name, frozenset(t.dtype for t in tensors), shapes))
        return func(*args, **(kwargs or {}))


def test_fp32_units_are_really_fp32_inside_bf16_forward_and_backward(model: nn.Module) -> None:
    """Lower all but one FFN: its matmuls, and they alone, are seen in FP32; each once forward and twice backward."""
    profile = probe_units(model)
    unit = next(u for u in profile.units if u.role is Role.FFN)
    with applied(model, Plan.uniform(profile, "bf16").replace({unit.name: "fp32"})), MatmulDtypes() as seen:
        run(model)
    products = [row for row in seen.seen if "scaled_dot" not in row[0]]  # that one keeps FP32 sums for its backward
    fp32 = [row for row in products if row[1] == {torch.float32}]
    assert len(fp32) == 3 * len(unit.modules), fp32
    assert {torch.bfloat16} in [set(row[1]) for row in products]
    assert all(len(row[1]) == 1 for row in products), "a product of two formats"


@pytest.mark.parametrize("ambient", ["bf16", "fp32"])
def test_scaled_dot_product_follows_its_attention_unit(model: nn.Module, ambient: str) -> None:
    profile = probe_units(model)
    names = [u.name for u in profile.units if u.role is Role.ATTENTION]
    plan = Plan.uniform(profile, ambient).replace({names[0]: "fp16"})
    with applied(model, plan), MatmulDtypes() as seen:
        run(model)
    low = {"bf16": torch.bfloat16, "fp32": torch.float32}[ambient]
    sdpa = [set(row[1]) for row in seen.seen if row[0].startswith("_scaled_dot_product") and "backward" not in row[0]]
    # eager attention shows as bmm where the fused kernel is not taken
    assert sdpa == [{torch.float16}, {low}] or not sdpa
    assert {torch.float16} in [set(row[1]) for row in seen.seen]


def reference_linear(x: Tensor, leaf: Any, choice: Format, ambient: torch.dtype) -> Tensor:
    """What a leaf means in a format, written plainly."""
    weight_io = leaf.weight.t() if isinstance(leaf, nn.Linear) else leaf.weight
    if choice is Format.FP8:
        y = fp8_emulated_matmul(x.to(ambient), weight_io, Fp8Recipe.TENSORWISE)
        return y if leaf.bias is None else y + leaf.bias.to(y.dtype)
    dtype = {Format.FP32: torch.float32, Format.BF16: torch.bfloat16, Format.FP16: torch.float16}[choice]
    bias = None if leaf.bias is None else leaf.bias.to(dtype)
    return F.linear(x.to(dtype), weight_io.to(dtype).t(), bias)


@pytest.mark.parametrize("choice", list(Format))
def test_each_leaf_of_a_unit_computes_in_the_units_format(model: nn.Module, choice: Format) -> None:
    profile = probe_units(model)
    unit = next(u for u in profile.units if u.role is Role.FFN)
    calls: list[tuple[str, Tensor, Tensor]] = []
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(
            lambda m, args, y, name=name: calls.append((name, args[0].detach(), y.detach()))
        )
        for name in unit.modules
    ]
    with applied(model, Plan.uniform(profile, "bf16").replace({unit.name: choice}), emulate=True):
        run(model)
    for hook in hooks:
        hook.remove()
    assert [name for name, _, _ in calls] == list(unit.modules)
    for name, x, y in calls:
        expected = reference_linear(x, modules[name], choice, torch.bfloat16)
        if y.dtype is not expected.dtype:  # what the unit hands on: FP16 and the BF16 around it must not meet
            assert (choice, name, y.dtype) == (Format.FP16, unit.modules[-1], torch.float32)
        # GPT-2's addmm and this linear may sum their n FP32 terms in another order, by which each result may also
        # round to the neighbour in its own format
        order = x.shape[-1] * torch.finfo(torch.float32).eps
        a, b = y.float(), expected.detach().float()
        gap = (a - b).abs().max() / b.abs().max()
        assert float(gap) <= 2 * torch.finfo(expected.dtype).eps + order


def test_lookups_are_rounded_and_handed_on_in_the_streams_format(model: nn.Module) -> None:
    profile = probe_units(model)
    unit = next(u for u in profile.units if u.role is Role.EMBEDDING)
    table: Any = dict(model.named_modules())[unit.modules[0]]
    with applied(model, Plan.uniform(profile, "bf16").replace({unit.name: "bf16"})):
        looked_up = table(ids())
    assert looked_up.dtype is torch.float32
    assert torch.equal(looked_up, F.embedding(ids(), table.weight).bfloat16().float())


def mixed(model: nn.Module) -> Plan:
    """Every format in turn over the units."""
    profile = probe_units(model)
    turn = [Format.FP32, Format.BF16, Format.FP16, Format.FP8]
    formats = {u.name: turn[i % 4] if turn[i % 4] in u.formats else Format.FP16 for i, u in enumerate(profile.units)}
    return Plan.uniform(profile, "bf16").replace(formats)


def test_mixed_plan_survives_deepcopy_pickle_and_compile(model: nn.Module) -> None:
    with applied(model, mixed(model), emulate=True):
        expected = run(model)
        assert_same(run(copy.deepcopy(model)), expected)
        assert_same(run(pickle.loads(pickle.dumps(model))), expected)
        # aot_eager runs the same kernels, so what the compiler traced can be compared bit for bit
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(logits_of(compiled), expected[0])  # type: ignore[arg-type]
        torch.compiler.reset()


def test_remove_restores_the_very_object(model: nn.Module) -> None:
    classes = {name: type(m) for name, m in model.named_modules()}
    dictionaries = {name: set(m.__dict__) for name, m in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    keys, plain = list(model.state_dict()), run(model)
    handle = apply(model, mixed(model), emulate=True)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    handle.remove()
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == dictionaries
    assert_same(run(model), plain)
    with pytest.raises(PlanError, match="removed before"):
        handle.remove()


def test_saved_weights_load_into_a_plain_model(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    with applied(model, mixed(model), emulate=True):
        state = copy.deepcopy(model.state_dict())
    plain.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(plain), logits_of(model))


def test_class_names_and_signatures_stay_for_savers_and_trainers() -> None:
    import inspect

    one = gpt2()
    before = inspect.signature(one.forward)
    with applied(one, Plan.uniform(one, "bf16")):
        assert type(one).__name__ == "GPT2LMHeadModel"
        assert inspect.signature(one.forward) == before


def test_twice_or_on_another_model_raises(model: nn.Module) -> None:
    plan = Plan.uniform(model, "bf16")
    with applied(model, plan), pytest.raises(PlanError, match="in force on this model already"):
        apply(model, plan)
    with pytest.raises(PlanError, match="does not have|differs"):
        apply(nn.Sequential(nn.Linear(4, 4)), plan)
    torch.manual_seed(0)
    wider = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(PlanError, match="does not have|differs"):
        apply(wider, plan)
    assert_same(run(model), run(copy.deepcopy(model)))


def test_fp8_without_fp8_units_raises_and_changes_nothing(model: nn.Module) -> None:
    classes = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(DeviceError, match=r"cpu has no FP8.*emulate=True"):
        apply(model, Plan.uniform(model, "fp8"))
    assert {name: type(m) for name, m in model.named_modules()} == classes


def test_fp32_units_need_fp32_weights(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    with pytest.raises(PlanError, match=r"holds bfloat16 weights.*dtype=torch.float32"):
        apply(model, Plan.uniform(model, "fp32", mode="infer"))


def test_weights_to_be_trained_need_master_copies(model: nn.Module) -> None:
    plan = Plan.uniform(model, "bf16")
    model.to(torch.bfloat16)
    with pytest.raises(PlanError, match=r"stored in bfloat16.*1/512.*dtype=torch.float32"):
        apply(model, plan)
    apply(model, Plan.cast(model, "bf16")).remove()  # says itself that everything is stored low


def test_an_exception_inside_leaves_the_model_restored(model: nn.Module) -> None:
    classes = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="user"), applied(model, mixed(model), emulate=True):
        raise RuntimeError("user")
    assert {name: type(m) for name, m in model.named_modules()} == classes


def test_tf32_switch_is_left_alone_without_cuda(model: nn.Module) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with applied(model, Plan.uniform(model, "fp32", tf32=True)):
        assert torch.backends.cuda.matmul.fp32_precision == before
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_mixed_plan_on_a_cast_stream_keeps_the_stream_low() -> None:
    torch.manual_seed(0)
    one = llama().eval()
    plan = Plan.cast(one, "bf16")
    unit = next(u.name for u in plan.units if u.role is Role.FFN)
    seen: list[torch.dtype] = []
    for layer in one.get_submodule("model.layers").children():
        layer.register_forward_hook(lambda m, a, y: seen.append((y if isinstance(y, Tensor) else y[0]).dtype))
    plain = run(one)[0]
    with applied(one, plan.replace({unit: "fp32", "lm_head": "fp32"})):
        logits = run(one)[0]
    assert seen[2:4] == [torch.bfloat16, torch.bfloat16]
    assert logits.dtype is torch.float32
    # BF16's 8 bits of significand over a handful of layers: a few percent of the largest logit
    assert float((logits - plain).abs().max() / plain.abs().max()) < 0.05
