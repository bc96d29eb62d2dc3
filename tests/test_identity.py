"""Names, classes, fingerprints and digests stay the same under wrapping and change with the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import nn

from autoprec.errors import ModelError
from autoprec.plan import Plan
from autoprec.probe.units import probe_units
from autoprec.runtime.attach import apply
from autoprec.runtime.identity import (
    aliases,
    base_class,
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


def llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config)


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    return model


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
    "averaged": torch.optim.swa_utils.AveragedModel,
    "all": lambda model: Wrapper(compiled(Wrapper(checkpointed(model)))),
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


def lora(**changes: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["c_attn", "q_proj"], fan_in_fan_out=True, **changes)


def add_adapters(model: nn.Module) -> nn.Module:
    """Add LoRA under three names, two of which are what wrappers call the module inside."""
    adapted = peft.get_peft_model(model, lora(), adapter_name="module")
    for name in ("base_model", "odd name-3"):
        adapted.add_adapter(name, lora())
    wrapped: nn.Module = adapted
    return wrapped


PEFT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lora": lambda model: peft.get_peft_model(model, lora()),
    "several adapters, oddly named": add_adapters,
    "modules to save": lambda model: peft.get_peft_model(model, lora(modules_to_save=["lm_head"])),
    "vera, projections beside the model": lambda model: peft.get_peft_model(
        model, peft.VeraConfig(r=2, target_modules=["c_attn", "q_proj"], fan_in_fan_out=True)
    ),
    "prompt tuning": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "prefix tuning": lambda model: peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "wrapped again": lambda model: Wrapper(compiled(peft.get_peft_model(checkpointed(model), lora()))),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks Transformers so
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")  # one setting for both families
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # an untied copy of a tied head
@pytest.mark.parametrize("family", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("adapt", PEFT.values(), ids=PEFT)
def test_peft_names_come_down_to_the_models_own(
    adapt: Callable[[nn.Module], nn.Module], family: Callable[[], nn.Module]
) -> None:
    model = family()
    kept = {name: module for name, module in canonical_modules(model).items() if name != "lm_head"}
    wrapped = adapt(model)
    found = canonical_modules(wrapped)
    assert found[""] is model
    same = [name for name, module in kept.items() if found[name] is module]
    assert len(same) >= len(kept) - 2  # all but the attention projections, which LoRA wraps under their own names
    assert not [name for name in found if name.startswith(("base_model", "module", "_orig_mod"))]
    owned = {id(parameter) for _, parameter in canonical_parameters(wrapped)}
    assert owned == {id(parameter) for parameter in wrapped.parameters()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_keep_their_own_names() -> None:
    found = canonical_modules(add_adapters(gpt2()))
    place = "transformer.h.0.attn.c_attn"
    for adapter in ("module", "base_model", "odd name-3"):
        assert isinstance(found[f"{place}.lora_A.{adapter}"], nn.Linear)
    assert isinstance(found[f"{place}.lora_A"], nn.ModuleDict)


class Classifier(nn.Module):
    """A user's model around another, whose name PEFT happens to use too."""

    def __init__(self, body: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(body, inner)
        self.score = nn.Linear(32, 2)


@pytest.mark.parametrize("body", ["base_model", "model", "module", "_orig_mod"])
def test_a_users_module_keeps_its_name(body: str) -> None:
    model = Classifier(body, llama())
    assert set(canonical_modules(model)) == {name for name, _ in model.named_modules()}
    assert f"{body}.lm_head" in canonical_modules(model)
    assert set(canonical_modules(Wrapper(model))) == {name for name, _ in model.named_modules()}
    assert fingerprint(Wrapper(model)) == fingerprint(model) != fingerprint(Classifier("other", llama()))


def test_a_model_beside_one_called_base_model() -> None:
    model = nn.Module()
    model.model = nn.Linear(2, 2)
    model.base_model = nn.Module()
    model.base_model.model = nn.Linear(3, 3)
    found = canonical_modules(model)
    assert (found["model"], found["base_model.model"]) == (model.model, model.base_model.model)


def test_an_owner_of_parameters_or_buffers_is_no_wrapper() -> None:
    owner = nn.Linear(2, 2)
    owner.module = nn.Linear(2, 2)
    assert list(canonical_modules(nn.ModuleDict({"layer": owner}))) == ["", "layer", "layer.module"]
    scaled = Wrapper(nn.Linear(2, 2))
    scaled.register_buffer("mean", torch.zeros(2))
    assert list(canonical_modules(scaled)) == ["", "module"]
    assert list(canonical_modules(nn.ModuleDict({"module": nn.Linear(2, 2)}))) == ["", "module"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_two_modules_of_one_name_are_refused() -> None:
    model = gpt2()
    adapted = PEFT["prompt tuning"](model)
    model.prompt_encoder = nn.Linear(2, 2)
    with pytest.raises(ModelError) as refused:
        canonical_modules(adapted)
    assert str(refused.value) == (
        "two modules are both called 'prompt_encoder' once wrapper names are removed: the Linear at "
        "'base_model.prompt_encoder' and the ModuleDict at 'prompt_encoder'; rename one of them"
    )


def test_aliases_lead_to_the_name_a_module_is_listed_under() -> None:
    model = gpt2()
    assert aliases(model) == {}
    model.again = model.transformer.h[0]
    found = aliases(Wrapper(model))
    assert found["again"] == "transformer.h.0"
    assert found["again.attn.c_attn"] == "transformer.h.0.attn.c_attn"
    assert len(found) == len(list(model.again.modules()))
    model.transformer.h[1].root = model  # a way back to the root is a name of everything
    found = aliases(model)
    assert found["transformer.h.1.root"] == ""
    assert found["transformer.h.1.root.lm_head"] == "lm_head"


def test_shared_checkpointed_blocks() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    block = checkpoint_wrapper(nn.Linear(2, 2))
    model = nn.Sequential(block, block)
    assert list(canonical_modules(model)) == ["", "0"]
    assert aliases(model) == {"1": "0"}


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


def test_a_thousand_layers_take_no_time() -> None:
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(8, 2, 8) for _ in range(1000)]
    model = nn.Sequential(*layers)
    start = time.process_time()
    names, structure, ties = canonical_modules(model), fingerprint(model), tied_parameters(model)
    spent = time.process_time() - start
    assert (len(names), len(structure), ties) == (10_001, 64, ())
    assert spent < 1  # a tenth of it on the machine this was written on; a quadratic walk takes minutes


@pytest.mark.parametrize("choice", ["fp32", "bf16"])
def test_applying_a_plan_keeps_identity(choice: str) -> None:
    model = gpt2()
    structure, profile = fingerprint(model), probe_units(model)
    applied = apply(model, Plan.uniform(model, choice))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == structure
    assert probe_units(model) == profile
    applied.remove()
    assert fingerprint(model) == structure
