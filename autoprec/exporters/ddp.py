"""Target `ddp`: a training program for `torchrun`, with a plan inside DistributedDataParallel.

DDP averages gradients in the format they are held in. A plan keeps master weights, so that is FP32, whatever units
compute in; a plan that stores weights low (`Plan.cast`) has its gradients averaged in that format.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.loops import training_loop
from autoprec.exporters.summary import opening
from autoprec.plan import Plan

__all__ = ["LIMITS", "START", "ddp_source"]

LIMITS = Limits(inference="it is written as a training program; use 'python' or 'transformers'")

_NOTES = """
torchrun --nproc-per-node N your_script.py, which calls: device = start(); model = wrap(model, device); the optimizer
is made from the wrapped model; train(model, batches of this process, optimizer); finish().
"""

_IMPORTS = """
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
"""

#: shared with fsdp2
START = '''

def start() -> torch.device:
    """Join the processes that torchrun started, and return the device of this one."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def finish() -> None:
    """Leave the processes."""
    dist.destroy_process_group()
'''

_WRAP = '''

def wrap(model: torch.nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """Put the plan in force on a model with FP32 weights, then wrap it; DDP's own mixed_precision must stay unset."""
    model.to(device)
    autoprec.apply(model, autoprec.Plan.load(PLAN))
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)
'''


def ddp_source(plan: Plan, plan_path: str) -> str:
    """Return a Python module with `start`, `wrap`, `train` and `finish`."""
    return opening(plan, "Train", _NOTES, _IMPORTS, plan_path) + START + _WRAP + training_loop(plan)
