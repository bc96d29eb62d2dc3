"""Writes profiles/classes/*.json: what transformers builds of widely used classes, with the sizes left open.

    python benchmarks/classes.py [CLASS…]

A class is built on the meta device with three blocks and sizes that are told apart, and each side of a weight is given
as the words of its size. What is read back is checked against the class built with other sizes. Run it again for each
new transformers that the project moves to.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from catalogue import FOLDER, folded, lines

from autoprec.classes import CLASS_SCHEMA, leaves_trace, profile_by, side_of, sizes_of
from autoprec.probe.units import probe_units
from autoprec.runtime.identity import base_class, canonical_modules, tied_parameters

CLASSES = FOLDER.parent / "classes"
#: no two of these, nor of what they are put together to, are equal; the second set checks what the first one wrote
SIZED = (
    {
        "hidden": 132,
        "layers": 3,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 26,
        "ffn": 391,
        "vocab": 32003,
        "positions": 514,
    },
    {
        "hidden": 96,
        "layers": 5,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 28,
        "ffn": 277,
        "vocab": 33013,
        "positions": 640,
    },
)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = ({"num_labels": 7, "type_vocab_size": 5, **TOKENS}, {"num_labels": 3, "type_vocab_size": 2, **TOKENS})
PLAIN = ("hidden", "ffn", "q", "kv", "head", "vocab", "positions", "labels", "types")
WORDS = (*PLAIN, "3*hidden", "2*ffn", "q+2*kv", "positions+2")
#: classes by family, each with its families' own words for sizes
LLAMA = dict(
    hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", kv_heads="num_key_value_heads",
    head_dim="head_dim", ffn="intermediate_size", vocab="vocab_size", positions="max_position_embeddings",
)  # fmt: skip
BERT = {key: name for key, name in LLAMA.items() if key not in ("kv_heads", "head_dim")}
GPT2 = dict(
    hidden="n_embd", layers="n_layer", heads="n_head", ffn="n_inner", vocab="vocab_size", positions="n_positions"
)
DISTILBERT = dict(
    hidden="dim", layers="n_layers", heads="n_heads", ffn="hidden_dim", vocab="vocab_size",
    positions="max_position_embeddings",
)  # fmt: skip
OPT = {**BERT, "ffn": "ffn_dim"}
BLOOM = dict(hidden="hidden_size", layers="n_layer", heads="n_head", vocab="vocab_size")
NO_HEAD_DIM = {key: name for key, name in LLAMA.items() if key != "head_dim"}
FAMILIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "LlamaForCausalLM": ("llama", LLAMA),
    "MistralForCausalLM": ("mistral", LLAMA),
    "Qwen2ForCausalLM": ("qwen2", NO_HEAD_DIM),
    "Qwen3ForCausalLM": ("qwen3", LLAMA),
    "GemmaForCausalLM": ("gemma", LLAMA),
    "Gemma2ForCausalLM": ("gemma2", LLAMA),
    "Phi3ForCausalLM": ("phi3", NO_HEAD_DIM),
    "LlamaForSequenceClassification": ("llama", LLAMA),
    "Gemma3ForCausalLM": ("gemma3_text", LLAMA),
    "MixtralForCausalLM": ("mixtral", LLAMA),
    "SmolLM3ForCausalLM": ("smollm3", NO_HEAD_DIM),
    "Olmo2ForCausalLM": ("olmo2", NO_HEAD_DIM),
    "GraniteForCausalLM": ("granite", NO_HEAD_DIM),
    "CohereForCausalLM": ("cohere", NO_HEAD_DIM),
    "StableLmForCausalLM": ("stablelm", NO_HEAD_DIM),
    "Starcoder2ForCausalLM": ("starcoder2", NO_HEAD_DIM),
    "PhiForCausalLM": ("phi", NO_HEAD_DIM),
    "OPTForCausalLM": ("opt", OPT),
    "BloomForCausalLM": ("bloom", BLOOM),
    "GPTJForCausalLM": ("gptj", GPT2),
    "GPTNeoXForCausalLM": ("gpt_neox", BERT),
    "GPT2LMHeadModel": ("gpt2", GPT2),
    "BertModel": ("bert", BERT),
    "BertForMaskedLM": ("bert", BERT),
    "BertForSequenceClassification": ("bert", BERT),
    "RobertaForMaskedLM": ("roberta", BERT),
    "RobertaForSequenceClassification": ("roberta", BERT),
    "XLMRobertaForSequenceClassification": ("xlm-roberta", BERT),
    "BertForTokenClassification": ("bert", BERT),
    "RobertaModel": ("roberta", BERT),
    "XLMRobertaModel": ("xlm-roberta", BERT),
    "XLMRobertaForMaskedLM": ("xlm-roberta", BERT),
    "DistilBertForMaskedLM": ("distilbert", DISTILBERT),
    "DistilBertForSequenceClassification": ("distilbert", DISTILBERT),
}


def configuration(name: str, which: int, *, tied: bool, without: str = "") -> dict[str, Any]:
    """Return what a config.json of a class holds, as transformers writes it."""
    family, words = FAMILIES[name]
    sizes = {word: SIZED[which][key] for key, word in words.items() if key != without}
    config = transformers.AutoConfig.for_model(family, **sizes, **OTHERS[which], tie_word_embeddings=tied)
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [name]}


def built(config: dict[str, Any]) -> torch.nn.Module:
    """Return the class that a configuration names, on the meta device."""
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, config["architectures"][0])._from_config(made)
    return model.eval()


def words_of(sizes: Mapping[str, int]) -> dict[int, str]:
    """Return what each number is called; of two names for one, the first."""
    known: dict[int, str] = {}
    for text in WORDS:
        known.setdefault(side_of(text, sizes), text)
    return known


def class_file(name: str, *, tied: bool) -> dict[str, Any]:
    """Return the file of a class whose head shares, or does not share, the embedding's weight."""
    config = configuration(name, 0, tied=tied)
    model, sizes = built(config), sizes_of(config)
    assert sizes is not None
    profile, words = probe_units(model), words_of(sizes)
    word = lambda side: words.get(side, side)  # noqa: E731
    rest = {k: v for k, v in config.items() if leaves_trace(k) and k not in FAMILIES[name][1].values()}
    modules = [
        [
            path,
            base_class(m).__name__,
            [[k, [word(s) for s in p.shape]] for k, p in sorted(m._parameters.items()) if p is not None],
        ]
        for path, m in canonical_modules(model).items()
    ]
    return {
        "schema": CLASS_SCHEMA,
        "transformers": transformers.__version__,
        "class_name": profile.class_name,
        "model_type": config["model_type"],
        "usually_tied": bool(transformers.AutoConfig.for_model(config["model_type"]).tie_word_embeddings),
        "when_tied": [tied],
        "given": list(FAMILIES[name][1]),
        # a size by another family's word is not this class's: it may be read, or not
        "size_keys": sorted(FAMILIES[name][1].values()),
        "defaults": {k: v for k, v in rest.items() if v != sizes["hidden"]},
        # what takes the width's value where nothing else is said
        "as_wide": [k for k, v in rest.items() if v == sizes["hidden"]],
        "ties": [list(group) for group in tied_parameters(model)],
        "tied": [list(group) for group in profile.tied],
        "modules": folded(modules),
        "units": folded([[u.name, str(u.role), list(u.modules), [str(f) for f in u.formats]] for u in profile.units]),
        "pinned": [[pinned.reason, folded(list(pinned.modules))] for pinned in profile.pinned],
        "leaves": folded([[x.module, str(x.kind), word(x.inputs), word(x.outputs)] for x in profile.leaves]),
    }


