"""`apply`: put a plan in force on a model, in place, and take it off again.

Everything is checked first, the swaps are decided (`layout`), then done at once or not at all.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from autoprec.errors import PlanError, UsageError
from autoprec.plan import Plan
from autoprec.runtime.checks import check_device, check_fits, check_forwards, check_leaves, check_trained, lost_updates
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.integrity import check_once, note
from autoprec.runtime.layout import Swap, swaps_of
from autoprec.runtime.scope import Scope, enter_scope, leave_scope
from autoprec.runtime.sharding import ddp_around, flattened, sharding_conflict
from autoprec.runtime.storage import LoweredStorage, Storage, lower_storage
from autoprec.runtime.switches import COMPILED_BACKWARD_AS_EAGER, FAST_ATTENTION_OFF
from autoprec.runtime.tf32 import tf32_set

__all__ = ["Applied", "applied", "apply"]


@dataclass(frozen=True, slots=True, eq=False)
class _Decided:
    """A plan with all that puts it in force on one model, nothing of it done yet."""

    plan: Plan
    swaps: tuple[Swap, ...]
    storage: LoweredStorage | None


@dataclass(eq=False)
class Applied:
    """A plan in force on a model; `remove()` takes it off and restores the model and every global switch."""

    model: nn.Module
    emulate: bool
    storage: Storage
    _modules: Mapping[str, nn.Module]
    _decided: _Decided
    _switches: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _attached: bool = False

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._decided.plan

    def change(self, plan: Plan) -> None:
        """Put another plan of the same model in force instead, also under a Trainer, DDP or an optimizer made since.

        Compiled code is compiled anew where a unit changed. On an error the old plan stays in force.

        Raises:
            PlanError, DeviceError: as `apply`; or the plan in force was removed.
        """
        self._check_attached()
        before = self._decided
        if plan.model.fingerprint != before.plan.model.fingerprint:
            raise PlanError(f"the plan in force is of {before.plan.model.id}, the one given of {plan.model.id}")
        self._check_storage()
        self._detach()
        try:
            # wrappers hold the old scopes' forward, which finds a new scope of the same kind in its place
            known = {(swap.module, swap.kind) for swap in before.swaps}
            self._decided = _decide(self.model, plan, self._modules, self.emulate, self.storage, known)
            self._attach()
        except BaseException:
            self._decided = before
            self._attach()
            raise

    def remove(self) -> None:
        """Restore classes, storage and switches; what training changed meanwhile is kept.

        Raises:
            PlanError: the plan was removed before; or it stores weights low and the model was sharded or wrapped since.
        """
        self._check_attached()
        self._check_storage()
        self._detach()

    def settle(self) -> None:
        """Free the FP32 originals of weights that are stored low; `remove()` then leaves these weights as they are."""
        self._check_attached()
        if self._decided.storage is not None:
            self._decided.storage.settle()

    @property
    def originals(self) -> Mapping[Tensor, Tensor]:
        """The FP32 bits of each parameter that is stored low, for `runtime.optimizers.MasterWeights` to go on with."""
        storage = self._decided.storage
        return {} if storage is None else storage.originals()

    def _check_attached(self) -> None:
        if not self._attached:
            raise PlanError("this plan is not in force any more: it was removed before")

    def _check_storage(self) -> None:
        """Check that the weights a plan stores low are where it left them, so that their FP32 bits can come back."""
        storage = self._decided.storage
        if storage is None:
            return
        what = None
        if name := storage.replaced(self.model):
            what = f"its parameters were replaced since (first '{name}'), as fully_shard does"
        elif ddp_around(self._modules[""]):
            what = "DistributedDataParallel was put around it since, and holds them as they are"
        if what:
            raise PlanError(
                f"the plan stores the weights of this {type(self.model).__name__} in {self.plan.stream}, and {what}: "
                "their fp32 bits cannot be put back. Remove the plan before wrapping the model, or keep it and build "
                "a new model from the state_dict."
            )

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run a block with the plan taken off, as when measuring a reference in between.

        Raises:
            PlanError: the block changed the model so that the plan is not in force on it any more.
        """
        self._detach()
        try:
            yield
        finally:
            self._attach()
        check_once(self._modules[""])  # now, and not in the next step, which may be timed

    def _attach(self) -> None:
        try:
            swaps, storage = self._decided.swaps, self._decided.storage
            if storage is not None:
                storage.lower()
            for swap in swaps:
                enter_scope(self._modules[swap.module], swap.kind, name=swap.module, **swap.settings)
            note(self._modules, self.plan, {swap.module: swap.kind.__name__ for swap in swaps})
            self._switches.enter_context(COMPILED_BACKWARD_AS_EAGER)
            if any(isinstance(m, nn.MultiheadAttention) for m in self._modules.values()):
                self._switches.enter_context(FAST_ATTENTION_OFF)
            self._switches.enter_context(tf32_set(self.plan.tf32, next(iter(_devices(self.model)), "cpu")))
        except BaseException:
            self._detach()  # all or nothing, also on Ctrl-C
            raise
        self._attached = True

    def _detach(self) -> None:
        self._switches.close()
        for swap in self._decided.swaps:
            leave_scope(self._modules[swap.module])
        if self._decided.storage is not None:
            self._decided.storage.restore()
        self._attached = False


