"""Names, classes, fingerprints and digests stay the same under wrapping and change with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from autoprec.errors import ModelError
from autoprec.plan import Plan
from autoprec.probe.units import probe_units
from autoprec.runtime.attach import apply
from autoprec.runtime.identity import (
    base_class,
    canonical,
    canonical_modules,
    canonical_parameters,
    fingerprint,
    tied_parameters,
    weights_digest,
)


class Wrapper(nn.Module):
    """What DataParallel and DistributedDataParallel do to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def gpt2(**changes: int | bool) -> transformers.GPT2LMHeadModel:
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    config = transformers.GPT2Config(**settings | changes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = model.get_submodule("transformer.h")
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ""),
        ("module", ""),
        ("module.h.0.attn", "h.0.attn"),
        ("_orig_mod.module.h.0", "h.0"),
        ("h.0._orig_mod.attn", "h.0.attn"),
        ("h.1._checkpoint_wrapped_module.mlp", "h.1.mlp"),
        ("base_model.model.model.layers.0", "model.layers.0"),
        ("module.base_model.model.lm_head", "lm_head"),
        ("base_model.layers.0", "base_model.layers.0"),
        ("submodule.module_list", "submodule.module_list"),
    ],
)
def test_canonical(name: str, expected: str) -> None:
    assert canonical(name) == expected
    assert canonical(expected) == expected


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model)
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "data parallel": Wrapper,
    "compile": compiled,
    "both": lambda model: Wrapper(compiled(model)),
    "checkpointed": checkpointed,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapping_keeps_identity(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = gpt2()
    before = fingerprint(model), weights_digest(model), set(canonical_modules(model))
    wrapped = wrap(model)
    assert (fingerprint(wrapped), weights_digest(wrapped), set(canonical_modules(wrapped))) == before
    assert base_class(canonical_modules(wrapped)[""]) is transformers.GPT2LMHeadModel


def test_fingerprint_on_meta() -> None:
    with torch.device("meta"):
        model = gpt2()
    assert fingerprint(model) == fingerprint(gpt2())


def rename(model: nn.Module) -> None:
    model.add_module("head", model.get_submodule("lm_head"))
    del model.lm_head


def untie(model: nn.Module) -> None:
    model.get_submodule("lm_head").weight = nn.Parameter(torch.zeros(64, 32))


def add(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def resize(model: nn.Module) -> None:
    model.get_submodule("transformer").wpe = nn.Embedding(17, 32)


def swap(model: nn.Module) -> None:
    model.get_submodule("transformer").drop = nn.Identity()


@pytest.mark.parametrize("change", [rename, untie, add, resize, swap], ids=lambda f: f.__name__)
def test_fingerprint_changes_with_structure(change: Callable[[nn.Module], None]) -> None:
    model = gpt2()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_ignores_weights_and_digest_does_not() -> None:
    model = gpt2()
    structure, weights = fingerprint(model), weights_digest(model)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 5] += 1e-3
    assert fingerprint(model) == structure
    assert weights_digest(model) != weights


def test_digest_reads_every_dtype_and_layout() -> None:
    layer = nn.Linear(3, 4)
    plain = weights_digest(layer)
    assert weights_digest(copy.deepcopy(layer).to(torch.bfloat16)) != plain
    turned = copy.deepcopy(layer)
    turned.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert weights_digest(turned) == plain


def test_digest_refuses_meta() -> None:
    with pytest.raises(ModelError, match="parameter 'bias' is on the meta device .* load the weights first"):
        weights_digest(nn.Linear(2, 2, device="meta"))


def test_modules_by_first_name_and_ties() -> None:
    model = gpt2()
    model.again = model.transformer.h[0]
    names = canonical_modules(model)
    assert "transformer.h.0.attn" in names
    assert not any(name.startswith("again") for name in names)
    assert tied_parameters(model) == (("transformer.wte.weight", "lm_head.weight"),)
    assert len(dict(canonical_parameters(model))) == len(list(model.named_parameters(remove_duplicate=False))) - 12


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks Transformers so
def test_peft_names_come_down_to_the_models_own() -> None:
    peft = pytest.importorskip("peft")
    model = gpt2()
    names = set(canonical_modules(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    found = canonical_modules(adapted)
    assert names <= set(found)
    assert found[""] is model
    assert "base_model" not in found


def test_base_class_sees_through_swaps() -> None:
    class Swapped(nn.Linear):
        _autoprec_base = nn.Linear

    class Twice(Swapped):
        _autoprec_base = Swapped

    assert base_class(Swapped(2, 2)) is nn.Linear
    assert base_class(Twice(2, 2)) is nn.Linear
    assert base_class(nn.Linear(2, 2)) is nn.Linear
    swapped = nn.Sequential(nn.Linear(2, 2))
    before = fingerprint(swapped)
    swapped[0].__class__ = Twice
    assert fingerprint(swapped) == before


def test_base_class_sees_through_fsdp() -> None:
    from torch.distributed.fsdp import FSDPModule

    sharded = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    layer = nn.Linear(2, 2)
    layer.__class__ = sharded
    assert base_class(layer) is nn.Linear


def test_two_modules_of_one_name_are_refused() -> None:
    outer = nn.Linear(2, 2)
    outer.module = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="two modules are both called 'layer' .* rename the child called 'module'"):
        canonical_modules(nn.ModuleDict({"layer": outer}))


@pytest.mark.parametrize("choice", ["fp32", "bf16"])
def test_applying_a_plan_keeps_identity(choice: str) -> None:
    model = gpt2()
    structure, profile = fingerprint(model), probe_units(model)
    applied = apply(model, Plan.uniform(model, choice))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == structure
    assert probe_units(model) == profile
    applied.remove()
    assert fingerprint(model) == structure
