"""Plans as text for other programs; one file a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autoprec.errors import UsageError, closest
from autoprec.exporters import (
    accelerate,
    ddp,
    deepspeed,
    fsdp2,
    jax,
    keras,
    lightning,
    onnx,
    swift,
    tensorrt,
    torchao,
    torchtitan,
    transformer_engine,
)
from autoprec.exporters.compiled import compiled_source
from autoprec.exporters.limits import ANY, Limits, check_limits, nearest_plan
from autoprec.exporters.python import python_source
from autoprec.exporters.transformers import trainer_source
from autoprec.plan import Plan

__all__ = ["TARGETS", "Target", "export", "nearest"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan can be written as."""

    write: Callable[[Plan, str], str]
    limits: Limits = ANY


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "python": Target(python_source),
        "transformers": Target(trainer_source),
        "accelerate": Target(accelerate.accelerate_config, accelerate.LIMITS),
        "lightning": Target(lightning.lightning_source, lightning.LIMITS),
        "ddp": Target(ddp.ddp_source, ddp.LIMITS),
        "fsdp2": Target(fsdp2.fsdp2_source, fsdp2.LIMITS),
        "torch-compile": Target(compiled_source),
        "torchao": Target(torchao.torchao_source, torchao.LIMITS),
        "onnx": Target(onnx.onnx_source, onnx.LIMITS),
        "tensorrt": Target(tensorrt.tensorrt_source, tensorrt.LIMITS),
        "keras": Target(keras.keras_source, keras.LIMITS),
        "jax": Target(jax.jax_dtypes, jax.LIMITS),
        "deepspeed": Target(deepspeed.deepspeed_source, deepspeed.LIMITS),
        "swift": Target(swift.swift_source, swift.LIMITS),
        "torchtitan": Target(torchtitan.torchtitan_source, torchtitan.LIMITS),
        "transformer-engine": Target(transformer_engine.transformer_engine_source, transformer_engine.LIMITS),
    }
)


def export(plan: Plan, target: str, plan_path: str = "plan.json") -> str:
    """Return the plan as the text of `target`: a Python program or plugin, or a configuration file.

    Texts whose program calls `autoprec.apply` do not hold the plan: they read it from `plan_path` when they run.
    What each target was checked for is in docs/exports.md.

    Raises:
        UsageError: an unknown target.
        ExportError: the target cannot express the plan; `nearest(plan, target)` is the closest one that it can.
    """
    chosen = _target(target)
    check_limits(plan, chosen.limits, target)
    return chosen.write(plan, plan_path)


def nearest(plan: Plan, target: str) -> Plan:
    """Return the plan itself where `target` can express it, else the closest one that it can, without evidence.

    It is another plan, with another drop and another step time: verify it.

    Raises:
        UsageError: an unknown target.
    """
    return nearest_plan(plan, _target(target).limits)


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UsageError(f"'{name}' is no export target; choose one of {', '.join(TARGETS)}{closest(name, TARGETS)}")
    return TARGETS[name]
