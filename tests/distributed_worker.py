"""One of two processes that train the models of the zoo under DDP and FSDP2 and compare with what one process gets.

Started by `tests/test_matrix_distributed.py` as `python -m distributed_worker FOLDER RANK SUITE`; writes one
line of JSON for each cell to FOLDER/rank<RANK>.jsonl: its name and what was wrong, nothing if all was equal.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ["HF_HUB_OFFLINE"] = "1"
if sys.platform == "linux":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # both processes are here; a host name may resolve to nothing

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map
from zoo import ZOO, Case

from autoprec import Plan, apply, probe_units
from autoprec.formats import Format
from autoprec.records import ModelProfile
from autoprec.runtime.identity import canonical_parameters

__all__ = ["FAST", "NIGHTLY", "Cell", "Work"]

WORLD = 2
FORMATS = ("fp32", "bf16", "fp16", "fp8", "mixed")
WRAPPERS = ("ddp", "fsdp2")
ORDERS = ("before", "after")
#: formats that a mixed plan deals to units in turn, so that neighbours differ
_DEALT = (Format.BF16, Format.FP8, Format.FP32, Format.FP16)


@dataclass(frozen=True, slots=True)
class Cell:
    """A model of the zoo under one plan, with the plan applied before or after the wrapping."""

    model: str
    plan: str
    wrapper: str
    order: str
    extra: str = ""  #: 'checkpoint' (of activations, block by block) or 'compile' (of the whole) besides

    def __str__(self) -> str:
        return "-".join(part for part in (self.model, self.plan, self.wrapper, self.order, self.extra) if part)


def _turns(extra: str = "") -> Iterator[Cell]:
    """Yield every model once under each wrapper with a mixed plan; the orders take turns."""
    for place, model in enumerate(ZOO):
        yield Cell(model, "mixed", "ddp", ORDERS[place % 2], extra)
        yield Cell(model, "mixed", "fsdp2", ORDERS[(place + 1) % 2], extra)


_COMPILED = ("llama", "gpt2", "bert", "peft_lora", "bare_gpt")

#: what a wrapper holds in FP32 cannot be stored low afterwards, which `apply` says
_CAST = (Cell("llama", "cast", "ddp", "before"), Cell("llama", "cast", "fsdp2", "before"))

FAST = (
    *_turns(),
    *_CAST,
    *(Cell("llama", p, w, o) for p in FORMATS[:-1] for w in WRAPPERS for o in ORDERS),
    *(Cell(m, "mixed", w, o, "checkpoint") for m in ("llama", "t5") for w in WRAPPERS for o in ORDERS),
)
NIGHTLY = (
    *(Cell(m, p, w, o) for m in ZOO for p in FORMATS for w in WRAPPERS for o in ORDERS),
    *_turns("checkpoint"),
    *(Cell(m, p, w, o, "compile") for m in _COMPILED for p in ("bf16", "mixed") for w in WRAPPERS for o in ORDERS),
)


def plan_of(profile: ModelProfile, name: str) -> Plan:
    """Return the uniform plan of a format; for 'mixed' one that deals all formats, for 'cast' one stored in BF16."""
    if name == "cast":
        return Plan.cast(profile, Format.BF16)
    if name != "mixed":
        return Plan.uniform(profile, name)
    formats = {}
    for place, unit in enumerate(profile.units):
        turn = (*_DEALT[place % 4 :], *_DEALT[: place % 4])
        formats[unit.name] = next(f for f in turn if f in unit.formats)
    return Plan.assign(profile, formats, ambient=Format.BF16)


def batch_of(case: Case, rank: int) -> Case:
    """Return the case with the batch of a rank: tokens (but the last, which may mark the end) and values moved on."""

    def moved(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value.roll(rank, -1) * (1 - 0.5 * rank)
        if value.dim() == 1:
            return value.roll(rank)
        return torch.cat([value[:, :-1].roll(rank, 1), value[:, -1:]], 1)

    batch = {k: moved(v) for k, v in case.batch.items()} if isinstance(case.batch, dict) else moved(case.batch)
    return Case(case.model, batch, case.loss)


@dataclass(frozen=True, slots=True)
class Step:
    """Outputs of one step, and gradients by canonical name."""

    outputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor | None]


def step(case: Case, model: nn.Module) -> Step:
    """Run forward and backward of `model`, which may be wrapped, on the case's batch."""
    output = model(**case.batch) if isinstance(case.batch, dict) else model(case.batch)
    leaves = tuple(t.detach().clone() for t in tree_flatten(output)[0] if isinstance(t, Tensor))
    case.loss(output).backward()
    return Step(leaves, {n: None if p.grad is None else whole(p.grad) for n, p in trained(model)})


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter that takes a gradient, under its first name."""
    seen: set[int] = set()
    for name, parameter in canonical_parameters(model):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that may be sharded."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


def alone(make: Callable[[], Case], plan: Plan | None, *, grouped: bool = False, again: bool = False) -> Step:
    """Return a step of the plain model on this rank's batch, its gradients averaged over ranks.

    Halving is exact, and a sum of two FP32 numbers has one rounding, whoever takes it: wrappers must give these bits.
    `grouped` is for `group_gradients`, `again` for `checkpointed`, which alone may change a bit: a gradient then comes
    in other strides, and where it does silu's backward has other bits on a CPU with AVX2 (Qwen3-Next's convolution).
    """
    case = batch_of(make(), dist.get_rank())
    if grouped:
        group_gradients(case.model)
    if plan is not None:
        apply(case.model, plan, emulate=True)
    if again:
        checkpointed(case.model)
    own = step(case, case.model)
    mean: dict[str, Tensor | None] = {}
    for name, gradient in own.gradients.items():
        mean[name] = gradient
        if gradient is not None:
            mean[name] = half = gradient / WORLD
            dist.all_reduce(half)
    return Step(own.outputs, mean)


def group_gradients(model: nn.Module) -> None:
    """Sum the gradients of a block's input inside the block before others are added, as FSDP2 and checkpointing do.

    Where a value enters several blocks, as in cross-attention, three or more terms come together: order matters.
    """
    for block in blocks(model):
        block.register_forward_pre_hook(_own_inputs, with_kwargs=True)


def _own_inputs(block: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))


def differences(got: Step, wanted: Step) -> list[str]:
    """Return what differs between two steps, bit for bit."""
    found = [] if len(got.outputs) == len(wanted.outputs) else [f"{len(got.outputs)} outputs"]
    for place, (one, other) in enumerate(zip(got.outputs, wanted.outputs, strict=False)):
        found += _difference(f"output {place}", one, other)
    if got.gradients.keys() != wanted.gradients.keys():
        found.append(f"parameters {sorted(got.gradients.keys() ^ wanted.gradients.keys())}")
    for name in got.gradients.keys() & wanted.gradients.keys():
        found += _difference(f"gradient of {name}", got.gradients[name], wanted.gradients[name])
    return found


def _difference(what: str, one: Tensor | None, other: Tensor | None) -> list[str]:
    if one is None or other is None:
        return [] if one is other else [f"{what}: {'none' if one is None else 'one'} where there should be"]
    if one.dtype is not other.dtype or one.shape != other.shape:
        return [f"{what}: {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"]
    if torch.equal(one, other):
        return []
    return [f"{what}: off by {(one.double() - other.double()).abs().max():.3g} of {other.double().abs().max():.3g}"]


# wrapping


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return what fully_shard is called on before the root: the entries of the outermost module lists."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            found += list(module)
            inside |= {id(inner) for inner in module.modules()}
    return list(dict.fromkeys(found))


def unsharded(model: nn.Module) -> set[nn.Parameter]:
    """Return parameters that FSDP2 cannot take: scalars, and packed ones, whose scales are no part of the tensor."""
    return {p for p in model.parameters() if p.dim() == 0 or not p.is_floating_point()}


def wrap(model: nn.Module, wrapper: str, mesh: DeviceMesh, unused: bool = False) -> nn.Module:
    """Wrap as a user would: DDP around it, or FSDP2 on blocks and root."""
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=unused)
    ignored = unsharded(model)
    for parameter in ignored:
        if parameter.requires_grad:  # FSDP2 leaves the gradients of what it ignores to the user
            parameter.register_post_accumulate_grad_hook(average)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def average(parameter: Tensor) -> None:
    """Average a parameter's gradient over ranks."""
    assert parameter.grad is not None
    parameter.grad /= WORLD
    dist.all_reduce(parameter.grad)


