"""The units of a model as its facts imply them, for a model that is known by its configuration alone.

Names, roles and widths are those that `probe_units` finds in transformers' classes; the parameters of biases and norms
are counted as the architecture has them.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoprec.records import (
    Architecture,
    Leaf,
    LeafKind,
    ModelFacts,
    ModelProfile,
    Pinned,
    Role,
    Unit,
    role_formats,
)

__all__ = ["skeleton_profile"]


#: classes of transformers that project queries, keys and values with one matrix
_JOINT = ("Bloom", "CodeGen", "Falcon", "GPT2", "GPTBigCode", "GPTNeoX", "Mpt", "Phi3")


def skeleton_profile(facts: ModelFacts, class_name: str = "", *, joint: bool | None = None) -> ModelProfile:
    """Return the profile that facts imply: embeddings, each block's attention and FFN, and the head.

    Biases are those of the architecture: none in a gated decoder, everywhere else. `joint` says whether queries, keys
    and values are one projection; by default it is known by the class.
    """
    units: list[Unit] = []
    leaves: list[Leaf] = []
    for name, role, own in _parts(facts, class_name.startswith(_JOINT) if joint is None else joint):
        units.append(Unit(name, role, tuple(leaf.module for leaf in own), role_formats(role)))
        leaves += own
    tied = (("embed_tokens", "lm_head"),) if facts.tied and _has_head(facts) else ()
    stored = sum(leaf.parameters for leaf in leaves if not (tied and leaf.module == "lm_head"))
    return ModelProfile(
        model_id=facts.model_id,
        class_name=class_name,
        fingerprint="",
        units=tuple(units),
        pinned=(Pinned(("norms",), "norm: runs as the ambient autocast runs it"),),
        unassigned=(),
        leaves=tuple(leaves),
        tied=tied,
        parameters=stored + _norm_parameters(facts) + _router_parameters(facts),
    )


def _parts(facts: ModelFacts, joint: bool) -> Iterator[tuple[str, Role, list[Leaf]]]:
    if facts.architecture is not Architecture.VISION:
        yield "embeddings", Role.EMBEDDING, list(_embeddings(facts))
    if facts.architecture is Architecture.ENCODER_DECODER:
        yield from _stack(facts, "encoder.", facts.layers, joint, cross=False)
        yield from _stack(facts, "decoder.", facts.decoder_layers, joint, cross=True)
    else:
        yield from _stack(facts, "", facts.layers, joint, cross=False)
    if _has_head(facts):
        yield "lm_head", Role.LM_HEAD, [_linear("lm_head", facts.hidden, facts.vocab, bias=False)]


def _embeddings(facts: ModelFacts) -> Iterator[Leaf]:
    yield Leaf("embed_tokens", LeafKind.EMBEDDING, facts.vocab, facts.hidden, facts.vocab * facts.hidden)
    learned = not facts.gated and facts.architecture in (Architecture.DECODER, Architecture.ENCODER)
    if learned and facts.max_positions:
        count = facts.max_positions * facts.hidden
        yield Leaf("embed_positions", LeafKind.EMBEDDING, facts.max_positions, facts.hidden, count)


def _stack(
    facts: ModelFacts, prefix: str, layers: int, joint: bool, *, cross: bool
) -> Iterator[tuple[str, Role, list[Leaf]]]:
    for index in range(layers):
        name = f"{prefix}blocks.{index}"
        yield f"{name}.attention", Role.ATTENTION, list(_attention(facts, f"{name}.attention", joint))
        if cross:
            yield (
                f"{name}.cross_attention",
                Role.ATTENTION,
                list(_attention(facts, f"{name}.cross_attention", joint=False)),
            )
        yield f"{name}.ffn", Role.FFN, list(_ffn(facts, f"{name}.ffn"))


def _attention(facts: ModelFacts, name: str, joint: bool) -> Iterator[Leaf]:
    width, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    bias = _biases(facts)
    for letter, outputs in (("qkv", width + 2 * kv),) if joint else (("q", width), ("k", kv), ("v", kv)):
        yield _linear(f"{name}.{letter}", facts.hidden, outputs, bias=bias)
    yield _linear(f"{name}.o", width, facts.hidden, bias=bias)


def _ffn(facts: ModelFacts, name: str) -> Iterator[Leaf]:
    if facts.experts:
        matrices = 3 if facts.gated else 2
        count = facts.experts * matrices * facts.hidden * facts.ffn
        yield Leaf(f"{name}.experts", LeafKind.EXPERTS, facts.hidden, facts.ffn, count)
        return
    for word in ("gate", "up") if facts.gated else ("up",):
        yield _linear(f"{name}.{word}", facts.hidden, facts.ffn, bias=_biases(facts))
    yield _linear(f"{name}.down", facts.ffn, facts.hidden, bias=_biases(facts))


def _linear(name: str, inputs: int, outputs: int, *, bias: bool) -> Leaf:
    return Leaf(name, LeafKind.LINEAR, inputs, outputs, inputs * outputs + (outputs if bias else 0))


def _biases(facts: ModelFacts) -> bool:
    return not facts.gated and facts.architecture is not Architecture.ENCODER_DECODER


def _has_head(facts: ModelFacts) -> bool:
    return facts.architecture in (Architecture.DECODER, Architecture.ENCODER_DECODER)


def _norm_parameters(facts: ModelFacts) -> int:
    """Return the parameters of two norms a block (three with cross-attention) and the last one, with their biases."""
    norms = 2 * facts.layers + 3 * facts.decoder_layers + 1 + bool(facts.decoder_layers)
    return norms * facts.hidden * (2 if _biases(facts) else 1)


def _router_parameters(facts: ModelFacts) -> int:
    return facts.layers * facts.experts * facts.hidden
