"""What a model's profile, plan and setup say of its operations: widths, formats, and what is trained and stored how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.setup import Adapters, Setup, StatePolicy, TrainMethod
from autoprec.records import Architecture, Leaf, LeafKind, ModelFacts, ModelProfile, Role, Unit

__all__ = ["FORMAT_BYTES", "FP32_BYTES", "Place", "Shape"]

FP32_BYTES = 4
FORMAT_BYTES = {Format.FP32: 4, Format.BF16: 2, Format.FP16: 2}
_BLOCK = re.compile(r"^(.*?blocks\.\d+)\.")
_LINEAR = (LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.QUANTIZED)
#: classes whose activation is written out in Python (transformers' NewGELUActivation): four tensors are kept, not one
_WRITTEN_OUT = ("GPT2", "GPTNeoFor", "GPTJ", "CodeGen", "PhiFor", "PhiModel", "GPTBigCode")
#: classes that add a learned bias to the scores: PyTorch computes such attention in plain operations, in FP32
_BIASED = ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers")
_HEAD_WIDTH = 64  #: features a head where no facts say: that of GPT-2, BERT and small Llamas
#: bytes a weight in NF4: an FP32 scale a block of 64, or one in 8 bits with an FP32 scale for 256 of them (QLoRA,
#: arXiv:2305.14314, section 3)
_NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation stands: its unit, block, tokens, and widths in bytes of computing and of stored weights."""

    unit: str
    block: str | None
    tokens: int
    compute: int
    stored: int

    @property
    def crosses(self) -> bool:
        """Whether it is attention to what an encoder has read."""
        return "cross" in self.unit


