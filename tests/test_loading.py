"""Models from a name: what is loaded, and every way a folder can be bad."""

from __future__ import annotations

import json
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert_classifier, bert_encoder, bert_masked, gpt2, save, t5

from autoprec.errors import DeviceError, ModelError, UsageError
from autoprec.probe.loading import load_function, load_model, load_skeleton
from autoprec.records import Task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a sound folder of a GPT-2."""
    return save(gpt2(), tmp_path / "gpt2")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights after a change."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(model: str | Path, pattern: str, **options: Any) -> str:
    """Load, expecting one line of ModelError that matches; return the message."""
    with pytest.raises(ModelError, match=pattern) as caught:
        load_model(str(model), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loads_a_folder_in_fp32_and_eval(folder: Path) -> None:
    torch.manual_seed(1)
    original = gpt2().to(torch.bfloat16)
    original.save_pretrained(folder)  # transformers alone would load it as bfloat16 again
    loaded = load_model(str(folder))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert (loaded.task, loaded.model_id) == (Task.CAUSAL_LM, str(folder))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("ab")["input_ids"] == [69, 70]  # 5 special tokens, then the bytes from '!' on
    for (name, ours), theirs in zip(loaded.model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs.float()), name


@pytest.mark.parametrize(
    ("make", "class_name", "task"),
    [
        (gpt2, "GPT2LMHeadModel", Task.CAUSAL_LM),
        (bert_masked, "BertForMaskedLM", Task.MASKED_LM),
        (bert_encoder, "BertModel", Task.ENCODER),
        (lambda: bert_classifier(3), "BertForSequenceClassification", Task.CLASSIFICATION),
        (t5, "T5ForConditionalGeneration", Task.SEQ2SEQ),
    ],
)
def test_class_and_task_come_from_the_configuration(
    tmp_path: Path, make: Callable[[], Any], class_name: str, task: Task
) -> None:
    make().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (type(loaded.model).__name__, loaded.task, loaded.tokenizer) == (class_name, task, None)


def test_a_task_chooses_another_class(folder: Path) -> None:
    loaded = load_model(str(folder), task=Task.ENCODER)
    assert type(loaded.model).__name__ == "GPT2Model"
    refused(folder, "no class of task masked-lm for a gpt2 model", task=Task.MASKED_LM)


def test_a_configuration_without_architecture_needs_a_task(folder: Path) -> None:
    edit_config(folder, architectures=None)
    refused(folder, "names no class.*--task")
    assert type(load_model(str(folder), task=Task.CAUSAL_LM).model).__name__ == "GPT2LMHeadModel"


def test_unused_weights_are_said(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"transformer.extra.weight": torch.zeros(2)}))
    assert any("transformer.extra.weight" in note for note in load_model(str(folder)).notes)


def test_missing_folder_and_missing_configuration(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no model folder .*none")
    refused(tmp_path, "no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter without its base model")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "damaged or cut off")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "not a JSON object")


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, r"no weights \(model.safetensors\); model.gguf cannot be used")


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["empty", "in-length", "in-header", "in-data"])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "cut off")


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    refused(folder, f"damaged: {len(whole) + 1} bytes")
    path.write_bytes(whole[:8] + b"!" + whole[9:])
    refused(folder, "header cannot be read")
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(folder, "holds no tensors")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "git lfs pull")


def test_sharded_weights(folder: Path) -> None:
    reference = load_model(str(folder)).model
    (folder / "model.safetensors").unlink()
    cast(Any, reference).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(str(folder)).model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-4])
    refused(folder, f"{shards[-1].name} is cut off")
    shards[-1].unlink()
    refused(folder, f"missing from .*{shards[-1].name}")


def test_pickled_weights_that_load_safely(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = load_model(str(folder)).model
    assert torch.equal(loaded.get_parameter("transformer.wte.weight"), weights["transformer.wte.weight"])
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "safe loading failed")


class Intruder:
    """Would write a file when unpickled by an ordinary reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_weights_that_run_code_are_refused(folder: Path, write: Callable[[Any, Path], Any]) -> None:
    (folder / "model.safetensors").unlink()
    write({"transformer.wte.weight": Intruder(folder / "ran")}, folder / "pytorch_model.bin")
    refused(folder, "refused: pickled weights can run code")
    assert not (folder / "ran").exists()


