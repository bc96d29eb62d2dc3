"""Wrappers that lower precision themselves are told, with what to do; their default policies are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from zoo import ZOO

from autoprec import Plan, apply, probe_units
from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.sharding import sharding_conflict

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Uniform = Callable[[str], Plan]


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be a group of one process."""
    meeting = tmp_path_factory.mktemp("alone") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(
    model: nn.Module, blocks: dict[str, Any], root: dict[str, Any] | None = None, own: tuple[str, ...] = ()
) -> nn.Module:
    """Shard a Llama: modules named in `own` by themselves in FP32, then its blocks and the rest by their policies."""
    mesh = init_device_mesh("cpu", (1,))
    wide = MixedPrecisionPolicy(param_dtype=FP32, cast_forward_inputs=False)
    for name in own:
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=wide)
    for block in model.get_submodule("model.layers").children():
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**blocks))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**(root or {})))
    return model


def conflict(model: nn.Module, plan: Plan) -> str:
    return sharding_conflict(canonical_modules(model), plan) or ""


@pytest.fixture
def model() -> nn.Module:
    return ZOO["llama"]().model


@pytest.fixture
def uniform(model: nn.Module) -> Uniform:
    profile = probe_units(model)
    return lambda choice: Plan.uniform(profile, choice)


def leaves(plan: Plan, choice: Format) -> tuple[str, ...]:
    return tuple(name for unit in plan.units if unit.format is choice for name in unit.modules)


#: what a user who wants BF16 traffic writes for blocks; inputs stay as they are
LOW: dict[str, Any] = {"param_dtype": BF16, "reduce_dtype": FP32, "cast_forward_inputs": False}


# said nothing