class Shape:
    """A model as its operations see it, under a plan and a setup."""

    def __init__(self, profile: ModelProfile, plan: Plan, setup: Setup, facts: ModelFacts | None = None) -> None:
        self.profile, self.plan, self.setup, self.facts = profile, plan, setup, facts
        self.leaves = {leaf.module: leaf for leaf in profile.leaves}
        self.formats = plan.assignment
        self.full = setup.method is TrainMethod.FULL
        self.gradient_width = 2 if self.full and setup.policy is not StatePolicy.FP32 else FP32_BYTES
        order = {module: index for index, unit in enumerate(profile.units) for module in unit.modules}
        #: leaves that share a storage, in the order they run
        self.shared = {m: sorted(g, key=lambda name: order.get(name, -1)) for g in profile.tied for m in g}

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream."""
        if self.facts is not None:
            return self.facts.hidden
        widths = [self.linears(unit)[-1].outputs for unit in self.profile.units if self.linears(unit)]
        return max(set(widths), key=widths.count) if widths else self.profile.leaves[0].outputs

    @cached_property
    def gated(self) -> bool:
        """Whether an FFN multiplies two projections."""
        if self.facts is not None:
            return self.facts.gated
        return any(len(self.linears(u)) == 3 for u in self.profile.units if u.role is Role.FFN)

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
    def head_norms(self) -> bool:
        """Whether queries and keys have norms of their own, as in Qwen3."""
        return any(m.endswith(".q_norm") for pinned in self.profile.pinned for m in pinned.modules)

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
        return FORMAT_BYTES[self.plan.stream]

    @property
    def ambient(self) -> int:
        """Bytes an element of what no unit decides."""
        return FORMAT_BYTES[self.plan.ambient]

    @property
    def stream_bytes(self) -> float:
        """Bytes of the residual stream of one micro-batch."""
        return float(self.setup.tokens * self.hidden * self.stream)

    def weight_bytes(self, leaf: Leaf | None, parameters: int, role: Role | None) -> float:
        """Return the bytes that some parameters take as they are stored."""
        if self.setup.method is TrainMethod.QLORA and self.is_packed(leaf, role):
            return _NF4[self.setup.double_quant] * parameters
        return self.stored_width() * parameters

    def trained(self, unit: Unit | None, parameters: int) -> int:
        """Return how many parameters of a unit are trained (None: those outside units)."""
        if not self.setup.trains:
            return 0
        if self.full:
            return parameters
        return 0 if unit is None else sum(self.adapter(unit, leaf) for leaf in self.linears(unit))

    def adapter(self, unit: Unit, leaf: Leaf) -> int:
        """Return the parameters of the adapters beside a leaf; 0 where it has none."""
        if not self.setup.trains or self.full or unit.role not in (Role.ATTENTION, Role.FFN):
            return 0
        rank = self.setup.adapter_rank
        if self.setup.adapters is Adapters.ALL:
            return rank * (leaf.inputs + leaf.outputs)
        leaves = self.linears(unit)
        if unit.role is not Role.ATTENTION or leaf is leaves[-1]:
            return 0
        if len(leaves) == 2:  # a joint projection has an adapter for each of the two
            key = (leaf.outputs - leaves[-1].inputs) // 2
            return rank * (2 * leaf.inputs + leaf.outputs - key)
        return rank * (leaf.inputs + leaf.outputs) if leaf in (leaves[0], leaves[2]) else 0

    def own_leaves(self, unit: Unit) -> list[Leaf]:
        """Return the leaves of a unit whose storage is its own; a shared one is where it is used first."""
        return [self.leaves[m] for m in unit.modules if m in self.leaves and self.shared.get(m, [m])[0] == m]

    def place(self, unit: Unit) -> Place:
        """Return where the operations of a unit stand."""
        match = _BLOCK.match(unit.name)
        chosen = self.formats.get(unit.name, self.plan.ambient)
        # an FP8 unit keeps its operands in the ambient format: they are cast again in the backward
        compute = self.ambient if chosen is Format.FP8 else FORMAT_BYTES[chosen]
        return Place(unit.name, match[1] if match else None, self.setup.tokens, compute, self.stored_width())

    def likeness(self, unit: Unit) -> tuple[object, ...]:
        """Return what two units have in common whose operations are the same."""
        leaves = [self.leaves[m] for m in unit.modules if m in self.leaves]
        same = tuple((x.kind, x.inputs, x.outputs, x.parameters, self.fresh_parameters(x)) for x in leaves)
        place = self.place(unit)
        return unit.role, self.formats.get(unit.name), place.block is not None, place.crosses, same

    def linears(self, unit: Unit) -> list[Leaf]:
        """Return the matmul leaves of a unit in order."""
        return [self.leaves[m] for m in unit.modules if m in self.leaves and self.leaves[m].kind in _LINEAR]

    def stored_width(self) -> int:
        """Return the bytes of a stored weight that is not packed."""
        if not self.full:
            return self.ambient
        return FP32_BYTES if self.setup.policy is StatePolicy.FP32 else 2

    def is_packed(self, leaf: Leaf | None, role: Role | None) -> bool:
        """Tell whether a 4-bit loader packs a leaf: the linear layers of blocks, not embeddings, head and norms."""
        return leaf is not None and leaf.kind in _LINEAR and role in (Role.ATTENTION, Role.FFN)

    def frames_bytes(self, place: Place) -> float:
        """Return what frames hold in a forward without gradients: embeddings, a norm's result and attention's.

        With gradients they are kept for the backward anyway.
        """
        return 3 * self.stream_bytes if place.block is not None else 0.0

    def fresh_parameters(self, leaf: Leaf) -> int:
        """Return a leaf's parameters, or 0 where a leaf that runs its backward earlier has the storage's gradient."""
        return leaf.parameters if self.shared.get(leaf.module, [leaf.module])[-1] == leaf.module else 0

    def heads(self, q_width: int) -> int:
        """Return the query heads of a projection of some width."""
        if self.facts is not None and q_width % self.facts.head_dim == 0:
            return q_width // self.facts.head_dim
        return max(1, q_width // _HEAD_WIDTH)

    def over_vocabulary(self) -> bool:
        """Tell whether there is a head over the vocabulary, so that every token has logits."""
        heads = [leaf for u in self.profile.units if u.role is Role.LM_HEAD for leaf in self.linears(u)]
        return any(leaf.outputs == self.vocabulary for leaf in heads)

    @cached_property
    def written_activation(self) -> bool:
        """Whether the activation is written out in Python."""
        return self.profile.class_name.startswith(_WRITTEN_OUT)

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights have gradients."""
        return self.setup.trains and self.full
