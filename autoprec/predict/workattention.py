"""The kernels of attention: projections, rotated queries and keys, scores as plain operations or one fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

from autoprec.formats import Format
from autoprec.predict.kernels import Kernel, Kind, Phase, gemm, move
from autoprec.predict.setup import Attention
from autoprec.predict.shape import FP32_BYTES, Place, Shape
from autoprec.predict.workparts import DROPOUT, DROPOUT_BACK, Work, linear, norm
from autoprec.records import LeafKind, Unit

__all__ = ["attention"]

#: bytes an element of PyTorch's FP32 softmax, forward and backward (which forms gradient * result first), as NeuSight's
#: traces have them
_SOFTMAX, _SOFTMAX_BACK = 8.7, 24.0
#: classes that learn no positions though they have no rotation of queries and keys: they bias scores by distance
_DISTANCE = ("Bloom", "Mpt", "T5", "MT5", "UMT5", "LongT5", "SwitchTransformers")


def attention(work: Work, unit: Unit, place: Place) -> Iterator[Kernel]:
    """Yield a norm, the projections, attention itself, and the output projection."""
    shape = work.shape
    leaves = shape.linears(unit)
    yield from norm(work, place)
    if len(leaves) < 2:  # one module that projects and attends
        for leaf in leaves:
            yield from linear(work, leaf, place, own_input=True)
        return
    *inputs, out = leaves
    for index, leaf in enumerate(inputs):
        yield from linear(work, leaf, place, own_input=index == 0)
    q = out.inputs
    kv = (inputs[0].outputs - q) // 2 if len(inputs) == 1 else inputs[-1].outputs
    yield from _attend(work, place, q, kv, joint=len(inputs) == 1)
    yield from linear(work, out, place, own_input=True, from_stream=False, to_stream=True)


def _attend(work: Work, place: Place, q: int, kv: int, *, joint: bool) -> Iterator[Kernel]:
    """Yield attention between projected queries, keys and values of some features a token."""
    shape, setup = work.shape, work.shape.setup
    t, c, trains = place.tokens, place.compute, work.shape.setup.trains
    if shape.head_norms:
        wide = float(t * (q + kv) * FP32_BYTES)
        yield move(Kind.NORM, Phase.FORWARD, 7 * wide, wide, launches=12)
        if trains:
            yield move(Kind.NORM, Phase.BACKWARD, 14 * wide, 2 * wide, launches=28)
    if _rotates(shape):
        # x * cos + rotate_half(x) * sin: a negation, a concatenation, two products and a sum
        turned = float(t * (q + kv) * c)
        yield move(Kind.ATTENTION, Phase.FORWARD, 12 * turned, 2 * turned, launches=10)
        if trains:
            yield move(Kind.ATTENTION, Phase.BACKWARD, 12 * turned, 2 * turned, launches=12)
    if joint and trains:  # the gradients of the three parts are joined
        yield move(Kind.ATTENTION, Phase.BACKWARD, 2.0 * t * (q + 2 * kv) * c)
    eager = setup.attention is Attention.EAGER or shape.biased
    if eager:
        yield from _eager_scores(work, place, q, kv)
        return
    square = float(t) * setup.seq_len * q
    flops = 4 * square * (0.5 if work.causal and setup.seq_len > 1 else 1.0)
    flow = float(t * (2 * q + 2 * kv) * c)
    operands = _scored_in(work, place)
    yield Kernel(
        kind=Kind.ATTENTION, phase=Phase.FORWARD, operands=operands, flops=flops, length=setup.seq_len, moved=flow,
        fused=flow,
    )  # fmt: skip
    if trains:
        yield Kernel(
            kind=Kind.ATTENTION, phase=Phase.BACKWARD, operands=operands, flops=2.5 * flops, length=setup.seq_len,
            moved=2 * flow, fused=2 * flow, launches=3.0, fused_launches=3.0,
        )  # fmt: skip


def _scored_in(work: Work, place: Place) -> str:
    """Return the format of scores: an FP8 unit attends in the ambient format."""
    operands = work.operands(place.unit)
    return str(work.shape.plan.ambient) if operands == Format.FP8 else operands


def _eager_scores(work: Work, place: Place, q: int, kv: int) -> Iterator[Kernel]:
    """Yield attention in plain operations: two products, scale, mask, softmax in FP32, dropout."""
    shape, setup = work.shape, work.shape.setup
    t, c, length = place.tokens, place.compute, setup.seq_len
    heads = shape.heads(q)
    width, many = max(1, q // heads), setup.batch_size * heads
    operands = _scored_in(work, place)
    square = float(t) * length * heads
    flow = float(t * (q + 2 * kv) * c)
    # autocast and Llama's relatives widen to FP32 for the softmax; a cast model's own runs in its format
    widened = c != FP32_BYTES and (shape.stream == FP32_BYTES or shape.written_norm)
    casts = 2 * (c + FP32_BYTES) if widened else 0
    soft = 1.0 if widened else c / FP32_BYTES
    repeated = float(t * 4 * q * c) if kv != q else 0.0
    yield move(Kind.ATTENTION, Phase.FORWARD, 2 * flow + 2.0 * t * q * c + repeated, launches=4)
    yield gemm(Phase.FORWARD, length, length, width, operands, c, many, kind=Kind.ATTENTION)
    dropped = c / FP32_BYTES if setup.dropout else 0.0
    yield move(
        Kind.ATTENTION,
        Phase.FORWARD,
        square * (2 * c + 2 * c + casts + _SOFTMAX * soft + DROPOUT * dropped),
        square * (3 * c + (c if setup.dropout else 0)),
        launches=4 + (2 if casts else 0) + setup.dropout,
        kept=2,
    )
    yield gemm(Phase.FORWARD, length, width, length, operands, c, many, kind=Kind.ATTENTION)
    if not setup.trains:
        return
    for m, n, k in ((length, length, width), (length, width, length), (length, width, length), (length, width, length)):
        yield gemm(Phase.BACKWARD, m, n, k, operands, c, many, kind=Kind.ATTENTION)
    masked = 2.25 * c if work.causal else 0.0
    yield move(
        Kind.ATTENTION,
        Phase.BACKWARD,
        square * (2 * c + masked + casts + _SOFTMAX_BACK * soft + DROPOUT_BACK * dropped),
        square * (5 * c),
        launches=4 + (2 if casts else 0) + 3 * setup.dropout,
        kept=2,
    )
    yield move(Kind.ATTENTION, Phase.BACKWARD, 2 * flow + 2.0 * t * q * c + repeated, launches=4)


def _rotates(shape: Shape) -> bool:
    """Say whether queries and keys are rotated by position: where none are learned and scores have no bias."""
    learned = sum(leaf.kind is LeafKind.EMBEDDING for leaf in shape.profile.leaves) > 1
    return shape.decoder and not learned and not shape.profile.class_name.startswith(_DISTANCE)
