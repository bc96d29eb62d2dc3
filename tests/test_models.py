"""The catalogue of models: exact against transformers and publishers, found by name, answered without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprec import models
from autoprec.errors import ModelError
from autoprec.facts import facts_of
from autoprec.models import catalogued_facts, catalogued_profile, expand, find_model, model_names
from autoprec.plan import Plan
from autoprec.probe import described, loading
from autoprec.probe.described import described_model
from autoprec.probe.loading import load_skeleton
from autoprec.probe.units import probe_units
from autoprec.records import Architecture, LeafKind, Mode, Role
from autoprec.runtime.attach import apply

ROOT = Path(__file__).parent.parent
FILES = models.models()


def smallest(family: object) -> str:
    stems = [stem for stem, model in FILES.items() if model.config["model_type"] == family]
    return min(stems, key=lambda stem: catalogued_profile(FILES[stem].id).parameters)


#: the smallest model of each family
FAMILIES = {family: smallest(family) for family in sorted({str(m.config["model_type"]) for m in FILES.values()})}


def published(text: str) -> tuple[int, int]:
    """Return (the count, what its last digit is worth): '8,030,261,248' is exact, '7.61B' and '110M' are not."""
    match = re.fullmatch(r"(\d[\d,]*)(?:\.(\d+))?([MB]?)", text)
    assert match is not None, text
    whole, decimals, unit = match[1].replace(",", ""), match[2] or "", match[3]
    step = {"": 1, "M": 10**6, "B": 10**9}[unit] // 10 ** len(decimals)
    if unit and not decimals:  # 110M and 30B are rounded to their tens
        step *= 10 ** (len(whole) - len(whole.rstrip("0")))
    return int(whole + decimals) * {"": 1, "M": 10**6, "B": 10**9}[unit] // 10 ** len(decimals), step


@pytest.mark.parametrize("stem", FILES)
def test_every_model_file(stem: str) -> None:
    model = FILES[stem]
    profile = catalogued_profile(model.id)
    count, step = published(model.published.parameters)
    # publishers round, and cut off as often
    assert abs(profile.parameters - count) < step, f"{profile.parameters:,} against {model.published.parameters}"
    assert model.published.source
    assert profile.class_name == model.class_name and profile.model_id == model.id
    placed = Counter(m for unit in profile.units for m in unit.modules)
    placed.update(m for pinned in profile.pinned for m in pinned.modules)
    assert all(placed[leaf.module] == 1 for leaf in profile.leaves) and not profile.unassigned
    assert re.fullmatch(r"[0-9a-f]{64}", profile.fingerprint)
    facts = catalogued_facts(model.id)
    assert facts.model_id == model.id and facts.heads % facts.kv_heads == 0


def test_files_come_in_pairs() -> None:
    folder = ROOT / "profiles" / "models"
    assert {f.stem for f in folder.glob("*.toml")} == {f.stem for f in folder.glob("*.json")} == set(FILES)


@pytest.mark.parametrize("stem", FAMILIES.values(), ids=FAMILIES)
def test_structures_are_those_of_the_transformers_installed_here(stem: str, tmp_path: Path) -> None:
    model = FILES[stem]
    made = models.fits_installed(model.id)
    assert made[0], f"made with transformers {made[1]}, here is {made[2]}: run `python benchmarks/catalogue.py`"
    (tmp_path / "config.json").write_text(json.dumps(model.configuration))
    # all of it: fingerprint, units, leaves, what is pinned and tied, parameters
    assert probe_units(load_skeleton(str(tmp_path)), model_id=model.id) == catalogued_profile(model.id)


@pytest.mark.parametrize("stem", FILES)
def test_facts_do_not_change_when_defaults_are_written_out(stem: str) -> None:
    from transformers import AutoConfig

    model = FILES[stem]
    whole = AutoConfig.for_model(**model.configuration).to_dict()
    assert facts_of(whole, model.id) == catalogued_facts(model.id)


@pytest.mark.parametrize("stem", FILES)
def test_facts_agree_with_the_leaves(stem: str) -> None:
    facts, profile = catalogued_facts(FILES[stem].id), catalogued_profile(FILES[stem].id)
    shapes = {(leaf.inputs, leaf.outputs) for leaf in profile.leaves if leaf.kind is not LeafKind.EMBEDDING}
    assert any(facts.hidden in shape for shape in shapes)
    inner = {facts.ffn, 2 * facts.ffn}  # gate and up may stand in one matrix
    assert any({facts.hidden} <= set(shape) and inner & set(shape) for shape in shapes)
    blocks = sum(unit.role is Role.FFN for unit in profile.units)
    assert blocks == facts.layers + facts.decoder_layers
    lookups = {leaf.inputs for leaf in profile.leaves if leaf.kind is LeafKind.EMBEDDING}
    assert facts.vocab in lookups or facts.architecture is Architecture.VISION
    experts = any(leaf.kind is LeafKind.EXPERTS for leaf in profile.leaves)
    assert experts == (facts.experts > 0)
    heads = {"lm_head", "cls", "decoder", "embed_out", "proj_out", "vocab_projector"}
    tied = [group for group in profile.tied if any(heads & set(name.split(".")) for name in group)]
    if any(unit.role is Role.LM_HEAD for unit in profile.units) and facts.vocab:
        assert bool(tied) == facts.tied


@pytest.mark.parametrize(
    ("asked", "model_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("google-bert/bert-large-uncased", "google-bert/bert-large-uncased"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("META-LLAMA/llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct"),
        ("facebook/opt-1.3b", "facebook/opt-1.3b"),
    ],
)
def test_names(asked: str, model_id: str) -> None:
    assert catalogued_profile(asked).model_id == model_id


def test_widely_used_families_are_there() -> None:
    assert len(model_names()) >= 40 and list(model_names()) == sorted(model_names())
    assert {m.config["model_type"] for m in FILES.values()} >= {"llama", "mixtral", "qwen3_moe", "t5", "vit", "whisper"}
    assert find_model("no/such") is None


def test_unknown_names_give_the_closest() -> None:
    with pytest.raises(ModelError, match=r"no model 'lama-3\.1-8b'.*closest: llama-3\.1-8b"):
        catalogued_profile("lama-3.1-8b")
    with pytest.raises(ModelError, match=r"not in the catalogue of models; closest: .*mistral.*Give a local folder"):
        described_model("mistralai/Mistral-7B-v0.9")


def test_a_plan_from_the_catalogue_fits_the_real_model() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**FILES["all-minilm-l6-v2"].config)).eval()
    plan = Plan.uniform(catalogued_profile("all-minilm-l6-v2"), "bf16", mode=Mode.INFER)
    applied = apply(model, plan)
    with torch.no_grad():
        assert model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.isfinite().all()
    applied.remove()


def test_recommending_a_catalogued_model_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = """
import json, sys
from autoprec.cli.main import main
try:
    main(["recommend", "meta-llama/Llama-3.1-8B", "--device", "h100-sxm", "--json"])