def checkpointed(model: nn.Module) -> None:
    """Let every block forget its activations and compute them again in backward."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # type: ignore[union-attr]  # the second run would find the first's keys
    inside = {id(block) for block in blocks(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in inside:
                parent.register_module(name, checkpoint_wrapper(child))


@dataclass(slots=True)
class Work:
    """What one process does, with the last reference kept for the cells that share it."""

    mesh: DeviceMesh
    _known: dict[tuple[str, str, bool, bool], tuple[Plan, Step]] = field(default_factory=dict)

    def reference(self, model: str, plan: str, grouped: bool = False, again: bool = False) -> tuple[Plan, Step]:
        """Return the plan of a cell and its step without any wrapper (`grouped` and `again` as in `alone`)."""
        key = model, plan, grouped, again
        if key not in self._known:
            made = plan_of(probe_units(ZOO[model]().model), plan)
            run = partial(alone, ZOO[model], grouped=grouped, again=again)
            wanted = run(made)
            if made.formats != {Format.FP32} and not differences(wanted, run(None)):
                raise AssertionError("the plan changes nothing, so nothing could be seen to go wrong")
            if all(known[:2] != key[:2] for known in self._known):
                self._known.clear()  # cells of one reference are neighbours
            self._known[key] = made, wanted
        return self._known[key]

    def cell(self, cell: Cell) -> list[str]:
        """Run a cell and return what differs from one process."""
        again = cell.extra == "checkpoint"
        plan, wanted = self.reference(cell.model, cell.plan, grouped=cell.wrapper == "fsdp2", again=again)
        case = batch_of(ZOO[cell.model](), dist.get_rank())
        model = case.model
        unused = any(gradient is None for gradient in wanted.gradients.values())
        if cell.order == "before":
            apply(model, plan, emulate=True)
        if cell.extra == "checkpoint":
            checkpointed(model)
        model = wrap(model, cell.wrapper, self.mesh, unused)
        if cell.order == "after":
            apply(model, plan, emulate=True)
        run = cast(nn.Module, torch.compile(model, backend="aot_eager")) if cell.extra == "compile" else model
        return differences(step(case, run), wanted)


def main(folder: Path, rank: int, suite: str) -> None:
    """Run all cells of a suite, and with the fast one all scenarios, and write a line for each."""
    from distributed_scenarios import SCENARIOS

    torch.set_num_threads(1)
    meeting, patience = f"file://{folder / 'store'}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=patience)
    work = Work(init_device_mesh("cpu", (WORLD,)))
    tasks = {str(c): partial(work.cell, c) for c in (FAST if suite == "fast" else NIGHTLY)}
    if suite == "fast":
        tasks |= {name: partial(scenario, work) for name, scenario in SCENARIOS.items()}
    with (folder / f"rank{rank}.jsonl").open("w") as lines:
        for name, task in tasks.items():
            dist.barrier()
            torch.compiler.reset()
            try:
                wrong = task()
            except Exception:
                wrong = [traceback.format_exc()]
            lines.write(json.dumps([name, wrong]) + "\n")
            lines.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
