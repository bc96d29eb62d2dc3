"""What autograd keeps of each operation of a model, and what lives while it runs.

The list of operations is read from the units and widths of a `ModelProfile`. What an operation keeps follows the
derivative formulas of PyTorch (`tools/autograd/derivatives.yaml`) and how transformers writes its blocks: a linear
layer keeps its input in the format it computes in; a norm written in Python keeps its input in FP32 and the
normalised values, a fused one its input; SDPA keeps q, k, v, its result and a logsumexp a row; an activation keeps its
input, a product both factors; a residual sum keeps nothing, and becomes the input of the next norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.setup import Adapters, Attention, Loss, Setup, StatePolicy, TrainMethod
from autoprec.records import Architecture, Leaf, LeafKind, ModelFacts, ModelProfile, Role, Unit

__all__ = ["Anatomy", "Op"]

_BLOCK = re.compile(r"^(.*?blocks\.\d+)\.")
_LINEAR = (LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.QUANTIZED)
_WIDTH = {Format.FP32: 4, Format.BF16: 2, Format.FP16: 2}
_FP32 = 4
#: classes whose activation is written out in Python (transformers' NewGELUActivation): four tensors are kept, not one
_WRITTEN_OUT = ("GPT2", "GPTNeoFor", "GPTJ", "CodeGen", "PhiFor", "PhiModel", "GPTBigCode")
#: classes that add a learned bias to the scores: PyTorch computes such attention in plain operations, in FP32
_BIASED = ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers")
_HEAD_WIDTH = 64  #: features a head where no facts say: that of GPT-2, BERT and small Llamas
#: bytes a weight in NF4: an FP32 scale a block of 64, or one in 8 bits with an FP32 scale for 256 of them (QLoRA,
#: arXiv:2305.14314, section 3)
_NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: bytes kept for the backward, bytes that live while it runs, and gradients it makes."""

    unit: str
    block: str | None
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an operation stands: its unit, block, tokens, and widths in bytes of computing and of stored weights."""

    unit: str
    block: str | None
    tokens: int
    compute: int
    stored: float


class Anatomy:
    """The operations of a model in the order they run, under a plan and a setup."""

    def __init__(self, profile: ModelProfile, plan: Plan, setup: Setup, facts: ModelFacts | None = None) -> None:
        self.profile, self.plan, self.setup, self.facts = profile, plan, setup, facts
        self.leaves = {leaf.module: leaf for leaf in profile.leaves}
        self.formats = plan.assignment
        self.full = setup.method is TrainMethod.FULL
        self.gradient_width = 2 if self.full and setup.policy is not StatePolicy.FP32 else _FP32
        self.shared = {m: group[0] for group in profile.tied for m in group}

    # what is known of the model

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream."""
        if self.facts is not None:
            return self.facts.hidden
        widths = [self._linears(unit)[-1].outputs for unit in self.profile.units if self._linears(unit)]
        return max(set(widths), key=widths.count) if widths else self.profile.leaves[0].outputs

    @cached_property
    def gated(self) -> bool:
        """Whether an FFN multiplies two projections."""
        if self.facts is not None:
            return self.facts.gated
        return any(len(self._linears(u)) == 3 for u in self.profile.units if u.role is Role.FFN)

    @cached_property
    def written_norm(self) -> bool:
        """Whether norms are RMS norms written in Python, as in Llama's relatives and T5."""
        encoder = any(".layer_norm" in m for p in self.profile.pinned for m in p.modules) and self.biased
        return self.gated or encoder

    @cached_property
    def biased(self) -> bool:
        """Whether a learned bias is added to the scores."""
        return self.profile.class_name.startswith(_BIASED)

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the token embedding; 0 where there is none."""
        if self.facts is not None:
            return self.facts.vocab
        return max((leaf.inputs for leaf in self.profile.leaves if leaf.kind is LeafKind.EMBEDDING), default=0)

    @cached_property
    def decoder(self) -> bool:
        """Whether keys and values of earlier tokens are of use."""
        if self.facts is not None:
            return self.facts.architecture in (Architecture.DECODER, Architecture.ENCODER_DECODER)
        return "CausalLM" in self.profile.class_name or "LMHead" in self.profile.class_name

    @property
    def stream(self) -> int:
        """Bytes an element of the residual stream."""
        if not self.full or self.setup.policy is not StatePolicy.FP32:
            return self.ambient
        return _WIDTH[self.plan.stream]

    @property
    def ambient(self) -> int:
        """Bytes an element of what no unit decides."""
        return _WIDTH[self.plan.ambient]

    @property
    def stream_bytes(self) -> float:
        """Bytes of the residual stream of one micro-batch."""
        return float(self.setup.tokens * self.hidden * self.stream)

    def weight_bytes(self, leaf: Leaf | None, parameters: int, role: Role | None) -> float:
        """Return the bytes that some parameters take as they are stored."""
        if self.setup.method is TrainMethod.QLORA and self._packed(leaf, role):
            return _NF4[self.setup.double_quant] * parameters
        return self._stored_width() * parameters

    def trained(self, unit: Unit | None, parameters: int) -> int:
        """Return how many parameters of a unit are trained (None: those outside units)."""
        if not self.setup.trains:
            return 0
        if self.full:
            return parameters
        return 0 if unit is None else sum(self.adapter(unit, leaf) for leaf in self._linears(unit))

    def adapter(self, unit: Unit, leaf: Leaf) -> int:
        """Return the parameters of the adapters beside a leaf; 0 where it has none."""
        if not self.setup.trains or self.full or unit.role not in (Role.ATTENTION, Role.FFN):
            return 0
        rank = self.setup.adapter_rank
        if self.setup.adapters is Adapters.ALL:
            return rank * (leaf.inputs + leaf.outputs)
        leaves = self._linears(unit)
        if unit.role is not Role.ATTENTION or leaf is leaves[-1]:
            return 0
        if len(leaves) == 2:  # a joint projection has an adapter for each of the two
            key = (leaf.outputs - leaves[-1].inputs) // 2
            return rank * (2 * leaf.inputs + leaf.outputs - key)
        return rank * (leaf.inputs + leaf.outputs) if leaf in (leaves[0], leaves[2]) else 0

    def own_parameters(self, unit: Unit) -> int:
        """Return the parameters of a unit, a shared storage counted where it comes first."""
        first = {group[0] for group in self.profile.tied}
        return sum(
            self.leaves[m].parameters for m in unit.modules if m in self.leaves and (m not in self.shared or m in first)
        )

    # operations

    def ops(self) -> Iterator[Op]:
        """Yield the operations in the order of the forward."""
        for unit in self.profile.units:
            place = self._place(unit)
            if unit.role is Role.ATTENTION:
                yield from self._attention(unit, place)
            elif unit.role is Role.FFN:
                yield from self._ffn(unit, place)
            elif unit.role is Role.LM_HEAD:
                yield from self._head(unit, place)
            elif unit.role in (Role.EMBEDDING, Role.CONV):
                yield self._stem(unit, place)
            else:
                yield from self._other(unit, place)
        if not any(unit.role is Role.LM_HEAD for unit in self.profile.units):
            yield self._norm(self._place(self.profile.units[-1]))

    def _attention(self, unit: Unit, place: _Place) -> Iterator[Op]:
        leaves = self._linears(unit)
        yield self._norm(place)
        if len(leaves) < 2:  # one module that projects and attends
            yield from (self._linear(unit, leaf, place, shared=False) for leaf in leaves)
            return
        *inputs, out = leaves
        joint = len(inputs) == 1
        q_width = out.inputs
        kv_width = (inputs[0].outputs - q_width) // 2 if joint else inputs[-1].outputs
        yield from self._projections(unit, inputs, place)
        yield self._scores(place, q_width, kv_width, joint, trained=self._trains_weight(unit))
        # the result of SDPA is the input of the output projection
        yield self._linear(unit, out, place, shared=True, residual=True)

    def _scores(self, place: _Place, q_width: int, kv_width: int, joint: bool, trained: bool) -> Op:
        tokens, compute = place.tokens, place.compute
        heads = self._heads(q_width)
        scores, lse = 0.0, tokens * heads * _FP32
        square = float(tokens) * self.setup.seq_len * heads
        if self.biased:
            compute = _FP32
        if self.setup.attention is Attention.EAGER or self.biased:
            # softmax in FP32 and its copy in the format of the product; keys and values are repeated for every query
            scores = square * (_FP32 if compute == _FP32 else _FP32 + compute)
            kv_width, lse = q_width, 0
        kept = tokens * (q_width + 2 * kv_width) * compute + lse
        if joint:  # views of the joint projection keep all of it; two of the three are copied beside it
            kept += 2 * tokens * q_width * compute
        if trained or not scores:
            kept += tokens * q_width * place.compute
        cache = 0.0
        if self.setup.cache is not None and self.decoder and "cross" not in place.unit:
            cache = float(tokens * 2 * kv_width * _WIDTH[self.setup.cache])
        eager = square * (compute + _FP32) if scores else 0.0
        flow = tokens * (2 * q_width + 2 * kv_width) * compute
        return Op(
            unit=place.unit,
            block=place.block,
            activations=kept,
            scores=scores,
            result=tokens * (2 * q_width + 2 * kv_width) * compute + lse,
            cache=cache,
            forward=eager if self.setup.trains else eager + kept + self._frames(place),
            backward=flow + eager + self.stream_bytes,
        )

    def _projections(self, unit: Unit, leaves: list[Leaf], place: _Place) -> Iterator[Op]:
        """Yield linear layers that share one input: in the stream's format they keep it once, else a cast each."""
        one = place.compute == self.stream
        for index, leaf in enumerate(leaves):
            yield self._linear(unit, leaf, place, shared=one and index > 0)

    def _linear(
        self, unit: Unit, leaf: Leaf, place: _Place, *, shared: bool, residual: bool = False, tokens: int | None = None
    ) -> Op:
        tokens = place.tokens if tokens is None else tokens
        matrix, adapter = leaf.inputs * leaf.outputs, self.adapter(unit, leaf)
        compute = place.compute
        input_bytes, output_bytes = float(tokens * leaf.inputs * compute), float(tokens * leaf.outputs * compute)
        packed = self.setup.method is TrainMethod.QLORA and self._packed(leaf, unit.role)
        narrow = packed or place.stored != compute
        cast = float(matrix * compute) if narrow else 0.0
        kept = input_bytes if self._trains_weight(unit) and not shared else 0.0
        gradient = temporary = 0.0
        if packed and self.setup.trains and not shared:
            kept = input_bytes  # bitsandbytes' MatMul4Bit keeps its input though its weight is frozen
        if adapter:  # it keeps its input, dropped out beside the layer's own, and what lies between its two matrices
            if self.setup.dropout:
                kept += input_bytes + tokens * leaf.inputs
            elif not packed and not shared:
                kept = input_bytes
            kept += tokens * self.setup.adapter_rank * compute
            gradient = float(adapter * self.gradient_width)
        elif self._trains_weight(unit):
            gradient = float(self._own(leaf) * self.gradient_width)
            temporary = matrix * compute if narrow else 0.0
        masks = tokens * leaf.outputs if residual and self.setup.dropout and self.full else 0.0
        return Op(
            unit=place.unit,
            block=place.block,
            activations=kept + masks,
            casts=0.0 if packed else cast,  # what is packed is unpacked again in the backward
            result=output_bytes,
            gradient=gradient,
            forward=output_bytes
            + (cast if packed or not self.setup.trains else 0.0)
            + (0.0 if kept else input_bytes)
            + (0.0 if self.setup.trains else self._frames(place)),
            backward=input_bytes + output_bytes + temporary + (cast if packed else 0.0) + self.stream_bytes,
        )

    def _ffn(self, unit: Unit, place: _Place) -> Iterator[Op]:
        yield self._norm(place)
        experts = [self.leaves[m] for m in unit.modules if self.leaves[m].kind is LeafKind.EXPERTS]
        leaves = self._linears(unit)
        for leaf in experts:
            yield from self._experts(unit, leaf, place)
        if len(leaves) < 2:
            yield from (self._linear(unit, leaf, place, shared=False) for leaf in leaves)
            return
        *inputs, out = leaves
        yield from self._projections(unit, inputs, place)
        yield self._activation(place, out.inputs, product=len(inputs) > 1 or inputs[0].outputs == 2 * out.inputs)
        yield self._linear(unit, out, place, shared=False, residual=True)

    def _activation(self, place: _Place, width: int, *, product: bool) -> Op:
        one = float(place.tokens * width * place.compute)
        written = self.profile.class_name.startswith(_WRITTEN_OUT)
        kept = one * (4 if written else 1) + (2 * one if product else 0)
        if self.biased and not product and place.compute == self.stream:
            kept = 0.0  # ReLU keeps its result, which the next layer keeps as well
        return Op(
            unit=place.unit,
            block=place.block,
            activations=kept,
            forward=one if self.setup.trains else (4 if written else 3 if product else 2) * one + self._frames(place),
            backward=(3 if product or written else 2) * one + self.stream_bytes,
        )

    def _experts(self, unit: Unit, leaf: Leaf, place: _Place) -> Iterator[Op]:
        """Yield the experts of a block as one FFN for each of a token's choices; all their weights have gradients."""
        chosen = max(1, self.facts.experts_per_token) if self.facts is not None else 2
        tokens = place.tokens * chosen
        inner = replace(place, tokens=tokens)
        stored = self._stored_width()
        cast = float(leaf.parameters * place.compute) if stored != place.compute else 0.0
        trained = self._trains_weight(unit)
        yield self._activation(inner, leaf.outputs, product=True)
        yield Op(
            unit=place.unit,
            block=place.block,
            activations=tokens * (leaf.inputs + leaf.outputs) * place.compute if trained else 0.0,
            casts=cast,
            result=tokens * (2 * leaf.outputs + leaf.inputs) * place.compute,
            gradient=leaf.parameters * self.gradient_width if trained else 0.0,
            forward=tokens * leaf.inputs * place.compute,
            backward=tokens * (leaf.inputs + leaf.outputs) * place.compute
            + (leaf.parameters * place.compute if cast and trained else 0.0)
            + self.stream_bytes,
        )

    def _norm(self, place: _Place) -> Op:
        """Return a norm over the stream: it keeps what the residual sum before it made."""
        elements = float(place.tokens * self.hidden)
        if self.written_norm:
            # x in FP32, and the normalised values where the scale is trained
            kept = elements * (_FP32 + (self.stream if self.full else 0)) + place.tokens * _FP32
        else:
            kept = elements * self.stream + 2 * place.tokens * _FP32
        masks = elements if self.setup.dropout and self.full and place.block is None else 0.0
        wide = elements * _FP32
        return Op(
            unit=place.unit,
            block=place.block,
            activations=kept + masks,
            forward=wide + elements * self.stream,
            backward=2 * wide + self.stream_bytes,
        )

    def _stem(self, unit: Unit, place: _Place) -> Op:
        """Return lookups or a convolution stem: their gradients are dense, as large as the weights."""
        leaves = [self.leaves[m] for m in unit.modules if m in self.leaves]
        gradient = temporary = 0.0
        if self.full and self.setup.trains:
            for leaf in leaves:
                fresh = self._own(leaf)
                gradient += fresh * self.gradient_width
                if not fresh:  # shared with the head: made anew, then added to what is there
                    temporary += leaf.parameters * self.gradient_width
        embedded = self.stream_bytes
        return Op(
            unit=place.unit,
            block=None,
            gradient=gradient,
            forward=2 * embedded,
            backward=embedded + temporary,
        )

    def _other(self, unit: Unit, place: _Place) -> Iterator[Op]:
        """Yield layers outside blocks: of all tokens before a head over a vocabulary, else of one token a sequence."""
        every = self._over_vocabulary()
        tokens = place.tokens if every else self.setup.batch_size
        for leaf in self._linears(unit):
            yield self._linear(unit, leaf, place, shared=False, tokens=tokens)
            if every:
                yield self._activation(place, leaf.outputs, product=False)

    def _head(self, unit: Unit, place: _Place) -> Iterator[Op]:
        yield self._norm(place)
        if not self._over_vocabulary():
            kept = self.stream_bytes if place.compute == self.stream and self.full else 0.0
            yield Op(unit=place.unit, block=None, activations=kept)
            for leaf in self._linears(unit):
                yield self._linear(unit, leaf, place, shared=False, tokens=self.setup.batch_size)
            return
        for leaf in self._linears(unit):
            yield from self._vocabulary_head(unit, leaf, place)

    def _vocabulary_head(self, unit: Unit, leaf: Leaf, place: _Place) -> Iterator[Op]:
        tokens, compute = place.tokens, place.compute
        head = self._linear(unit, leaf, place, shared=False)
        elements = float(tokens * leaf.outputs)
        low, wide = elements * compute, elements * _FP32
        if not self.setup.trains:
            yield replace(head, forward=head.forward, forward_logits=low)
            return
        if self.setup.loss is Loss.FUSED:
            # a chunk is as large as the hidden states: Liger-Kernel's rule
            chunk = elements / max(1.0, leaf.outputs / leaf.inputs)
            part = chunk * (compute + 2 * _FP32)
            yield replace(head, result=0.0, forward=head.forward - low + part, forward_logits=part, backward=part)
            return
        if self.setup.loss is Loss.NARROW:  # whoever called the model holds the logits
            yield replace(head, backward_logits=low)
            yield Op(unit=place.unit, block=None, logits=low, forward=low, forward_logits=low, backward=3 * low)
            return
        # transformers widens logits to FP32 before the loss (`loss_utils.py`); log-softmax keeps its result, and its
        # backward holds the gradient of each of the two
        widened = 0.0 if compute == _FP32 else wide
        yield replace(head, backward_logits=low)
        yield Op(
            unit=place.unit,
            block=None,
            logits=wide,
            forward=low + widened,
            forward_logits=low + widened,
            backward=2 * wide,
            backward_logits=2 * wide,
        )

    # small facts

    def _place(self, unit: Unit) -> _Place:
        match = _BLOCK.match(unit.name)
        chosen = self.formats.get(unit.name, self.plan.ambient)
        # an FP8 unit keeps its operands in the ambient format: they are cast again in the backward
        compute = self.ambient if chosen is Format.FP8 else _WIDTH[chosen]
        return _Place(unit.name, match[1] if match else None, self.setup.tokens, compute, self._stored_width())

    def _linears(self, unit: Unit) -> list[Leaf]:
        return [self.leaves[m] for m in unit.modules if m in self.leaves and self.leaves[m].kind in _LINEAR]

    def _stored_width(self) -> int:
        if not self.full:
            return self.ambient
        return _FP32 if self.setup.policy is StatePolicy.FP32 else 2

    def _packed(self, leaf: Leaf | None, role: Role | None) -> bool:
        """4-bit loaders pack the linear layers of blocks, and leave embeddings, head and norms."""
        return leaf is not None and leaf.kind in _LINEAR and role in (Role.ATTENTION, Role.FFN)

    def _frames(self, place: _Place) -> float:
        """Return what frames hold in a forward without gradients: embeddings, a norm's result and attention's.

        With gradients they are kept for the backward anyway.
        """
        return 3 * self.stream_bytes if place.block is not None else 0.0

    def _trains_weight(self, unit: Unit) -> bool:
        return self.setup.trains and self.full

    def _own(self, leaf: Leaf) -> int:
        """Return a leaf's parameters, or 0 where a leaf that runs its backward earlier has the storage's gradient."""
        if leaf.module not in self.shared:
            return leaf.parameters
        group = next(g for g in self.profile.tied if leaf.module in g)
        return leaf.parameters if leaf.module == group[-1] else 0

    def _heads(self, q_width: int) -> int:
        if self.facts is not None and q_width % self.facts.head_dim == 0:
            return q_width // self.facts.head_dim
        return max(1, q_width // _HEAD_WIDTH)

    def _over_vocabulary(self) -> bool:
        heads = [leaf for u in self.profile.units if u.role is Role.LM_HEAD for leaf in self._linears(u)]
        return any(leaf.outputs == self.vocabulary for leaf in heads)
