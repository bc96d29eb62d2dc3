"""`audit`: one step of a model with a plan in force, and what each of its operators really computed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from autoprec.errors import PlanError
from autoprec.plan import Plan
from autoprec.records import AuditReport
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.integrity import not_in_force
from autoprec.runtime.kernels import kernels_of
from autoprec.runtime.recording import DotProducts, Recorder

__all__ = ["audit"]


def audit(
    model: nn.Module,
    plan: Plan,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    backward: bool = True,
    run: Callable[[], Any] | None = None,
    in_force: bool = True,
) -> AuditReport:
    """Run one step of `model` with `plan` in force and return what each operator of each unit ran in.

    Weights, gradients, buffers and random state are left as they were. A compiled model is run eagerly. Steps are
    slower than plain ones: times are for comparing casts with each other.

    Args:
        model: the model a plan was applied to, wrapped or not.
        plan: the plan in force.
        batch: keyword arguments (a dict), arguments (a tuple) or one tensor.
        loss: output to a scalar; else the output's `loss`, else the mean square of its tensors.
        backward: also audit the backward pass.
        run: replaces the call of the model; returns its output.
        in_force: False audits a model that something else gave its formats, such as torchao's converter, against
            the plan.

    Raises:
        PlanError: the plan is not in force on the model.
    """
    problem = not_in_force(model, plan) if in_force else None
    if problem is not None:
        raise PlanError(f"cannot audit: {problem}")
    modules = canonical_modules(model)
    seen = Recorder(plan, modules)
    call = run or (lambda: _call(model, batch))
    devices = [next(modules[""].parameters()).device] if next(modules[""].parameters()).is_cuda else []

    def step() -> None:
        scalar = (loss or _scalar)(call())
        if backward:
            scalar.backward()

    with (
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(devices=devices),
        _kept(modules[""]),
        torch.set_grad_enabled(backward),
    ):
        started = time.perf_counter()
        with _followed(seen), DotProducts(seen), seen:
            step()
        ms = (time.perf_counter() - started) * 1e3
        owners = {leaf: unit.name for leaf, unit in seen.leaves.items()}
        return seen.report(backward, ms, kernels_of(step, owners) if devices else ())


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _scalar(output: Any) -> Tensor:
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    found = [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, Mapping) else output)
    floats = [t.float().square().mean() for t in found if isinstance(t, Tensor) and t.is_floating_point()]
    if not floats:
        raise PlanError("cannot audit: the model's output holds no floating tensor; pass loss=, output to a scalar")
    return torch.stack(floats).sum()


@contextmanager
def _kept(root: nn.Module) -> Iterator[None]:
    gradients = [(p, p.grad) for p in root.parameters()]
    buffers = [(b, b.clone()) for b in root.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _followed(seen: Recorder) -> Iterator[None]:
    """Let the recorder know which module runs, by hooks that are put on no module."""
    hooks = [
        register_module_forward_pre_hook(lambda module, args: seen.stack.append(module)),
        register_module_forward_hook(lambda module, args, output: seen.left(module, output), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