@pytest.mark.parametrize("choice", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("settings", [{}, {"reduce_dtype": FP32}, {"reduce_dtype": BF16}])
def test_a_policy_that_keeps_weights_is_fine(
    model: nn.Module, uniform: Uniform, choice: str, settings: dict[str, Any]
) -> None:
    assert conflict(shard(model, settings, settings), uniform(choice)) == ""


def test_weights_gathered_in_the_format_of_all_their_units_are_fine(model: nn.Module, uniform: Uniform) -> None:
    assert conflict(shard(model, LOW), uniform("bf16")) == ""


def test_a_model_that_is_not_sharded_is_fine(model: nn.Module, uniform: Uniform) -> None:
    assert conflict(DistributedDataParallel(model), uniform("fp32")) == ""


def test_a_cast_model_may_be_gathered_as_it_is_stored(model: nn.Module) -> None:
    plan = Plan.cast(model, "bf16")
    everything = {"param_dtype": BF16, "reduce_dtype": FP32}
    assert conflict(shard(model.to(BF16), everything, everything), plan) == ""


def test_casting_a_single_units_operands_is_what_the_unit_does_itself(model: nn.Module, uniform: Uniform) -> None:
    plan = uniform("bf16")
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32, output_dtype=BF16)
    fully_shard(model.get_submodule("model.layers.0.mlp"), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    assert conflict(shard(model, {}), plan) == ""


# told


@pytest.mark.parametrize(
    ("choice", "harm"),
    [("fp32", "bits it needs are lost"), ("fp16", "rounded twice"), ("fp8", "rounded twice")],
)
def test_weights_gathered_in_another_format(model: nn.Module, uniform: Uniform, choice: str, harm: str) -> None:
    plan = uniform(choice)
    said = conflict(shard(model, LOW), plan)
    assert harm in said and "fully_shard of 'model.layers.0'" in said and "param_dtype=torch.bfloat16" in said
    assert "MixedPrecisionPolicy(reduce_dtype=torch.float32) without param_dtype" in said


def test_the_mend_it_names_is_taken(model: nn.Module, uniform: Uniform) -> None:
    plan = uniform("bf16")
    first = plan.units[next(i for i, u in enumerate(plan.units) if u.role == "ffn")]
    plan = plan.replace({first.name: "fp32"})
    said = conflict(shard(ZOO["llama"]().model, LOW), plan)
    assert "1 unit computes in another format" in said
    assert all(name in said for name in first.modules)
    assert conflict(shard(model, LOW, own=first.modules), plan) == ""


def test_a_tied_weight_is_the_heads_and_the_lookups() -> None:
    model = ZOO["llama_tied"]().model
    plan = Plan.uniform(model, "bf16")  # the lookup stays in FP32
    assert "embed_tokens" in conflict(shard(model, {}, LOW), plan)


def test_bf16_weights_give_fp8_units_other_numbers() -> None:
    """Why FP8 units mind: scales and ties of FP32 weights differ from those of weights rounded to BF16."""
    from autoprec.formats import Fp8Recipe
    from autoprec.runtime.fp8 import fp8_emulated_matmul

    x, weight = torch.randn(16, 64), torch.randn(64, 64)
    results = [fp8_emulated_matmul(x, w, Fp8Recipe.TENSORWISE) for w in (weight, weight.to(BF16).float())]
    assert not torch.equal(*results)


def test_inputs_cast_on_the_way_into_a_block(model: nn.Module, uniform: Uniform) -> None:
    """FSDP2's own default: the stream enters every block in BF16, where the plan keeps it in FP32."""
    said = conflict(shard(model, {"param_dtype": BF16, "reduce_dtype": FP32}), uniform("bf16"))
    assert "residual stream" in said and "is fp32" in said and "cast_forward_inputs=False" in said


@pytest.mark.parametrize(("settings", "root"), [({"output_dtype": BF16}, {}), ({}, {"output_dtype": BF16})])
def test_outputs_cast_on_the_way_out(
    model: nn.Module, uniform: Uniform, settings: dict[str, Any], root: dict[str, Any]
) -> None:
    said = conflict(shard(model, settings, root), uniform("bf16"))
    assert "output_dtype=torch.bfloat16" in said and "leave output_dtype out" in said


def test_float_inputs_of_a_model_that_reads_values(model: nn.Module) -> None:
    vision = ZOO["vit"]().model
    plan = Plan.uniform(vision, "bf16").replace({u.name: "fp32" for u in probe_units(vision).units if u.role == "conv"})
    mesh = init_device_mesh("cpu", (1,))
    stem = next(n for u in plan.units if u.format is Format.FP32 for n in u.modules)
    wide = MixedPrecisionPolicy(param_dtype=FP32, cast_forward_inputs=False)
    fully_shard(vision.get_submodule(stem), mesh=mesh, mp_policy=wide)
    fully_shard(vision, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    assert "float inputs" in conflict(vision, plan)


def test_a_stream_in_bf16_does_not_take_a_widening(model: nn.Module) -> None:
    plan = Plan.cast(model, "bf16")
    assert "without autocast" in conflict(shard(model.to(BF16), {"param_dtype": FP32}), plan)


def test_fp32_shards_are_no_place_for_a_plan_that_stores_bf16(model: nn.Module) -> None:
    plan = Plan.cast(model, "bf16")
    assert "Apply the plan before fully_shard" in conflict(shard(model, {}), plan)


def test_ddp_around_fp32_weights_is_no_place_for_a_plan_that_stores_bf16(model: nn.Module) -> None:
    plan = Plan.cast(model, "bf16")
    said = sharding_conflict(dict(DistributedDataParallel(model).named_modules()), plan) or ""
    assert "gradients would not be averaged" in said and "before DistributedDataParallel" in said
    low = DistributedDataParallel(ZOO["llama"]().model.to(BF16))
    assert sharding_conflict(dict(low.named_modules()), plan) is None


def test_ddp_is_found_around_the_model_it_wraps(model: nn.Module) -> None:
    plan, wrapper = Plan.cast(model, "bf16"), DistributedDataParallel(model)
    with pytest.raises(PlanError, match="gradients would not be averaged"):
        apply(wrapper.module, plan)
    apply(model, Plan.uniform(model, "bf16")).remove()  # changes nothing that the wrapper holds


def test_a_plan_that_stores_low_stays_where_the_model_was_wrapped_since(model: nn.Module) -> None:
    ids = torch.arange(8)[None]
    handle = apply(model, Plan.cast(model, "bf16"))
    wrapper = DistributedDataParallel(model)
    wrapper(ids).logits.float().sum().backward()
    with pytest.raises(PlanError, match="DistributedDataParallel was put around it since"):
        handle.remove()
    assert model.get_submodule("lm_head").weight.dtype is BF16
    wrapper(ids)  # the plan is in force still
    del wrapper
    handle.remove()
    assert model.get_submodule("lm_head").weight.dtype is FP32


def test_a_plan_that_stores_low_stays_where_the_model_was_sharded_since(model: nn.Module) -> None:
    handle = apply(model, Plan.cast(model, "bf16"))
    shard(model, {})
    model(torch.arange(8)[None]).logits.float().sum().backward()
    with pytest.raises(PlanError, match=r"parameters were replaced since .*Remove the plan before wrapping"):
        handle.remove()
    model(torch.arange(8)[None])


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_fsdp1_with_flat_weights_is_told_before_all_else(model: nn.Module, uniform: Uniform) -> None:
    plan = uniform("bf16")
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(PlanError, match="pass use_orig_params=True"):
        apply(flat, plan)


def test_modules_sharded_as_one_group(model: nn.Module, uniform: Uniform) -> None:
    mesh = init_device_mesh("cpu", (1,))
    members = [model.get_submodule(name) for name in ("model.norm", "lm_head")]
    fully_shard(members, mesh=mesh, mp_policy=MixedPrecisionPolicy(**LOW))
    fully_shard(model, mesh=mesh)
    assert conflict(model, uniform("bf16")) == ""
    assert "lm_head" in conflict(model, uniform("fp32"))


def test_ddps_private_mixed_precision(model: nn.Module, uniform: Uniform) -> None:
    lowered = DistributedDataParallel(model, mixed_precision=_MixedPrecision(param_dtype=BF16, reduce_dtype=FP32))
    for modules in (dict(lowered.named_modules()), canonical_modules(lowered)):
        assert "leave precision to the plan" in (sharding_conflict(modules, uniform("bf16")) or "")


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("given", [None, MixedPrecision(), MixedPrecision(param_dtype=BF16)])
def test_fsdp1(model: nn.Module, uniform: Uniform, given: MixedPrecision | None) -> None:
    plan = uniform("fp32")
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, mixed_precision=given
    )
    said = sharding_conflict(dict(wrapped.named_modules()), plan) or ""
    lowered = given is not None and given.param_dtype is not None
    assert ("MixedPrecision(param_dtype=torch.bfloat16)" in said) == bool(said) == lowered
    seen: list[str] = []
    model.register_forward_pre_hook(lambda inner, _: seen.append(conflict(inner, plan)))
    wrapped(torch.arange(8)[None])
    # inside its forward the wrapper is out of sight, but not what it handed over
    assert ("bits it needs are lost" in seen[0]) == bool(seen[0]) == lowered


def test_what_is_told_is_so(model: nn.Module, uniform: Uniform) -> None:
    """Weights of an FP32 unit really arrive in BF16 under the policy that is refused."""
    seen: list[Tensor] = []
    leaf = model.get_submodule("model.layers.0.mlp.up_proj")
    leaf.register_forward_pre_hook(lambda inner, _: seen.append(inner.weight))
    sharded = shard(model, LOW)
    assert conflict(sharded, uniform("fp32"))
    with torch.autocast("cpu", BF16, cache_enabled=False):
        sharded(torch.arange(8)[None])
    assert seen[0].dtype is BF16