def apply(model: nn.Module, plan: Plan, emulate: bool = False, *, storage: Storage | str = Storage.FP32) -> Applied:
    """Put `plan` in force on `model`, in place, and return the handle that removes it.

    Weights stay FP32 (master weights) unless the plan's stream is lower, as in `Plan.cast`. Parameters, names and
    the module objects stay the same, so an optimizer made before or after sees the same parameters.

    Args:
        model: the model the plan was made for, wrapped or not; weights in FP32 where the plan has FP32 units or trains.
        plan: what each unit computes in.
        emulate: compute FP8 units with FP8's rounding in FP32 arithmetic where the device has no FP8. Same numbers
            up to the order of summation, none of the speed. A plan made for a CUDA device, on another, runs softmax,
            norms and losses in FP32 as CUDA's autocast does, and FP32 products in TF32 where the plan has it on.
        storage: how weights of low units are stored meanwhile: `fp32`; `bf16` for inference, without a cast at each
            call; `bf16-master` or `bf16-stochastic` for training, with the optimizers of `runtime.optimizers`. No
            forward's result changes by a bit.

    Warns:
        UserWarning: trained weights are stored low without copies, as `Plan.cast` does, so that small updates are lost.

    Raises:
        UsageError: no such storage.
        PlanError: the plan does not fit the model, is in force already, or asks for what its weights cannot give.
        DeviceError: the device lacks a format of the plan and `emulate` is off.
    """
    modules = canonical_modules(model)
    if flat := flattened(model):
        raise PlanError(flat)
    check_fits(model, plan, modules)
    kept = _storage(storage)
    if warning := lost_updates(model, plan):
        warnings.warn(warning, stacklevel=2)
    decided = _decide(model, plan, modules, emulate, kept)
    handle = Applied(model=model, emulate=emulate, storage=kept, _modules=modules, _decided=decided)
    handle._attach()
    return handle


@contextlib.contextmanager
def applied(
    model: nn.Module, plan: Plan, emulate: bool = False, *, storage: Storage | str = Storage.FP32
) -> Iterator[Applied]:
    """Put `plan` in force for the length of a `with` block.

    Args:
        model: as in `apply`, as are all others.
        plan: what its units compute in.
        emulate: formats that this device lacks get their rounding, and none of their speed.
        storage: how weights are kept meanwhile.

    Raises:
        PlanError, DeviceError: as in `apply`, before anything is changed.
    """
    handle = apply(model, plan, emulate, storage=storage)
    try:
        yield handle
    finally:
        if handle._attached:
            handle.remove()


def _decide(
    model: nn.Module,
    plan: Plan,
    modules: Mapping[str, nn.Module],
    emulate: bool,
    storage: Storage,
    known: Collection[tuple[str, type[Scope]]] = (),
) -> _Decided:
    """Check what depends on formats and return what is to be done; `known` scopes may have a wrapped forward."""
    if storage in (Storage.FP32, Storage.BF16):
        check_trained(model, plan)
    check_leaves(plan, modules)
    as_cuda = emulate and plan.device.kind == "cuda" and "cuda" not in _devices(model)
    swaps = tuple(swaps_of(plan, modules, check_device(model, plan, modules, emulate), as_cuda=as_cuda))
    check_forwards([swap for swap in swaps if (swap.module, swap.kind) not in known], modules)
    if conflict := sharding_conflict(dict(model.named_modules()), plan):  # wrappers among them
        raise PlanError(conflict)
    return _Decided(plan, swaps, lower_storage(model, plan, modules, storage))


def _storage(choice: Storage | str) -> Storage:
    try:
        return Storage(choice)
    except ValueError:
        raise UsageError(f"storage '{choice}' is not known; choose one of {', '.join(Storage)}") from None


def _devices(model: nn.Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.device.type for p in model.parameters()))
