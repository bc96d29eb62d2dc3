"""Models of widely used classes from their configuration alone: what transformers builds, or no answer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autoprec import classes, models
from autoprec.classes import class_profile
from autoprec.errors import ModelError
from autoprec.models import catalogued_profile
from autoprec.probe.described import describe, described_model
from autoprec.probe.units import probe_units
from autoprec.records import LeafKind

FOLDER = Path(__file__).parent.parent / "profiles" / "classes"
FILES = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
#: what families call their sizes, in the order of `SIZES`
KEYS = [
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("hidden_size", "n_embd", "dim"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
    ("vocab_size",),
    ("max_position_embeddings", "n_positions"),
]
#: usual and unusual ones; then labels and types
SIZES = [
    (2, 64, 4, 2, 16, 192, 300, 128, 2, 2),
    (1, 96, 6, 6, 24, 96, 1001, 96, 1, 1),
    (5, 48, 2, 1, 24, 24, 24, 48, 9, 3),
]


def configuration(stem: str, sizes: tuple[int, ...], *, whole: bool = True) -> dict[str, Any]:
    """Return what transformers writes of a class; `whole`: with what the class has by itself."""
    known = FILES[stem]
    *own, labels, types = sizes
    given = {key: size for keys, size in zip(KEYS, own, strict=True) for key in keys if key in known["size_keys"]}
    if "type_vocab_size" in transformers.AutoConfig.for_model(known["model_type"]).to_dict():
        given["type_vocab_size"] = types
    config = transformers.AutoConfig.for_model(
        known["model_type"], num_labels=labels, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=known["when_tied"][0], **given,
    )  # fmt: skip
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=not whole))
    return {**written, "model_type": known["model_type"], "architectures": [known["class_name"]]}


def built(config: dict[str, Any]) -> torch.nn.Module:
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, config["architectures"][0])._from_config(made)
    return model


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("stem", FILES)
def test_a_profile_is_that_of_the_class_as_transformers_builds_it(stem: str, sizes: tuple[int, ...]) -> None:
    assert models.is_installed(FILES[stem]["transformers"]), "run `python benchmarks/classes.py`"
    config = configuration(stem, sizes)
    # all of it: fingerprint, units, leaves, what is pinned and tied, parameters
    assert class_profile(config, "x") == probe_units(built(config), model_id="x")


@pytest.mark.parametrize("stem", FILES)
def test_what_a_file_leaves_out_is_the_class_s_own_or_not_answered(stem: str) -> None:
    config = configuration(stem, SIZES[0], whole=False)
    found = class_profile(config, "x")
    assert found is None or found == probe_units(built(config), model_id="x")


def test_catalogued_models_of_these_classes_come_out_the_same() -> None:
    known = [m for m in models.models().values() if m.class_name in FILES or f"{m.class_name}-tied" in FILES]
    answered = 0
    for model in known:
        found = class_profile(model.configuration, model.id)
        answered += found is not None
        assert found in (None, catalogued_profile(model.id)), model.id
    assert answered > len(known) / 2  # a catalogued configuration gives less than a config.json


LLAMA = "LlamaForCausalLM"


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True}, {"hidden_act": "gelu"}, {"something_new": 1}, {"model_type": "mistral"},
        {"architectures": ["LlamaForTokenClassification"]}, {"architectures": []}, {"architectures": None},
        {"intermediate_size": None}, {"hidden_size": 65}, {"hidden_size": "64"}, {"hidden_size": -64},
        {"vocab_size": 64}, {"vocab_size": 2}, {"num_hidden_layers": 0},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"tie_word_embeddings": "yes"}, {"vocab_size": True}, {"quantization_config": {"quant_method": "awq"}},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, {"layer_types": 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_may_be_another_structure_is_not_answered(change: dict[str, Any]) -> None:
    config = configuration(LLAMA, SIZES[0])
    assert class_profile(config, "x") is not None
    assert class_profile({**config, **change}, "x") is None


@pytest.mark.parametrize(
    ("stem", "change"),
    [
        ("Qwen2ForCausalLM", {"head_dim": 32}),
        ("Phi3ForCausalLM", {"head_dim": 32}),
        ("GPT2LMHeadModel", {"intermediate_size": 99}),
        ("BertModel", {"num_key_value_heads": 2}),
        (LLAMA, {"d_model": 128}),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
        ("OPTForCausalLM", {"word_embed_proj_dim": None}),
    ],
    ids=str,
)
def test_a_size_by_another_word_is_not_answered(stem: str, change: dict[str, Any]) -> None:
    config = configuration(stem, SIZES[0])
    assert class_profile(config, "x") is not None
    assert class_profile({**config, **change}, "x") is None


def test_what_leaves_no_trace_does_not_matter() -> None:
    config = configuration(LLAMA, SIZES[0])
    other = {"rope_theta": 5e5, "torch_dtype": "float16", "unk_token_id": 7, "_name_or_path": "y", "use_cache": False}
    assert class_profile({**config, **other}, "x") == class_profile(config, "x")


@pytest.mark.parametrize("stem", FILES)
def test_what_is_said_to_leave_no_trace_leaves_none(stem: str) -> None:
    config = configuration(stem, SIZES[0])

    def other(value: Any) -> Any:
        return (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.125

    changed = {
        key: other(value) for key, value in config.items() if key in classes.NEUTRAL and isinstance(value, int | float)
    }
    assert changed.keys() & {"use_cache", "initializer_range", "init_std"}
    assert probe_units(built({**config, **changed}), model_id="x") == probe_units(built(config), model_id="x")
    assert class_profile({**config, **changed}, "x") == class_profile(config, "x")


def test_another_transformers_builds_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "is_installed", lambda made: False)
    assert class_profile(configuration(LLAMA, SIZES[0]), "x") is None


def test_a_folder_is_described_without_torch_and_fits_its_model(tmp_path: Path) -> None:
    config = configuration("LlamaForCausalLM-tied", SIZES[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys; from autoprec.probe.described import described_model; from autoprec.plan import Plan;"
        "from autoprec.catalog import find_device; p, _ = described_model(sys.argv[1]);"
        "Plan.uniform(p, 'bf16', device=find_device('h100-sxm')).save(sys.argv[2]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    plan = tmp_path / "plan.json"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(plan)], check=True)
    from autoprec import Plan, applied

    made = transformers.AutoConfig.for_model(**config)
    model = transformers.LlamaForCausalLM._from_config(made)
    with applied(model, Plan.load(plan)):
        assert model(torch.ones(1, 4, dtype=torch.long)).logits.dtype is torch.bfloat16
    described, facts = describe(str(tmp_path))
    assert described == dataclasses.replace(probe_units(model), model_id=str(tmp_path))
    assert facts is not None and facts.tied and described.leaves[0].kind is LeafKind.EMBEDDING


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "runs code of its own"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"hidden_size": 0}, "have no weights .first: model.embed_tokens.. A size in its configuration is 0"),
    ],
)
def test_what_cannot_be_loaded_is_refused_as_before(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {**configuration(LLAMA, SIZES[0]), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        described_model(str(tmp_path))
