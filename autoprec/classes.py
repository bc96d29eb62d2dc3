"""Models of widely used classes from their configuration alone, without torch or transformers.

`profiles/classes` holds what transformers builds of a class, with the sizes left open: every module, unit and leaf,
repeated blocks once (`benchmarks/classes.py` writes it). A configuration that differs from the class's own in anything
but sizes, and what leaves no trace in names, classes and shapes, is not answered here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoprec.catalog import data_files
from autoprec.errors import ModelError
from autoprec.facts import SIZES, facts_of
from autoprec.models import expand, is_installed, read_structure, structure_profile
from autoprec.records import ModelProfile, structure_fingerprint

__all__ = ["CLASS_SCHEMA", "NEUTRAL", "class_profile", "leaves_trace", "profile_by", "side_of", "sizes_of"]

CLASS_SCHEMA = "autoprec/class@1"
_TIE = "tie_word_embeddings"
#: keys that leave no trace in the structure of any class of the folder
NEUTRAL = frozenset(
    {
        "activation_dropout", "architectures", "attention_dropout", "attention_multiplier",
        "attention_probs_dropout_prob", "attn_logit_softcapping", "attn_pdrop", "classifier_dropout", "clip_qkv",
        "dropout", "dtype", "embd_pdrop", "embedding_dropout", "embedding_multiplier", "final_logit_softcapping",
        "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "init_std",
        "initializer_factor", "initializer_range", "layer_norm_eps", "layer_norm_epsilon", "layerdrop", "logit_scale",
        "logits_scaling", "max_window_layers", "n_ctx", "no_rope_layer_interval", "no_rope_layers", "norm_eps",
        "norm_epsilon", "num_experts_per_tok", "output_attentions", "output_hidden_states", "output_router_logits",
        "partial_rotary_factor", "position_embedding_type", "pretraining_tp", "problem_type", "query_pre_attn_scalar",
        "resid_pdrop", "residual_dropout", "residual_multiplier", "return_dict", "rms_norm_eps", "rope_local_base_freq",
        "rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "router_aux_loss_coef", "router_jitter_noise",
        "sliding_window", "sliding_window_pattern", "task_specific_params", "tie_weights_", "torch_dtype",
        "transformers_version", "use_cache", "use_sliding_window",
    }
)  # fmt: skip
#: sizes that are no facts of a model
_LABELS, _TYPES = ("id2label", "label2id", "num_labels"), "type_vocab_size"
#: kinds of layers that are built alike
_LAYERS, _ALIKE = "layer_types", {"full_attention", "sliding_attention"}
_FREE = NEUTRAL.union({_TIE, _TYPES, _LAYERS, "model_type"}, _LABELS)


def class_profile(config: Mapping[str, Any], model_id: str) -> ModelProfile | None:
    """Return the profile of a configuration, as `probe_units` finds it in its class; None where it is not known here.

    Args:
        config: the contents of a config.json.
        model_id: what the profile calls it.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    for stem, file in data_files("profiles", "classes", ending=".json").items():
        if stem.partition("-")[0] != name:
            continue
        known = read_structure(file, CLASS_SCHEMA)
        if is_installed(known["transformers"]) and (profile := profile_by(known, config, model_id)):
            return profile
    return None


def profile_by(known: Mapping[str, Any], config: Mapping[str, Any], model_id: str) -> ModelProfile | None:
    """Return the profile of a configuration by a class's file; None where the file does not hold for it."""
    sizes = sizes_of(config, known["given"]) if _fits(known, config) else None
    if sizes is None or any(config.get(key) != sizes["hidden"] for key in known["as_wide"]):
        return None
    return _profile(known, sizes, model_id)


def sizes_of(config: Mapping[str, Any], given: Sequence[str] = ()) -> dict[str, int] | None:
    """Return the sizes that a configuration has, by their words in the files; None where one is missing or none.

    Args:
        given: those of `SIZES` that do not follow from others.
    """
    if not all(any(config.get(key) is not None for key in SIZES[size]) for size in given):
        return None
    try:
        facts = facts_of(config)
    except ModelError:
        return None
    labels = config.get("id2label")
    sizes = {
        "layers": facts.layers,
        "hidden": facts.hidden,
        "ffn": facts.ffn,
        "q": facts.heads * facts.head_dim,
        "kv": facts.kv_heads * facts.head_dim,
        "head": facts.head_dim,
        "vocab": facts.vocab,
        "positions": facts.max_positions or 0,
        "labels": len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2),
        "types": config.get(_TYPES, 0),
    }
    whole = all(isinstance(size, int) and size >= 0 for size in sizes.values()) and facts.hidden % facts.heads == 0
    # a head as wide as the stream, or labels as many as words, are told apart by more than their sizes
    return sizes if whole and len({facts.hidden, sizes["vocab"], sizes["labels"]}) == 3 else None


def _fits(known: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Say whether a configuration has what the class was built with, but for sizes and what leaves no trace."""
    usual = known["defaults"]
    if (
        config.get("model_type") != known["model_type"]
        or config.get(_TIE, known["usually_tied"]) not in known["when_tied"]
    ):
        return False
    kinds = config.get(_LAYERS)
    if not (kinds is None or (isinstance(kinds, list) and _ALIKE.issuperset(map(str, kinds)))):
        return False
    named = {*known["size_keys"], *known["as_wide"]}
    rest = (key for key in config if key not in named and leaves_trace(key))
    return all(key in usual and config[key] == usual[key] for key in rest)


def leaves_trace(key: str) -> bool:
    """Say whether a key of a configuration may decide about the structure; what a family calls its sizes does."""
    return not (key in _FREE or key.startswith("_") or key.endswith("_token_id"))


def _profile(known: Mapping[str, Any], sizes: Mapping[str, int], model_id: str) -> ModelProfile:
    """Build the profile of a class with these sizes."""

    def of_all_blocks(rows: Sequence[Any]) -> list[Any]:
        grown = [{**r, "times": [r["times"][0], sizes["layers"]]} if isinstance(r, Mapping) else r for r in rows]
        return list(expand(grown))

    rows = [
        [name, kind, [[key, [side_of(side, sizes) for side in shape]] for key, shape in owned]]
        for name, kind, owned in of_all_blocks(known["modules"])
    ]
    counts = {name: sum(math.prod(shape) for _, shape in owned) for name, _, owned in rows}
    each = {f"{name}.{key}": math.prod(shape) for name, _, owned in rows for key, shape in owned}
    twice = sum(each[parameter] for group in known["ties"] for parameter in group[1:])
    leaves = [
        [module, kind, side_of(inputs, sizes), side_of(outputs, sizes), counts[module]]
        for module, kind, inputs, outputs in of_all_blocks(known["leaves"])
    ]
    structure = {
        **known,
        "fingerprint": structure_fingerprint(rows, known["ties"]),
        "parameters": sum(counts.values()) - twice,
        "units": of_all_blocks(known["units"]),
        "pinned": [[reason, of_all_blocks(modules)] for reason, modules in known["pinned"]],
        "leaves": leaves,
    }
    return structure_profile(structure, model_id, f"class file of {known['class_name']}")


def side_of(text: int | str, sizes: Mapping[str, int]) -> int:
    """Return a number, or what words such as `3*hidden` or `q+2*kv` come to."""
    if isinstance(text, int):
        return text
    terms = (term.split("*") for term in text.split("+"))
    return sum(math.prod(int(word) if word.isdigit() else sizes[word] for word in term) for term in terms)
