"""The kernels of a block's parts: norms, linear layers, activations, and the casts that formats bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoprec.formats import Format, Fp8Recipe
from autoprec.predict.kernels import Kernel, Kind, Phase, gemm, move
from autoprec.predict.shape import FP32_BYTES, Place, Shape
from autoprec.records import Leaf, LeafKind, Unit

__all__ = ["DROPOUT", "DROPOUT_BACK", "Work", "activation", "ffn", "linear", "norm", "other"]

#: bytes an element of PyTorch's FP32 kernels, forward and backward, where 8 would read and write it once: dropout
#: (random numbers; a cast of the mask and two products), a layer norm (statistics; inputs read twice). As NeuSight's
#: traces of operations have them, over the bandwidth that additions reach
DROPOUT, DROPOUT_BACK = 13.5, 25.0
_NORM, _NORM_BACK = 14.0, 30.0
#: passes over the operand of GELU written out in Python (transformers' NewGELUActivation): powers, products, sums
_WRITTEN, _WRITTEN_BACK = 18, 28
#: bytes an element to find scales and cast to FP8 where a compiler fuses: of an input, an output gradient, a weight
#: (torchao testing/training/roofline_utils.py). The largest value of a whole tensor is found where the tensor is made
#: (an input by norm or activation; of the gradients about half), that of rows and columns is not.
_SCALE = {
    Fp8Recipe.TENSORWISE: (4.0, 5.0, 8.0),
    Fp8Recipe.ROWWISE: (8.0, 8.0, 10.0),
}
#: operations of an eager linear layer beside its products, forward and backward, as torchao 0.18 dispatches them: input
#: and weight are cast in the forward, and in the backward these and the gradient anew, the gradient twice
_SCALE_OPERATIONS = {Fp8Recipe.TENSORWISE: (22, 46), Fp8Recipe.ROWWISE: (28, 58)}
#: what of an eager operation's time one of these takes the host, which is called without a module and without autocast:
#: of 0.6 to 1.0 the best on an H200 (benchmarks/bench_cards.py)
_BARE = 0.7
#: with scales of the step before (TransformerEngine's default) each tensor is read once, an input where it is made
_SCALE_DELAYED = (2.0, 4.0, 4.0)
#: the same in inference: no gradient, no second layout
_SCALE_INFER = (5.0, 0.0, 5.0)
#: in eager mode each of abs, max, divide, clamp, cast reads and writes a tensor of its own, FP32 from the division on
_UNFUSED = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model under a plan and setup, and what of a step is counted."""

    shape: Shape
    recipe: Fp8Recipe | None = None
    #: FP8 is scaled by the largest values of the step before
    delayed: bool = False
    #: gradients are added to those of an earlier step, as where nobody sets them to zero
    accumulates: bool = False
    with_loss: bool = True

    def operands(self, name: str) -> str:
        """Return what a unit's matmuls multiply in: a format, or `tf32` for FP32 where the plan says so."""
        chosen = self.shape.formats.get(name, self.shape.plan.ambient)
        return "tf32" if chosen is Format.FP32 and self.shape.plan.tf32 else str(chosen)

    @property
    def causal(self) -> bool:
        """Whether half of the scores are masked."""
        return self.shape.decoder


def norm(work: Work, place: Place) -> Iterator[Kernel]:
    """Yield a norm over the stream, forward and backward."""
    shape = work.shape
    elements = float(place.tokens * shape.hidden)
    s = shape.stream
    if shape.written_norm:
        # square, mean, product, scale, in FP32; with casts where the stream is narrow
        eager, back, count = 7.0 * FP32_BYTES, 14.0 * FP32_BYTES, (6.0, 14.0)
        eager += 2 * (s + FP32_BYTES) if s != FP32_BYTES else 0
    else:
        eager, back, count = _NORM * s / FP32_BYTES, _NORM_BACK * s / FP32_BYTES, (1.0, 2.0)
    yield move(Kind.NORM, Phase.FORWARD, elements * eager, elements * 2 * s, launches=count[0])
    if shape.setup.trains:
        yield move(Kind.NORM, Phase.BACKWARD, elements * back, elements * 4 * s, launches=count[1])


