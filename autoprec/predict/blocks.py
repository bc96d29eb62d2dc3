"""What autograd keeps of each operation of a model, and what lives while it runs.

The list of operations is read from the units and widths of a `ModelProfile`. What an operation keeps follows the
derivative formulas of PyTorch (`tools/autograd/derivatives.yaml`) and how transformers writes its blocks: a linear
layer keeps its input in the format it computes in; a norm written in Python keeps its input in FP32 and the
normalised values, a fused one its input; SDPA keeps q, k, v, its result and a logsumexp a row; an activation keeps its
input, a product both factors; a residual sum keeps nothing, and becomes the input of the next norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autoprec.predict.setup import Attention, TrainMethod
from autoprec.predict.shape import FORMAT_BYTES, FP32_BYTES, Place, Shape
from autoprec.records import Leaf, LeafKind, Unit

__all__ = ["Op", "activation", "attention", "ffn", "linear", "norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: bytes kept for the backward, bytes that live while it runs, and gradients it makes."""

    activations: float = 0
    scores: float = 0
    logits: float = 0
    casts: float = 0
    cache: float = 0
    #: kept even when only results of matmuls and attention are
    result: float = 0
    #: gradients of its parameters as they stay
    gradient: float = 0
    #: lives in the forward beside what is kept
    forward: float = 0
    #: lives in the backward beside what is kept and the new gradients
    backward: float = 0
    #: the part of both that is logits
    forward_logits: float = 0
    backward_logits: float = 0

    @property
    def kept(self) -> float:
        """Bytes that stay until its backward."""
        return self.activations + self.scores + self.logits + self.casts


def attention(shape: Shape, unit: Unit, place: Place) -> Iterator[Op]:
    """Yield a norm, the projections, attention itself, and the output projection."""
    leaves = shape.linears(unit)
    yield norm(shape, place)
    if len(leaves) < 2:  # one module that projects and attends
        yield from (linear(shape, unit, leaf, place, shared=False) for leaf in leaves)
        return
    *inputs, out = leaves
    joint = len(inputs) == 1
    q_width = out.inputs
    kv_width = (inputs[0].outputs - q_width) // 2 if joint else inputs[-1].outputs
    yield from _projections(shape, unit, inputs, place)
    yield _scores(shape, place, q_width, kv_width, joint=joint)
    # the result of SDPA is the input of the output projection
    yield linear(shape, unit, out, place, shared=True, residual=True)


def ffn(shape: Shape, unit: Unit, place: Place) -> Iterator[Op]:
    """Yield a norm, the matrices of an FFN or of its experts, and the activation between them."""
    yield norm(shape, place)
    experts = [shape.leaves[m] for m in unit.modules if shape.leaves[m].kind is LeafKind.EXPERTS]
    leaves = shape.linears(unit)
    for leaf in experts:
        yield from _experts(shape, leaf, place)
    if len(leaves) < 2:
        yield from (linear(shape, unit, leaf, place, shared=False) for leaf in leaves)
        return
    *inputs, out = leaves
    yield from _projections(shape, unit, inputs, place)
    yield activation(shape, place, out.inputs, product=len(inputs) > 1 or inputs[0].outputs == 2 * out.inputs)
    yield linear(shape, unit, out, place, shared=False, residual=True)


def linear(
    shape: Shape,
    unit: Unit,
    leaf: Leaf,
    place: Place,
    *,
    shared: bool,
    residual: bool = False,
    tokens: int | None = None,
) -> Op:
    """Return a matmul with a weight.

    Args:
        shared: another operation keeps its input already.
        residual: its result is added to the stream, behind dropout.
        tokens: where it sees fewer than all.
    """
    tokens = place.tokens if tokens is None else tokens
    matrix, adapter = leaf.inputs * leaf.outputs, shape.adapter(unit, leaf)
    compute = place.compute
    input_bytes, output_bytes = float(tokens * leaf.inputs * compute), float(tokens * leaf.outputs * compute)
    packed = shape.setup.method is TrainMethod.QLORA and shape.is_packed(leaf, unit.role)
    narrow = packed or place.stored != compute
    cast = float(matrix * compute) if narrow else 0.0
    kept = input_bytes if shape.trains_weights and not shared else 0.0
    gradient = temporary = 0.0
    if packed and shape.setup.packed_inputs and shape.setup.trains and not shared:
        kept = input_bytes
    if adapter:
        # an FP32 adapter casts its input for itself, dropout makes a copy and a mask; then what its matrices pass on
        if shape.setup.dropout or compute != FP32_BYTES or not shared:
            kept += input_bytes + (tokens * leaf.inputs if shape.setup.dropout else 0.0)
        kept += tokens * shape.setup.adapter_rank * compute
        cast += adapter * compute if compute != FP32_BYTES else 0.0
        gradient = float(adapter * shape.gradient_width)
    elif shape.trains_weights:
        gradient = float(shape.fresh_parameters(leaf) * shape.gradient_width)
        temporary = matrix * compute if narrow else 0.0
    masks = tokens * leaf.outputs if residual and shape.setup.dropout and shape.full else 0.0
    return Op(
        activations=kept + masks,
        casts=0.0 if packed else cast,  # what is packed is unpacked again in the backward
        result=output_bytes,
        gradient=gradient,
        forward=output_bytes
        + (cast if packed or not shape.setup.trains else 0.0)
        + (0.0 if kept else input_bytes)
        + (0.0 if shape.setup.trains else shape.frames_bytes(place)),
        backward=input_bytes + output_bytes + temporary + (cast if packed else 0.0) + shape.stream_bytes,
    )


