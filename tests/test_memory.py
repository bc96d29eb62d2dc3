"""Memory predicted against what PyTorch counts in real steps, and what is said of models that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autoprec
from autoprec.errors import DeviceError, PlanError, UsageError
from autoprec.facts import facts_of
from autoprec.models import model_names
from autoprec.plan import Plan
from autoprec.predict import largest_batch, memory_bytes
from autoprec.predict.skeleton import skeleton_profile
from autoprec.probe.units import probe_units
from autoprec.records import Architecture, MemoryBreakdown, ModelFacts, ModelProfile, Moment, Origin

GPT2_SIZES = {"n_layer": 3, "n_embd": 128, "n_head": 4, "vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0}


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
        "use_cache": False,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


@cache
def model(name: str) -> Any:
    """Return a small real model; dropout is off."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=2000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaForCausalLM(llama_config()),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**GPT2_SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ),
        "bert": lambda: transformers.BertForMaskedLM(bert),
    }
    return makers[name]().train()


def batch(vocabulary: int = 2000, size: int = 4, length: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(3, vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def allocated_peak(step: Callable[[], Any], held: list[Tensor]) -> int:
    """Return the most bytes allocated in a step, those of `held` tensors included, as the CPU allocator reports it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        highest = max(highest, now)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return highest + sum(storages.values())


def training_peak(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> int:
    def step() -> None:
        optimizer.zero_grad()
        module(**inputs).loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    peak = allocated_peak(step, [*module.parameters(), *module.buffers(), *states])
    optimizer.zero_grad()
    return peak


# against real steps; 3 %: recorded errors are under 2 % (benchmarks/results/memory.json), and small models have more
# of what is not counted (masks, positions, scalars)


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_training_peak(name: str, format: str) -> None:
    module = model(name)
    plan = Plan.uniform(module, format)
    with autoprec.applied(module, plan):
        peak = training_peak(module, torch.optim.AdamW(module.parameters(), fused=True), batch())
    predicted = memory_bytes(module, plan, 4, 64, device_kind="cpu")
    assert predicted.total_bytes == pytest.approx(peak, rel=0.03)
    assert predicted.origin is Origin.PREDICTED


def test_peak_with_checkpointing_and_momentum() -> None:
    module = model("llama")
    plan = Plan.uniform(module, "bf16").replace({"blocks.1.ffn": "fp32"})
    module.activation_checkpointing_enable()
    try:
        with autoprec.applied(module, plan):
            peak = training_peak(module, torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9), batch())
    finally:
        module.activation_checkpointing_disable()
    predicted = memory_bytes(
        module, plan, 4, 64, optimizer="sgd-momentum", checkpointing="full", device_kind="cpu"
    ).total_bytes
    assert predicted == pytest.approx(peak, rel=0.03)
    assert predicted < memory_bytes(module, plan, 4, 64, optimizer="sgd-momentum", device_kind="cpu").total_bytes


def test_peak_of_the_optimizer_step() -> None:
    # one short sequence: gradients and the temporaries of foreach outweigh activations
    module = model("gpt2")
    optimizer = torch.optim.AdamW(module.parameters(), foreach=True)
    peak = training_peak(module, optimizer, batch(size=1, length=4))
    predicted = memory_bytes(module, "fp32", 1, 4, optimizer="adamw-foreach", device_kind="cpu")
    assert predicted.moment is Moment.OPTIMIZER
    assert predicted.total_bytes == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_inference_peak(format: str) -> None:
    module = model("gpt2").eval()
    inputs = {"input_ids": batch()["input_ids"]}
    plan = Plan.uniform(module, format, mode="infer")
    try:
        with autoprec.applied(module, plan), torch.inference_mode():
            module(**inputs)
            peak = allocated_peak(lambda: module(**inputs), [*module.parameters(), *module.buffers()])
    finally:
        module.train()
    predicted = memory_bytes(module, plan, 4, 64, "infer", device_kind="cpu")
    # 5 %: what Python's frames still hold is a rule of thumb (recorded errors are up to 3 %)
    assert predicted.total_bytes == pytest.approx(peak, rel=0.05)
    assert predicted.parts.cache_bytes > 0


# counts that are known


def llama_8b() -> tuple[ModelProfile, ModelFacts]:
    facts = ModelFacts(
        model_id="llama-8b",
        architecture=Architecture.DECODER,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        gated=True,
        vocab=128256,
        max_positions=131072,
        tied=False,
    )
    return skeleton_profile(facts, "LlamaForCausalLM"), facts


def of_8b(format: str = "bf16", batch_size: int = 1, seq_len: int = 512, **options: Any) -> MemoryBreakdown:
    profile, facts = llama_8b()
    return memory_bytes(profile, format, batch_size, seq_len, facts=facts, **options)


def test_the_simple_count_of_teaching_material_and_what_it_leaves_out() -> None:
    count = llama_8b()[0].parameters
    assert count == 8_030_261_248  # as published for Llama 3.1 8B
    plain, mixed, master = (of_8b(policy=policy) for policy in ("fp32", "mixed", "mixed-master"))
    # 8 B parameters: 128 GB in FP32 and 96 GB mixed
    assert (plain.simple_bytes, mixed.simple_bytes) == (16 * count, 12 * count)
    assert plain.simple_bytes == pytest.approx(128e9, rel=0.01)
    assert mixed.simple_bytes == pytest.approx(96e9, rel=0.01)
    assert master.parts.masters_bytes == 4 * count and mixed.parts.masters_bytes == 0
    long = of_8b(batch_size=4, seq_len=4096)
    assert long.total_bytes - long.simple_bytes > 50e9
    assert long.parts.logits_bytes > 4 * 4096 * 128256 * 4


def test_autocast_keeps_copies_of_weights_and_a_cast_model_does_not() -> None:
    inside = sum(unit.casts_bytes for unit in of_8b("bf16").units)
    matrices = llama_8b()[0].parameters - 128256 * 4096 - 65 * 4096
    assert inside == 2 * matrices
    assert sum(unit.casts_bytes for unit in of_8b("bf16", policy="bf16").units) == 0
    assert sum(unit.casts_bytes for unit in of_8b("fp32").units) == 0


def test_what_each_saving_lowers() -> None:
    base = of_8b(batch_size=4, seq_len=2048)
    full, some, fused = (
        of_8b(batch_size=4, seq_len=2048, **{name: value})
        for name, value in (("checkpointing", "full"), ("checkpointing", "selective"), ("loss", "fused"))
    )
    assert full.kept_bytes == base.kept_bytes  # by unit, all is kept at one time or another
    assert full.total_bytes < some.total_bytes < base.total_bytes
    assert fused.total_bytes < base.total_bytes
    eager = of_8b(batch_size=4, seq_len=2048, attention="eager")
    # 32 heads, probabilities in FP32 and in BF16, 32 blocks
    assert sum(u.scores_bytes for u in eager.units) == 32 * 32 * 4 * 2048 * 2048 * 6
    assert sum(u.scores_bytes for u in base.units) == 0
    eight = of_8b(batch_size=4, seq_len=2048, optimizer="adamw-8bit")
    assert eight.parts.optimizer_bytes < 0.27 * base.parts.optimizer_bytes


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [
        # DeepSpeed's table for Adam in mixed precision on 64 devices: 120, 31.4, 16.6 and 1.9 GB for 7.5 B parameters
        # (arXiv:1910.02054, figure 1)
        ("none", 120 / 7.5),
        ("zero1", 31.4 / 7.5),
        ("zero2", 16.6 / 7.5),
        ("zero3", 1.9 / 7.5),
    ],
)
def test_states_under_zero(stage: str, bytes_per_parameter: float) -> None:
    found = of_8b(policy="mixed-master", sharding=stage, devices=64)
    states = sum(u.weights_bytes + u.masters_bytes + u.gradients_bytes + u.optimizer_bytes for u in found.units)
    # the published figures are rounded to 0.1 GB
    assert states / found.parameters == pytest.approx(bytes_per_parameter, abs=0.06 / 7.5)


def test_adapters_in_four_bits() -> None:
    lora, qlora = of_8b(method="lora"), of_8b(method="qlora")
    assert lora.trained_parameters == qlora.trained_parameters < 0.006 * lora.parameters
    assert lora.parts.weights_bytes == pytest.approx(2 * lora.parameters, rel=0.02)
    assert qlora.total_bytes < 0.6 * lora.total_bytes
    few = of_8b(method="lora", adapters="query-value", adapter_rank=8)
    assert few.trained_parameters == 32 * 8 * (2 * 4096 + 4096 + 1024)


@settings(deadline=None, max_examples=25)
@given(sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)), length=st.integers(1, 4096))
def test_more_sequences_never_take_less(sizes: tuple[int, int], length: int) -> None:
    low, high = sorted(sizes)
    assert of_8b(batch_size=low, seq_len=length).total_bytes <= of_8b(batch_size=high, seq_len=length).total_bytes


def test_units_and_parts_add_up() -> None:
    found = memory_bytes(model("llama"), "bf16", 4, 64)
    assert found.parts.weights_bytes == sum(u.weights_bytes for u in found.units) == 4 * found.parameters
    assert found.total_bytes == max(found.moments_bytes.values())
    assert found.units[-1].name == "outside units" and found.units[-1].weights_bytes == 4 * 7 * 128
    assert found.allocated_bytes == found.total_bytes - found.parts.context_bytes < found.total_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_configuration_says_as_much_as_a_module(name: str) -> None:
    module = model(name)
    facts = facts_of(module.config.to_dict())
    skeleton = skeleton_profile(facts, type(module).__name__)
    assert skeleton.parameters == sum(p.numel() for p in module.parameters())
    assert [u.name for u in skeleton.units] == [u.name for u in probe_units(module).units]
    whole, implied = memory_bytes(module, "bf16", 4, 64), memory_bytes(skeleton, "bf16", 4, 64, facts=facts)
    assert implied.parts == whole.parts
    # a profile without facts: heads are guessed, which moves the logsumexp alone
    assert memory_bytes(probe_units(module), "bf16", 4, 64).total_bytes == pytest.approx(whole.total_bytes, rel=0.01)


@pytest.mark.parametrize("name", model_names())
def test_every_catalogued_model_has_a_prediction(name: str) -> None:
    found = memory_bytes(name, "bf16", 2, 128)
    assert found.parts.weights_bytes == pytest.approx(4 * found.parameters, rel=1e-6)
    assert found.total_bytes > found.simple_bytes


def test_a_name_needs_no_torch() -> None:
    code = (
        "import sys, autoprec; found = autoprec.predict.memory_bytes('demo', 'bf16', 8, 128);"
        "print(found.parameters, {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, loaded = done.stdout.split(maxsplit=1)
    assert loaded.strip() == "set()"
    assert int(count) == 957_184  # the demo's, as its module has


# fitting


def test_largest_batch_is_the_largest() -> None:
    profile, facts = llama_8b()
    fit = largest_batch(profile, "bf16", "h100-sxm", 512, facts=facts, method="lora")
    assert fit.usable_bytes == round(0.95 * 80e9)
    assert of_8b(batch_size=fit.largest_micro_batch, method="lora").total_bytes <= fit.usable_bytes
    assert of_8b(batch_size=fit.largest_micro_batch + 1, method="lora").total_bytes > fit.usable_bytes
    assert fit.micro_batch == fit.effective_batch == fit.largest_micro_batch and fit.accumulation == 1


def test_accumulation_keeps_the_effective_batch() -> None:
    profile, facts = llama_8b()
    fit = largest_batch(
        profile, "bf16", "h100-sxm", 512, facts=facts, method="lora", effective_batch=96, step_seconds=lambda n: 0.1 * n
    )
    assert fit.micro_batch * fit.accumulation == fit.effective_batch == 96
    assert fit.breakdown.batch_size == fit.micro_batch and fit.breakdown.total_bytes <= fit.usable_bytes
    assert fit.tokens_per_s == pytest.approx(512 / 0.1)
    assert 48 > fit.largest_micro_batch >= fit.micro_batch
    alone = largest_batch(profile, "bf16", "h100-sxm", 512, facts=facts, method="lora", effective_batch=2)
    assert (alone.micro_batch, alone.accumulation) == (2, 1)
    assert alone.largest_micro_batch == fit.largest_micro_batch  # of the device, whatever is asked for
    sharded = largest_batch(
        profile, "bf16", "h100-sxm", 512, facts=facts, effective_batch=96, sharding="fsdp", devices=8
    )
    assert sharded.micro_batch * sharded.accumulation * 8 == 96


def test_a_model_that_fits_no_way_is_told_by_how_much_and_what_would_help() -> None:
    profile, facts = llama_8b()
    fit = largest_batch(profile, "bf16", "h100-sxm", 512, facts=facts)
    assert (fit.micro_batch, fit.largest_micro_batch) == (0, 0)
    assert fit.over_bytes == fit.breakdown.total_bytes - fit.usable_bytes > 50e9
    by = {remedy.name: remedy for remedy in fit.remedies}
    assert by["lora"].fits and by["qlora"].fits and not by["full checkpointing"].fits
    for remedy in fit.remedies:
        assert remedy.fits == (remedy.total_bytes <= fit.usable_bytes)
    tiny = largest_batch(profile, "bf16", 11_000_000_000, 2048, facts=facts)
    combined = tiny.remedies[-1]
    assert combined.fits and " and " in combined.name
    hopeless = largest_batch(profile, "bf16", 1_000_000, 2048, facts=facts)
    assert hopeless.over_bytes > 0 and not any(remedy.fits for remedy in hopeless.remedies)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, UsageError, "batch_size must be 1 or more, got 0"),
        ({"seq_len": 0}, UsageError, "seq_len must be 1 or more, got 0"),
        ({"devices": 0}, UsageError, "devices must be 1 or more"),
        ({"policy": "mixd"}, UsageError, "'mixd' is no policy; choose one of .*; closest: mixed"),
        ({"optimizer": "adam"}, UsageError, "'adam' is no optimizer; choose one of .*; closest: adamw"),
        ({"checkpointing": "ful"}, UsageError, "closest: full"),
        ({"sharding": "zero4"}, UsageError, "closest: zero"),
        ({"mode": "fit"}, UsageError, "'fit' is no mode"),
        ({"format": "int8"}, PlanError, "'int8' is no format"),
    ],
)
def test_what_cannot_be_read(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of_8b(**options)


def test_what_cannot_be_fitted() -> None:
    profile, facts = llama_8b()
    with pytest.raises(UsageError, match="cannot be divided among 3 devices"):
        largest_batch(profile, "bf16", "h100-sxm", 512, facts=facts, effective_batch=8, devices=3, sharding="fsdp")
    with pytest.raises(DeviceError, match="there is no device 'h1000'"):
        largest_batch(profile, "bf16", "h1000", 512, facts=facts)
    with pytest.raises(UsageError, match="reserve must be a share"):
        largest_batch(profile, "bf16", "h100-sxm", 512, facts=facts, reserve=1.0)
