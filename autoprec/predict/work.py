"""Every kernel of one step of a model: forward, backward and optimizer step, unit by unit.

The list follows how transformers writes its blocks and what autograd and autocast add, as `blocks.py` does for memory.
Bytes an element are those of PyTorch's own kernels: `native_dropout_backward` is two products and a cast, a softmax's
backward forms the product of gradient and result first, a layer norm's backward reads its inputs twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoprec.predict.kernels import Kernel, Kind, Phase, move
from autoprec.predict.setup import Loss, Optimizer, StatePolicy
from autoprec.predict.shape import FP32_BYTES, Place
from autoprec.predict.workattention import attention
from autoprec.predict.workparts import Work, ffn, linear, norm, other
from autoprec.records import Leaf, LeafKind, Role, Unit

__all__ = ["rest_kernels", "unit_kernels"]

#: bytes an optimizer step moves a parameter, beside weight and gradient read and weight written: its moments
_MOMENTS = {
    Optimizer.ADAMW: 16.0,
    Optimizer.ADAMW_FOREACH: 48.0,  # a temporary list between its dozen passes
    Optimizer.ADAMW_8BIT: 4.0,
    Optimizer.ADAMW_BF16_SR: 8.0,
    Optimizer.SGD: 0.0,
    Optimizer.SGD_MOMENTUM: 8.0,
}
#: tensors that one launch of a multi-tensor kernel takes (aten/src/ATen/native/cuda/MultiTensorApply.cuh)
_TENSORS_A_LAUNCH = 30


def unit_kernels(work: Work, unit: Unit) -> Iterator[Kernel]:
    """Yield the kernels of a unit's forward and backward, with the norm before it and the sum behind it."""
    shape = work.shape
    place = shape.place(unit)
    if unit.role is Role.ATTENTION:
        yield from attention(work, unit, place)
    elif unit.role is Role.FFN:
        yield from ffn(work, unit, place)
    elif unit.role is Role.LM_HEAD:
        yield from _head(work, unit, place)
    elif unit.role in (Role.EMBEDDING, Role.CONV):
        yield from _stem(work, unit, place)
    else:
        yield from other(work, unit, place)


def rest_kernels(work: Work) -> Iterator[Kernel]:
    """Yield what belongs to no unit: the last norm of a model without head, and the optimizer step."""
    shape = work.shape
    if not any(unit.role is Role.LM_HEAD for unit in shape.profile.units):
        yield from norm(work, shape.place(shape.profile.units[-1]))
    setup = shape.setup
    if not setup.trains:
        return
    trained = shape.profile.parameters if shape.full else sum(shape.trained(u, 0) for u in shape.profile.units)
    wide = FP32_BYTES if not shape.full or setup.policy is StatePolicy.FP32 else 2
    if setup.accumulation > 1 or work.accumulates:
        yield move(Kind.ACCUMULATE, Phase.BACKWARD, 3.0 * wide * trained, launches=len(shape.profile.leaves))
    if setup.optimizer is None:
        return
    master = 8.0 if setup.policy is StatePolicy.MIXED_MASTER and shape.full else 0.0
    moved = (3 * wide + _MOMENTS[setup.optimizer] + master) * trained / max(1, setup.accumulation)
    tensors = 2 * len(shape.profile.leaves)
    yield move(Kind.OPTIMIZER, Phase.OPTIMIZER, moved, launches=1 + tensors / _TENSORS_A_LAUNCH)


def _stem(work: Work, unit: Unit, place: Place) -> Iterator[Kernel]:
    """Yield lookups or a convolution stem; a lookup's gradient is dense, as large as its table."""
    shape = work.shape
    leaves = [shape.leaves[m] for m in unit.modules if m in shape.leaves]
    for leaf in leaves:
        if leaf.kind is LeafKind.CONV:
            yield from linear(work, leaf, place, own_input=True)
    tables = [leaf for leaf in leaves if leaf.kind is LeafKind.EMBEDDING]
    stream = shape.stream_bytes
    if tables:
        yield move(Kind.EMBEDDING, Phase.FORWARD, 3 * len(tables) * stream, 2 * stream, launches=2 * len(tables))
    if shape.setup.trains and shape.full:
        width = shape.gradient_width
        dense = sum(float(leaf.inputs * leaf.outputs * width) for leaf in tables)
        shared = sum(0 if shape.fresh_parameters(leaf) else leaf.inputs * leaf.outputs for leaf in tables)
        yield move(
            Kind.EMBEDDING, Phase.BACKWARD, 2 * dense + 3.0 * width * shared + 2 * stream, launches=3 * len(tables)
        )


def _head(work: Work, unit: Unit, place: Place) -> Iterator[Kernel]:
    """Yield the last norm, the output layer and the loss of a vocabulary."""
    shape = work.shape
    yield from norm(work, place)
    if not shape.over_vocabulary():
        few = shape.setup.batch_size
        for leaf in shape.linears(unit):
            yield from linear(work, leaf, place, own_input=True, tokens=few, name=unit.name)
        return
    for leaf in shape.linears(unit):
        yield from linear(work, leaf, place, own_input=True, name=unit.name)
        if shape.setup.trains and work.with_loss:
            yield from _loss(work, leaf, place)


def _loss(work: Work, leaf: Leaf, place: Place) -> Iterator[Kernel]:
    """Yield the cross-entropy of logits: widened, shifted, log-softmax, and back."""
    shape = work.shape
    elements = float(place.tokens * leaf.outputs)
    c = place.compute
    if shape.setup.loss is Loss.FUSED:
        yield move(Kind.LOSS, Phase.FORWARD, elements * 2 * c, launches=8)
        return
    widened = (c + FP32_BYTES) if c != FP32_BYTES else 0
    yield move(Kind.LOSS, Phase.FORWARD, elements * (widened + 2 * FP32_BYTES), elements * 2 * c, launches=4)
    back = 4 * FP32_BYTES + widened
    yield move(Kind.LOSS, Phase.BACKWARD, elements * back, elements * (2 * c), launches=4)
