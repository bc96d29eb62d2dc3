"""The operations of a whole model in the order they run: what stands before, in and behind its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autoprec.predict.blocks import Op, activation, attention, ffn, linear, norm
from autoprec.predict.setup import Loss
from autoprec.predict.shape import FP32_BYTES, Place, Shape
from autoprec.records import Leaf, Role, Unit

__all__ = ["Part", "operations"]


@dataclass(frozen=True, slots=True)
class Part:
    """The operations of one unit in the order they run, and the block that it is part of."""

    unit: str
    block: str | None
    ops: tuple[Op, ...]


def operations(shape: Shape) -> list[Part]:
    """Return the operations in the order of the forward; equal units share theirs, worked out once."""
    known: dict[object, tuple[Op, ...]] = {}
    parts = []
    for unit in shape.profile.units:
        key, place = shape.likeness(unit), shape.place(unit)
        if key not in known:
            known[key] = tuple(_operations(shape, unit, place))
        parts.append(Part(place.unit, place.block, known[key]))
    if not any(unit.role is Role.LM_HEAD for unit in shape.profile.units):
        last = parts[-1]
        parts[-1] = replace(last, ops=(*last.ops, norm(shape, shape.place(shape.profile.units[-1]))))
    return parts


def _operations(shape: Shape, unit: Unit, place: Place) -> Iterator[Op]:
    if unit.role is Role.ATTENTION:
        yield from attention(shape, unit, place)
    elif unit.role is Role.FFN:
        yield from ffn(shape, unit, place)
    elif unit.role is Role.LM_HEAD:
        yield from _head(shape, unit, place)
    elif unit.role in (Role.EMBEDDING, Role.CONV):
        yield _stem(shape, unit, place)
    else:
        yield from _other(shape, unit, place)


def _stem(shape: Shape, unit: Unit, place: Place) -> Op:
    """Return lookups or a convolution stem: their gradients are dense, as large as the weights."""
    leaves = [shape.leaves[m] for m in unit.modules if m in shape.leaves]
    gradient = temporary = 0.0
    if shape.full and shape.setup.trains:
        for leaf in leaves:
            fresh = shape.fresh_parameters(leaf)
            gradient += fresh * shape.gradient_width
            if not fresh:
                temporary += _added(shape) * leaf.parameters * shape.gradient_width
    embedded = shape.stream_bytes
    return Op(
        gradient=gradient,
        forward=2 * embedded,
        backward=embedded + temporary,
    )


def _added(shape: Shape) -> int:
    """Return how many copies it takes to add a lookup's gradient to that of the head that shares its storage.

    The new one; and the sum, where the head's is a view of a matmul's result, which autograd does not add to in place.
    """
    heads = [shape.place(unit) for unit in shape.profile.units if unit.role is Role.LM_HEAD]
    return 2 if any(place.compute == place.stored for place in heads) else 1


def _other(shape: Shape, unit: Unit, place: Place) -> Iterator[Op]:
    """Yield layers outside blocks: of all tokens before a head over a vocabulary, else of one token a sequence."""
    every = shape.over_vocabulary()
    tokens = place.tokens if every else shape.setup.batch_size
    for leaf in shape.linears(unit):
        yield linear(shape, unit, leaf, place, shared=False, tokens=tokens)
        if every:
            yield activation(shape, place, leaf.outputs, product=False)


def _head(shape: Shape, unit: Unit, place: Place) -> Iterator[Op]:
    """Yield the last norm and the output layer, with the loss of a vocabulary."""
    yield norm(shape, place)
    if not shape.over_vocabulary():
        kept = shape.stream_bytes if place.compute == shape.stream and shape.full else 0.0
        yield Op(activations=kept)
        for leaf in shape.linears(unit):
            yield linear(shape, unit, leaf, place, shared=False, tokens=shape.setup.batch_size)
        return
    for leaf in shape.linears(unit):
        yield from _vocabulary_head(shape, unit, leaf, place)


def _vocabulary_head(shape: Shape, unit: Unit, leaf: Leaf, place: Place) -> Iterator[Op]:
    """Yield the projection to the vocabulary and the cross-entropy."""
    tokens, compute = place.tokens, place.compute
    head = linear(shape, unit, leaf, place, shared=False)
    elements = float(tokens * leaf.outputs)
    low, wide = elements * compute, elements * FP32_BYTES
    if not shape.setup.trains:
        yield replace(head, forward_logits=low)
        return
    if shape.setup.loss is Loss.FUSED:
        # a chunk is as large as the hidden states: Liger-Kernel's rule
        chunk = elements / max(1.0, leaf.outputs / leaf.inputs)
        part = chunk * (compute + 2 * FP32_BYTES)
        yield replace(head, forward=head.forward - low + part, forward_logits=part, backward=part, backward_logits=part)
        return
    if shape.setup.loss is Loss.NARROW:  # whoever called the model holds the logits
        yield replace(head, backward_logits=low)
        yield Op(
            logits=low,
            forward=low,
            forward_logits=low,
            backward=3 * low,
            backward_logits=3 * low,
        )
        return
    # transformers widens logits to FP32 before the loss (`loss_utils.py`); log-softmax keeps its result, and its
    # backward holds the gradient of each of the two
    widened = 0.0 if compute == FP32_BYTES else wide
    yield replace(head, backward_logits=low)
    yield Op(
        logits=wide,
        forward=low + widened,
        forward_logits=low + widened,
        backward=2 * wide,
        backward_logits=2 * wide,
    )