def linear(
    work: Work,
    leaf: Leaf,
    place: Place,
    *,
    own_input: bool,
    tokens: int | None = None,
    name: str | None = None,
    from_stream: bool = True,
    to_stream: bool = False,
) -> Iterator[Kernel]:
    """Yield a linear layer: casts of input and weight, three products, the sum of its bias, adding input gradients.

    Args:
        own_input: no earlier layer has the same input; else the gradients of both are added.
        from_stream: its input comes in the stream's format.
        to_stream: its result is added to the stream.
    """
    shape, setup = work.shape, work.shape.setup
    t = place.tokens if tokens is None else tokens
    i, o, c, s = leaf.inputs, leaf.outputs, place.compute, shape.stream
    operands = work.operands(name or place.unit)
    matrix = float(i * o)
    given = s if from_stream else c
    if given != c:
        yield move(Kind.CAST, Phase.FORWARD, float(t * i * (given + c)), 0.0)
    if place.stored != c:
        yield move(Kind.CAST, Phase.FORWARD, matrix * (place.stored + c))
    if operands == Format.FP8:
        yield from _scales(work, t, i, o, own_input=own_input)
    yield gemm(Phase.FORWARD, t, o, i, operands, c, kind=Kind.MATMUL)
    if to_stream:
        dropped = float(t * o * c) / FP32_BYTES if setup.dropout else 0.0
        yield move(
            Kind.RESIDUAL, Phase.FORWARD, t * o * (2.0 * s + c) + DROPOUT * dropped, t * o * float(s + c), launches=2
        )
        if setup.trains:
            cast = s + c if s != c else 0
            yield move(
                Kind.RESIDUAL,
                Phase.BACKWARD,
                t * o * (3.0 * s + cast) + DROPOUT_BACK * dropped,
                t * o * 1.0 * s,
                launches=3,
            )
    if not setup.trains:
        return
    yield gemm(Phase.BACKWARD, t, i, o, operands, c, kind=Kind.MATMUL)
    if not own_input:
        yield move(Kind.RESIDUAL, Phase.BACKWARD, 3.0 * t * i * given, 2.0 * t * i * given)
    if given != c:
        yield move(Kind.CAST, Phase.BACKWARD, float(t * i * (given + c)), 0.0)
    if not shape.trains_weights:
        return
    yield gemm(Phase.BACKWARD, o, i, t, operands, c, kind=Kind.MATMUL)
    if leaf.parameters > matrix:  # a bias
        yield move(Kind.RESIDUAL, Phase.BACKWARD, float(t * o * c))
    if place.stored != c:
        yield move(Kind.CAST, Phase.BACKWARD, matrix * (place.stored + c))


def _scales(work: Work, tokens: int, inputs: int, outputs: int, *, own_input: bool) -> Iterator[Kernel]:
    """Yield what FP8 adds to a linear layer: scales, casts and second layouts of input, weight and output gradient.

    A compiler scales an input once that several layers share.
    """
    trains = work.shape.setup.trains
    fresh = _SCALE[work.recipe or Fp8Recipe.TENSORWISE]
    of_input, of_gradient, of_weight = (_SCALE_DELAYED if work.delayed else fresh) if trains else _SCALE_INFER
    x, w, g = float(tokens * inputs), float(inputs * outputs), float(tokens * outputs)
    once = of_weight * w + (of_input * x if own_input else 0.0)
    forward, backward = (_BARE * count for count in _SCALE_OPERATIONS[work.recipe or Fp8Recipe.TENSORWISE])
    moved = _UNFUSED * (of_input * x + of_weight * w)
    yield move(Kind.SCALE, Phase.FORWARD, moved, once, launches=forward, kept=2 + 2 * own_input)
    if trains:
        yield move(Kind.SCALE, Phase.BACKWARD, _UNFUSED * of_gradient * g, of_gradient * g, launches=backward, kept=2)


