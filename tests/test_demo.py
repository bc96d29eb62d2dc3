"""The demo model that ships: it is whole, it is trained, and it needs no network."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoprec.demo import folder, text_path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder())


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> torch.Tensor:
    # the backend, because the tokenizer itself warns of a text longer than the context
    return torch.tensor(tokenizer.backend_tokenizer.encode(text_path().read_text(encoding="utf-8")).ids)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    model, report = AutoModelForCausalLM.from_pretrained(folder(), output_loading_info=True)
    return model.eval(), report


def windows(tokens: torch.Tensor, context: int, count: int) -> torch.Tensor:
    starts = torch.linspace(0, len(tokens) - context, count).long()
    return torch.stack([tokens[start : start + context] for start in starts])


def test_the_model_loads_whole_in_fp32(loaded: tuple[Any, dict[str, Any]]) -> None:
    model, report = loaded
    assert not any(report.values()), report
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert 800_000 <= model.num_parameters() <= 1_300_000


def test_the_model_has_learnt(loaded: tuple[Any, dict[str, Any]], tokens: torch.Tensor) -> None:
    model, _ = loaded
    batch = windows(tokens, model.config.n_positions, 64)
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    # the frequencies of single tokens, taken from the very text: the best that is possible without context
    counts = Counter(tokens.tolist())
    unigram = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    # a third less than that takes the words before into account; without training it is log(1024) = 6.9
    assert loss < 2 / 3 * unigram
    # and the recorded figure is that of this model: windows differ by 0.2 nats, 64 of them leave a standard error of
    # 0.025; four times that
    recorded = json.loads((folder().parent / "training.json").read_text())
    assert loss == pytest.approx(recorded["held_out_nats_per_token"], abs=0.1)
    assert unigram == pytest.approx(recorded["held_out_unigram_entropy_nats"], abs=1e-3)
    assert model.num_parameters() == recorded["parameters"]


def test_the_readme_gives_the_recorded_figures() -> None:
    recorded = json.loads((folder().parent / "training.json").read_text())
    readme = (folder().parent / "README.md").read_text()
    for key in ("held_out_nats_per_token", "held_out_unigram_entropy_nats", "steps", "parameters", "date", "command"):
        value = recorded[key]
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else value
        assert shown in readme, f"README.md does not give {key} = {shown}"


@pytest.mark.parametrize("text", ["Elinor  could not deny it.\n", "na\u00efve \u6771\u4eac \U0001f600\t\r\n", ""])
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_texts_can_be_padded_to_a_batch(tokenizer: Any, loaded: tuple[Any, dict[str, Any]]) -> None:
    texts = ["Elinor", "The family of Dashwood had long been settled"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert torch.isfinite(loaded[0](**batch).logits).all()


def test_the_text_is_english_of_the_promised_size() -> None:
    size = text_path().stat().st_size
    assert 250_000 <= size <= 350_000
    text = text_path().read_text(encoding="utf-8")
    assert text.startswith("SENSE AND SENSIBILITY")
    assert "\ufffd" not in text


def test_finding_the_demo_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from autoprec.demo import folder; folder(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_it_loads_and_generates_without_a_word() -> None:
    # warnings of Transformers go to stderr through logging, so only a process of its own shows them all
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained({str(folder())!r})
model = AutoModelForCausalLM.from_pretrained({str(folder())!r})
batch = tokenizer("The family of", return_tensors="pt")
model(**batch, labels=batch["input_ids"])
print(tokenizer.decode(model.generate(**batch, max_new_tokens=4, do_sample=False)[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The family of ")
    said = [line for line in done.stderr.splitlines() if "[transformers]" in line or "Warning" in line]
    # the one word no config prevents: Transformers 5 reads no loss from the name GPT2LMHeadModel, and says so
    assert not [line for line in said if "`loss_type=None` was set in the config" not in line], done.stderr
