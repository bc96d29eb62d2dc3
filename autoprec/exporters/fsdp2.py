"""Target `fsdp2`: a training program for `torchrun` that shards a model with `fully_shard` and keeps its plan.

FSDP2's mixed precision casts whole sharded groups. Two ways leave a plan what it is:

- all weights gathered in FP32, gradients reduced in FP32; the plan's scopes cast, as on one device;
- `low_gather`: in each block, the leaves of the commonest 16-bit format are gathered in it, which halves what is
  sent for them, and rounds what the plan would round anyway. Everything else in a block (units of other formats,
  norms, biases of others) is a group of its own, gathered in FP32; embeddings and head, which may be tied, stay with
  the root's.

Both give the numbers of one process, gradients averaged, bit for bit.
"""

from __future__ import annotations

from collections import Counter

from autoprec.exporters.ddp import START
from autoprec.exporters.limits import Limits
from autoprec.exporters.loops import training_loop
from autoprec.exporters.summary import opening, source_list
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Role

__all__ = ["LIMITS", "fsdp2_source"]

LIMITS = Limits(inference="it is written as a training program; use 'python' or 'transformers'")

_NOTES = """
torchrun --nproc-per-node N your_script.py, which calls: device = start(); model = wrap(model, device); the optimizer
is made from the sharded model; train(model, batches of this process, optimizer); finish().
"""

_IMPORTS = """
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
"""

_WRAP = '''
#: nothing is cast by FSDP2: weights are gathered in FP32, and the plan casts what it wants
PLAIN = MixedPrecisionPolicy(reduce_dtype=torch.float32)
#: for leaves that the plan computes in {low}: gathered in it, gradients reduced in FP32, inputs left alone
LOW = MixedPrecisionPolicy(param_dtype={dtype}, reduce_dtype=torch.float32, cast_forward_inputs=False)


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the entries of the outermost module lists, which are sharded one by one."""
    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            found += list(module)
            inside |= {{id(inner) for inner in module.modules()}}
    return list(dict.fromkeys(found))


def wrap(model: torch.nn.Module, device: torch.device, low_gather: bool = False) -> torch.nn.Module:
    """Put the plan in force on a model with FP32 weights, then shard it, in place.

    With `low_gather` the leaves in {low} are gathered in it, which halves what is sent for them. The numbers are the
    same.
    """
    model.to(device)
    autoprec.apply(model, autoprec.Plan.load(PLAN))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = {{id(module) for name, module in model.named_modules() if name in LOW_LEAVES}}
    for block in blocks(model):
        if lowered := [m for m in block.modules() if low_gather and id(m) in low]:
            fully_shard(lowered, mesh=mesh, mp_policy=LOW)
        fully_shard(block, mesh=mesh, mp_policy=PLAIN)
    return fully_shard(model, mesh=mesh, mp_policy=PLAIN)
'''


def fsdp2_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `start`, `wrap`, `train` and `finish`."""
    low = _commonest(plan)
    leaves = [
        module
        for unit in plan.units
        if unit.format is low and unit.role in (Role.ATTENTION, Role.FFN)
        for module in unit.modules
    ]
    dtype = f"torch.{'float16' if low is Format.FP16 else 'bfloat16'}"
    wrap = source_list("\nLOW_LEAVES", leaves) + _WRAP.format(low=low, dtype=dtype)
    text = opening(plan, "Train", _NOTES, _IMPORTS, plan_path) + START + wrap + training_loop(plan)
    return text if plan.grad_scaler is None else text.replace(*_ONE_SCALE)


#: shards overflow one by one, and a process that skipped a step alone would leave the others
_ONE_SCALE = (
    "        scaler.unscale_(optimizer)  # so that the norm below is that of the true gradient\n",
    "        scaler.unscale_(optimizer)  # so that the norm below is that of the true gradient\n"
    "        for found in scaler._found_inf_per_device(optimizer).values():\n"
    "            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # all skip this step, or none does\n",
)


def _commonest(plan: Plan) -> Format:
    """Return the 16-bit format that most units have; BF16 where none has any."""
    counts = Counter(unit.format for unit in plan.units if unit.format in (Format.BF16, Format.FP16))
    return counts.most_common(1)[0][0] if counts else Format.BF16