def given(known: dict[str, Any], name: str, tied: bool) -> list[str]:
    """Return the sizes that a config.json must give, since without them the class takes numbers of its own."""
    words = FAMILIES[name][1]
    found = list(words)
    for key in words:
        config = configuration(name, 0, tied=tied)
        del config[words[key]]
        rest = [other for other in words if other != key]
        ours = profile_by({**known, "given": rest}, config, name)
        if ours is not None and ours == probe_units(built(config), model_id=name):
            found.remove(key)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    CLASSES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FAMILIES:
        both = [class_file(name, tied=tied) for tied in (False, True)]
        alike = all(both[0][key] == both[1][key] for key in ("ties", "modules", "leaves"))
        if alike:
            both = [{**both[0], "when_tied": [False, True]}]
        for known in both:
            known["given"] = given(known, name, known["when_tied"][0])
            for which in (0, 1):
                config = configuration(name, which, tied=known["when_tied"][0])
                assert profile_by(known, config, name) == probe_units(built(config), model_id=name), (name, which)
            stem = name if known["when_tied"] != [True] else f"{name}-tied"
            (CLASSES / f"{stem}.json").write_text(lines(known))
            print(
                f"{stem:44} {len(known['modules'])} modules outside blocks, given: {' '.join(known['given'])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