def norm(shape: Shape, place: Place) -> Op:
    """Return a norm over the stream: it keeps what the residual sum before it made."""
    elements = float(place.tokens * shape.hidden)
    if shape.written_norm:
        # x in FP32, and the normalised values where the scale is trained
        kept = elements * (FP32_BYTES + (shape.stream if shape.full else 0)) + place.tokens * FP32_BYTES
    else:
        kept = elements * shape.stream + 2 * place.tokens * FP32_BYTES
    masks = elements if shape.setup.dropout and shape.full and place.block is None else 0.0
    wide = elements * FP32_BYTES
    return Op(
        activations=kept + masks,
        forward=wide + elements * shape.stream,
        backward=2 * wide + shape.stream_bytes,
    )


def _scores(shape: Shape, place: Place, q_width: int, kv_width: int, *, joint: bool) -> Op:
    """Return attention between projected queries, keys and values of some features a token."""
    tokens, compute = place.tokens, place.compute
    heads = shape.heads(q_width)
    scores, lse = 0.0, tokens * heads * FP32_BYTES
    square = float(tokens) * shape.setup.seq_len * heads
    if shape.biased:
        compute = FP32_BYTES
    if shape.setup.attention is Attention.EAGER or shape.biased:
        # softmax in FP32 and its copy in the format of the product; keys and values are repeated for every query
        scores = square * (FP32_BYTES if compute == FP32_BYTES else FP32_BYTES + compute)
        kv_width, lse = q_width, 0
    kept = tokens * (q_width + 2 * kv_width) * compute + lse
    if shape.head_norms:  # norms of queries and keys, written in Python: input in FP32 and normalised values
        kept += tokens * (q_width + kv_width) * (FP32_BYTES + place.compute)
    if joint:  # views of the joint projection keep all of it; two of the three are copied beside it
        kept += 2 * tokens * q_width * compute
    if shape.trains_weights or not scores:  # the result: SDPA keeps it, and so does a trained output projection
        kept += tokens * q_width * place.compute
    cache = 0.0
    if shape.setup.cache is not None and shape.decoder and not place.crosses:
        cache = float(tokens * 2 * kv_width * FORMAT_BYTES[shape.setup.cache])
    eager = square * (compute + FP32_BYTES) if scores else 0.0
    flow = tokens * (2 * q_width + 2 * kv_width) * compute
    return Op(
        activations=kept,
        scores=scores,
        result=tokens * (2 * q_width + 2 * kv_width) * compute + lse,
        cache=cache,
        forward=eager if shape.setup.trains else eager + kept + shape.frames_bytes(place),
        backward=flow + eager + shape.stream_bytes,
    )


def _projections(shape: Shape, unit: Unit, leaves: list[Leaf], place: Place) -> Iterator[Op]:
    """Yield linear layers that share one input: in the stream's format they keep it once, else a cast each."""
    one = place.compute == shape.stream
    for index, leaf in enumerate(leaves):
        yield linear(shape, unit, leaf, place, shared=one and index > 0)


def activation(shape: Shape, place: Place, width: int, *, product: bool) -> Op:
    """Return an activation of some features a token, and the product with its gate if `product`."""
    one = float(place.tokens * width * place.compute)
    written = shape.written_activation
    kept = one * (4 if written else 1) + (2 * one if product else 0)
    if shape.biased and not product and place.compute == shape.stream:
        kept = 0.0  # ReLU keeps its result, which the next layer keeps as well
    together = 4 if written else 3 if product else 2  # intermediate results at once
    return Op(
        activations=kept,
        forward=one if shape.setup.trains else together * one + shape.frames_bytes(place),
        backward=(3 if product or written else 2) * one + shape.stream_bytes,
    )


def _experts(shape: Shape, leaf: Leaf, place: Place) -> Iterator[Op]:
    """Yield the experts of a block as one FFN for each of a token's choices; all their weights have gradients."""
    chosen = max(1, shape.facts.experts_per_token) if shape.facts is not None else 2
    tokens = place.tokens * chosen
    inner = replace(place, tokens=tokens)
    stored = shape.stored_width()
    cast = float(leaf.parameters * place.compute) if stored != place.compute else 0.0
    trained = shape.trains_weights
    yield activation(shape, inner, leaf.outputs, product=True)
    yield Op(
        activations=tokens * (leaf.inputs + leaf.outputs) * place.compute if trained else 0.0,
        casts=cast,
        result=tokens * (2 * leaf.outputs + leaf.inputs) * place.compute,
        gradient=leaf.parameters * shape.gradient_width if trained else 0.0,
        forward=tokens * leaf.inputs * place.compute,
        backward=tokens * (leaf.inputs + leaf.outputs) * place.compute
        + (leaf.parameters * place.compute if cast and trained else 0.0)
        + shape.stream_bytes,
    )
