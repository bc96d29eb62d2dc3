"""The highest memory of a step: forward, backward and optimizer step walked through, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autoprec.predict.anatomy import Part
from autoprec.predict.blocks import Op
from autoprec.predict.setup import Checkpointing
from autoprec.records import MemoryParts, Moment

__all__ = ["Fixed", "moments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What does not change with the operation: bytes on one device."""

    weights: float
    masters: float
    optimizer: float
    context: float
    #: all gradients of a step, as they are stored
    gradients: float
    #: share of new gradients that stays on this device
    gradient_share: float
    #: gradients of earlier micro-batches are there from the start
    accumulates: bool
    #: the optimizer's temporaries
    optimizer_temporary: float
    #: the stream between two blocks, kept by full checkpointing
    stream: float
    #: whole weights of one unit and the next, gathered from shards
    gathered: float


def moments(
    parts: Sequence[Part], fixed: Fixed, *, trains: bool, checkpointing: Checkpointing
) -> dict[Moment, MemoryParts]:
    """Return what is held at the worst point of each phase of a step."""
    ops = [op for part in parts for op in part.ops]
    blocks = [part.block for part in parts for _ in part.ops]
    spans = _spans(ops, blocks, fixed, checkpointing) if trains else ops
    found = {Moment.FORWARD: _highest(_forward(spans, ops, fixed, trains), fixed)}
    if trains:
        found[Moment.BACKWARD] = _highest(_backward(spans, ops, blocks, fixed, checkpointing), fixed)
        found[Moment.OPTIMIZER] = _parts(fixed, _Held(gradients=fixed.gradients), fixed.optimizer_temporary)
    return found


@dataclass(slots=True)
class _Held:
    """Running sums of what is kept."""

    activations: float = 0.0
    scores: float = 0.0
    logits: float = 0.0
    casts: float = 0.0
    cache: float = 0.0
    gradients: float = 0.0

    def add(self, op: Op, sign: int = 1) -> None:
        """Take what an operation keeps, or give it back."""
        self.activations += sign * op.activations
        self.scores += sign * op.scores
        self.logits += sign * op.logits
        self.casts += sign * op.casts

    def copied(self) -> _Held:
        """Return the sums as they are now."""
        return _Held(self.activations, self.scores, self.logits, self.casts, self.cache, self.gradients)

    @property
    def total(self) -> float:
        return self.activations + self.scores + self.logits + self.casts + self.cache + self.gradients


#: what is held, and beside it for a moment: temporaries and logits
_Point = tuple[_Held, float, float]


#: the block of each operation, None outside blocks
_Blocks = Sequence[str | None]


def _spans(ops: Sequence[Op], blocks: _Blocks, fixed: Fixed, checkpointing: Checkpointing) -> list[Op]:
    """Return the operations with what they keep past their block under checkpointing."""
    if checkpointing is Checkpointing.NONE:
        return list(ops)
    spans, before = [], None
    for op, block in zip(ops, blocks, strict=True):
        if block is None:
            spans.append(op)
        else:
            entry = fixed.stream if block != before else 0.0
            result = op.result if checkpointing is Checkpointing.SELECTIVE else 0.0
            spans.append(replace(op, activations=entry + result, scores=0.0, logits=0.0, casts=0.0))
        before = block
    return spans


def _forward(spans: Sequence[Op], ops: Sequence[Op], fixed: Fixed, trains: bool) -> Iterator[_Point]:
    held = _Held(gradients=fixed.gradients if fixed.accumulates else 0.0)
    for span, op in zip(spans, ops, strict=True):
        held.cache += op.cache
        if trains:
            held.add(span)
        within = op.kept - span.kept if trains else 0.0
        temporary = op.forward - op.forward_logits + max(0.0, within) + fixed.stream
        yield held, temporary, op.forward_logits


def _backward(
    spans: Sequence[Op], ops: Sequence[Op], blocks: _Blocks, fixed: Fixed, checkpointing: Checkpointing
) -> Iterator[_Point]:
    held = _Held(gradients=fixed.gradients if fixed.accumulates else 0.0)
    for span in spans:
        held.add(span)
    again = checkpointing is not Checkpointing.NONE
    within: dict[str | None, list[tuple[Op, Op]]] = {}
    for op, span, block in zip(ops, spans, blocks, strict=True):
        within.setdefault(block, []).append((op, span))
    open_block: str | None = None
    for index in range(len(ops) - 1, -1, -1):
        op, span, block = ops[index], spans[index], blocks[index]
        if again and block is not None and block != open_block:
            # the block runs again: what its operations keep is there until each has had its backward
            for once_more, kept in within[block]:
                held.add(once_more)
                held.add(kept, -1)
            held.activations += fixed.stream
        open_block = block
        fresh = 0.0 if fixed.accumulates else op.gradient * fixed.gradient_share
        held.gradients += fresh
        temporary = op.backward - op.backward_logits + (op.gradient - fresh if op.gradient else 0.0)
        yield held, temporary, op.backward_logits
        held.add(op if again and block is not None else span, -1)
        first = index == 0 or blocks[index - 1] != block
        if again and block is not None and first:
            held.activations -= fixed.stream


def _highest(points: Iterator[_Point], fixed: Fixed) -> MemoryParts:
    """Return the parts of the highest point; those of the others are not worked out."""
    most, best = -1.0, (_Held(), 0.0, 0.0)
    for held, temporary, logits in points:
        total = held.total + temporary + logits
        if total > most:
            most, best = total, (held.copied(), temporary, logits)
    held, temporary, logits = best
    return _parts(fixed, held, temporary, gathered=fixed.gathered, logits=logits)


def _parts(fixed: Fixed, held: _Held, temporary: float, *, gathered: float = 0.0, logits: float = 0.0) -> MemoryParts:
    return MemoryParts(
        weights_bytes=round(fixed.weights),
        masters_bytes=round(fixed.masters),
        gradients_bytes=round(held.gradients),
        optimizer_bytes=round(fixed.optimizer),
        activations_bytes=round(held.activations),
        scores_bytes=round(held.scores),
        logits_bytes=round(held.logits + logits),
        casts_bytes=round(held.casts + gathered),
        cache_bytes=round(held.cache),
        temporary_bytes=round(temporary),
        context_bytes=round(fixed.context),
    )