def ffn(work: Work, unit: Unit, place: Place) -> Iterator[Kernel]:
    """Yield a norm, the matrices of an FFN or of its experts, and the activation between them."""
    shape = work.shape
    yield from norm(work, place)
    experts = [shape.leaves[m] for m in unit.modules if shape.leaves[m].kind is LeafKind.EXPERTS]
    for leaf in experts:
        yield from _experts(work, leaf, place)
    leaves = shape.linears(unit)
    if len(leaves) < 2:
        for leaf in leaves:
            yield from linear(work, leaf, place, own_input=True, to_stream=True)
        return
    *inputs, out = leaves
    for index, leaf in enumerate(inputs):
        yield from linear(work, leaf, place, own_input=index == 0)
    gated = len(inputs) > 1 or inputs[0].outputs == 2 * out.inputs
    yield from activation(work, place, place.tokens, out.inputs, gated=gated)
    yield from linear(work, out, place, own_input=True, from_stream=False, to_stream=True)


def activation(work: Work, place: Place, tokens: int, width: int, *, gated: bool) -> Iterator[Kernel]:
    """Yield an activation of some features a token, and the product with its gate."""
    one = float(tokens * width * place.compute)
    if work.shape.written_activation:
        forward, back, count = _WRITTEN * one, _WRITTEN_BACK * one, (8.0, 14.0)
    elif gated:
        forward, back, count = 5 * one, 9 * one, (2.0, 3.0)
    else:
        forward, back, count = 2 * one, 4 * one, (1.0, 1.0)
    lean = (3 if gated else 2) * one
    yield move(Kind.ACTIVATION, Phase.FORWARD, forward, lean, launches=count[0])
    if work.shape.setup.trains:
        yield move(Kind.ACTIVATION, Phase.BACKWARD, back, lean + 2 * one, launches=count[1])


def other(work: Work, unit: Unit, place: Place) -> Iterator[Kernel]:
    """Yield layers outside blocks: of all tokens before a head over a vocabulary, else of one token a sequence."""
    shape = work.shape
    every = shape.over_vocabulary()
    tokens = place.tokens if every else shape.setup.batch_size
    for leaf in shape.linears(unit):
        yield from linear(work, leaf, place, own_input=True, tokens=tokens)
        if every:
            yield from activation(work, place, tokens, leaf.outputs, gated=False)


def _experts(work: Work, leaf: Leaf, place: Place) -> Iterator[Kernel]:
    """Yield the experts of a block: each token through its own few, gathered and scattered; all weights are read."""
    shape = work.shape
    facts = shape.facts
    chosen = max(1, facts.experts_per_token) if facts is not None else 2
    matrices = 3 if shape.gated else 2
    count = max(1, leaf.parameters // max(1, matrices * leaf.inputs * leaf.outputs))
    tokens = max(1, -(-place.tokens * chosen // count))
    c, operands = place.compute, work.operands(place.unit)
    trains, weights = shape.setup.trains, shape.trains_weights
    spread = float(place.tokens * chosen * leaf.inputs * c)
    if place.stored != c:
        yield move(Kind.CAST, Phase.FORWARD, float(leaf.parameters * (place.stored + c)))
    yield move(Kind.ACTIVATION, Phase.FORWARD, 6 * spread, launches=6 * count)
    for index in range(matrices):
        i, o = (leaf.inputs, leaf.outputs) if index < matrices - 1 else (leaf.outputs, leaf.inputs)
        yield gemm(Phase.FORWARD, tokens, o, i, operands, c, count, kind=Kind.MATMUL)
        if trains:
            yield gemm(Phase.BACKWARD, tokens, i, o, operands, c, count, kind=Kind.MATMUL)
        if weights:
            yield gemm(Phase.BACKWARD, o, i, tokens, operands, c, count, kind=Kind.MATMUL)
    yield from activation(work, place, place.tokens * chosen, leaf.outputs, gated=shape.gated)
    if trains:
        yield move(Kind.ACTIVATION, Phase.BACKWARD, 9 * spread, launches=6 * count)
    if weights and place.stored != c:
        yield move(Kind.CAST, Phase.BACKWARD, float(leaf.parameters * (place.stored + c)))