finally:
    heavy = {"torch", "transformers", "huggingface_hub", "pandas", "sklearn", "optuna"} & set(sys.modules)
    print(json.dumps(sorted(heavy)), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    plan = json.loads(done.stdout)["plan"]
    assert plan["model"]["fingerprint"] == catalogued_profile("llama-3.1-8b").fingerprint
    assert {unit["format"] for unit in plan["units"]} == {"fp32", "bf16", "fp8"}
    assert Plan.load(tmp_path / "plan.json").to_json() == plan


def test_a_local_folder_is_read_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("facebook/opt-125m")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(FILES["opt-125m"].configuration | {"num_hidden_layers": 2}))
    assert len(described_model("facebook/opt-125m")[0].units) < len(catalogued_profile("facebook/opt-125m").units)


def test_another_transformers_is_said_and_cached_files_are_then_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def real_way(*_: Any, **__: Any) -> None:
        raise ModelError("read from its files")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "load_skeleton", real_way)
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(described, "model_folder", lambda name, **_: (snapshot, name))
    (snapshot / "config.json").write_text("{}")
    assert described_model("gpt2") == (catalogued_profile("gpt2"), None)  # the same transformers: no need to look
    monkeypatch.setattr(described, "fits_installed", lambda _: (False, "4.0.0", version("transformers")))
    with pytest.raises(ModelError, match="read from its files"):
        described_model("gpt2")
    (snapshot / "config.json").unlink()
    profile, note = described_model("gpt2")
    assert profile == catalogued_profile("gpt2") and note is not None and "transformers 4.0.0" in note


def test_repeated_rows() -> None:
    rows = ["a.0", {"times": [1, 3], "of": [["b.#", 7], ["c.#.d.0", ["e.#"]]]}, "f"]
    assert list(expand(rows)) == ["a.0", ["b.1", 7], ["c.1.d.0", ["e.1"]], ["b.2", 7], ["c.2.d.0", ["e.2"]], "f"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot be read"), ("[]", "not of schema"), ('{"schema": "autoprec/structure@0"}', "not of schema")],
)
def test_damaged_structure_files(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ModelError, match=rf"x\.json {said}|x\.json is {said}"):
        models.read_structure(file)


@pytest.mark.parametrize("gone", ["units", "leaves", "fingerprint"])
def test_structure_without_a_part(gone: str) -> None:
    data = json.loads((ROOT / "profiles" / "models" / "gpt2.json").read_text())
    assert models.structure_profile(data, "x", "file").parameters == 124_439_808
    del data[gone]
    with pytest.raises(ModelError, match=f"file is damaged .*{gone}"):
        models.structure_profile(data, "x", "file")