def test_remote_code_is_refused_unless_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers copies the code here before it runs it, and looks for it on the path
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own-gpt'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    save(gpt2(), tmp_path)
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_config(tmp_path, auto_map=names, architectures=["OwnModel"], model_type="own-gpt")
    refused(tmp_path, r"modeling_own.*--trust-remote-code")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_skeleton(str(tmp_path))
    loaded = load_model(str(tmp_path), trust_remote_code=True)
    assert (type(loaded.model).__name__, loaded.task) == ("OwnModel", Task.CAUSAL_LM)
    assert next(load_skeleton(str(tmp_path), trust_remote_code=True).parameters()).is_meta


def test_remote_code_of_a_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps(content))
    refused(folder, r"tokenizer_config.json names own.OwnTokenizer")


def test_missing_weights_are_an_error_but_tied_ones_are_not(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(str(folder))
    edit_weights(folder, lambda weights: weights.__delitem__("transformer.h.0.mlp.c_fc.weight"))
    refused(folder, "lack transformer.h.0.mlp.c_fc.weight.*random")


def test_a_head_that_was_never_trained_is_an_error(folder: Path) -> None:
    refused(folder, "score.weight.*--task classification", task=Task.CLASSIFICATION)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, n_embd=32)
    refused(folder, "cannot load the model")


def test_weights_that_are_not_finite(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["transformer.h.0.attn.c_attn.bias"].__setitem__(3, float("nan")))
    refused(folder, r"'transformer.h.0.attn.c_attn.bias' of .* holds NaN")


def test_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"quantised \(gptq\)")


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="no-such-type")
    refused(folder, "cannot load the model .*no-such-type")


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "cannot load the tokenizer")


@pytest.mark.parametrize("model", ["gpt2", "somebody/no-such-model"])
def test_a_hub_id_without_network_advises_a_folder(model: str) -> None:
    refused(model, "is no local folder.*Give a local folder")


def test_a_file_is_no_model(folder: Path) -> None:
    refused(folder / "config.json", "is a file; a model is the folder")


def test_skeleton_has_the_shapes_and_ties_but_no_weights(folder: Path) -> None:
    loaded = load_model(str(folder)).model
    (folder / "model.safetensors").unlink()
    skeleton = load_skeleton(str(folder))
    assert type(skeleton) is type(loaded)
    assert all(p.is_meta and p.dtype == torch.float32 for p in skeleton.parameters())
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in loaded.named_parameters()}
    assert skeleton.get_parameter("lm_head.weight") is skeleton.get_parameter("transformer.wte.weight")


def test_skeleton_of_135_million_parameters_is_light(tmp_path: Path) -> None:
    """The whole process, imports included, stays under 1 GB; the weights alone would be 0.54 GB."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = (
        "import re, sys; from autoprec.probe.loading import load_skeleton; m = load_skeleton(sys.argv[1]);"
        # not ru_maxrss: on Linux that one is inherited from the process that started this one
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read());"
        "print(sum(p.numel() for p in m.parameters()), peak[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    parameters, peak_kb = map(int, done.stdout.split())
    assert parameters == 134_515_008
    assert peak_kb < 1_000_000


def test_function_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("import torch\ndef layer():\n    return torch.nn.Linear(2, 2)\n")
    own = tmp_path / "own.py"
    own.write_text("from helper import layer\ndef build():\n    return layer()\ndef fail():\n    return 1 / 0\nx = 3\n")
    before = list(sys.path)
    loaded = load_model(f"{own}:build")
    assert isinstance(loaded.model, torch.nn.Linear)
    assert loaded.model_id == f"{own}:build"
    assert sys.path == before
    refused(f"{own}:fail", r"raised ZeroDivisionError at own.py line 5")
    refused(f"{own}:biuld", "no function 'biuld'; closest: build")
    refused(f"{own}:x", "no function 'x'")
    refused(f"{tmp_path}/none.py:build", "there is no file")
    own.write_text("def build(:\n")
    refused(f"{own}:build", "SyntaxError at own.py line 1")
    own.write_text("def build():\n    return 3\n")
    refused(f"{own}:build", "returned int")
    with pytest.raises(UsageError, match=re.escape("--metric 'own' is not of the form file.py:function")):
        load_function("own", what="--metric", error=UsageError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(DeviceError, match="'cuda'.*--device cpu"):
        load_model(str(folder), device="cuda")
