"""What a recommendation says beside its plan: the plans next to it, what would change it, and code that runs."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from autoprec.catalog import find_device
from autoprec.cli.main import main
from autoprec.demo import folder
from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.plan import Plan
from autoprec.predict.forecast import speed_ratio
from autoprec.predict.memory import setup_of
from autoprec.predict.steptime import StepTime, predict_step
from autoprec.recommender.recommender import Recommendation, recommend
from autoprec.records import FormatSupport, Role, Support

LLAMA = "meta-llama/Llama-3.1-8B"


@cache
def recommended(model: str, device: str, **options: Any) -> Recommendation:
    return recommend(model, device=device, **options)


def priced(plan: Plan, batch_size: int) -> StepTime:
    """Return the compiled step of Llama on H100, by the time model alone."""
    device = find_device("h100-sxm")
    setup = setup_of(plan, batch_size, 512, method="lora")
    return predict_step(catalogued_profile(LLAMA), plan, device, setup, catalogued_facts(LLAMA), compiled=True)


# one step to either side


def test_one_step_safer_and_one_faster_with_their_price() -> None:
    done = recommended(LLAMA, "h100-sxm", method="lora")
    low = [u.name for u in done.plan.units if u.format is Format.FP8]
    assert {done.plan.unit(name).role for name in low} == {Role.FFN}  # else its attention would go back first
    assert done.safer["what"] == f"all {len(low)} fp8 units back to bf16"
    assert done.safer["units"] == len(low) > 0
    expected = priced(done.plan.replace(dict.fromkeys(low, "bf16")), 8).step_ms.value
    assert done.safer["step_ms"]["value"] == pytest.approx(expected)
    assert done.safer["speedup"]["value"] < 1 < done.faster["speedup"]["value"]
    assert done.safer["step_ms"]["origin"] == "predicted" and "measure" in done.safer["drop"]


@pytest.mark.parametrize(
    ("device", "options", "safer", "faster"),
    [
        ("a100-sxm", {}, "lm_head in fp32, multiplied in tf32", None),
        ("a100-sxm", {"max_drop": 0.0}, None, "tf32 on"),
        ("t4", {"max_drop": 0.0}, None, "matmuls in fp16"),
        ("p100", {}, None, None),
    ],
)
def test_steps_where_formats_end(device: str, options: dict[str, Any], safer: str | None, faster: str | None) -> None:
    done = recommended("gpt2", device, **options)
    assert (done.safer["what"], done.faster["what"]) == (safer, faster)
    for step in (done.safer, done.faster):
        assert step["what"] is not None or step["reason"]
    if faster:
        assert done.faster["speedup"]["value"] > 1.01


def test_a_device_without_a_time_model_has_no_price_and_says_so() -> None:
    done = recommended("gpt2", "cpu-amx-bf16")
    assert done.safer["what"] == "lm_head in fp32" and done.safer["speedup"] is None
    assert done.faster["what"] is None and done.faster["reason"]
    assert not [c for c in done.changes if c["kind"] == "tokens"]


def test_a_device_with_nothing_native_gets_fp32_and_a_whole_answer() -> None:
    absent = FormatSupport(Support.ABSENT, "nothing is native here")
    bare = dataclasses.replace(
        find_device("t4"),
        name="bare",
        formats=dict.fromkeys(Format, absent),
        tf32=absent,
        fp8_recipes=(),
        peak_tflops={},
    )
    done = recommend(catalogued_profile("gpt2"), bare)
    assert done.plan.formats == {Format.FP32} and done.faster["what"] is None
    assert done.expected["step_ms"] is None and done.expected["step_reason"]
    assert json.loads(json.dumps(done.to_json(), allow_nan=False))["advice"]


# what would change the answer


def test_the_tokens_from_which_fp8_pays_are_where_the_time_model_says() -> None:
    done = recommended(LLAMA, "h100-sxm", method="lora")
    change = next(c for c in done.changes if c["kind"] == "tokens")
    inner = [
        name
        for name in done.plan.assignment
        if name.split(".")[0] == "blocks" and name.split(".")[1] not in ("0", "31")
    ]
    assert len(inner) == 60  # of 32 blocks the first and the last stay out
    wide, narrow = (done.plan.replace(dict.fromkeys(inner, choice)) for choice in ("bf16", "fp8"))
    at = change["at"] // 512
    assert change["at"] % 512 == 0 and f"{change['at']:,} tokens" in change["text"]
    assert speed_ratio(priced(wide, at), priced(narrow, at)).low > 1
    assert speed_ratio(priced(wide, at - 1), priced(narrow, at - 1)).low <= 1


def test_another_card_and_another_limit_are_what_recommend_says_of_them() -> None:
    done = recommended(LLAMA, "h100-sxm", method="lora")
    cards = {c["at"]: c["text"] for c in done.changes if c["kind"] == "device"}
    there = recommended(LLAMA, "t4", method="lora").plan
    assert "fp16 66" in cards["t4"] and there.formats == {Format.FP16} and "gradient scaler" in cards["t4"]
    assert "h100-sxm-80gb" not in cards and "does not fit" in cards["t4"]
    limit = next(c for c in done.changes if c["kind"] == "max_drop")
    tight = recommended(LLAMA, "h100-sxm", method="lora", max_drop=limit["at"]).plan
    differ = len(tight.diff(done.plan).units)
    assert Format.FP8 not in tight.formats and differ > 0
    assert f"bf16 {differ - 1} fp32 1" in limit["text"]


# code


def command(*arguments: str) -> Result:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["recommend", *arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.nightly
def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = recommend("demo", device="cpu", batch_size=2, seq_len=32)
    done.plan.save("plan.json")
    rows = torch.randint(0, 1024, (4, 32))
    names: dict[str, Any] = {"dataset": [{"input_ids": row, "labels": row} for row in rows]}
    quiet = 'output_dir="output", max_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False'
    exec(done.snippet.replace('output_dir="output"', quiet), names)
    assert names["arguments"].per_device_train_batch_size == 2


def run_script(home: Path, *arguments: str) -> str:
    script = next(home.glob("*.py"))
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_out_writes_plan_arguments_and_a_script_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = command("demo", "--device", "cpu", "--batch-size", "2", "--seq-len", "32", "--out", str(out))
    assert {p.name for p in out.iterdir()} == {"plan.json", "training_arguments.json", "autoprec_train.py"}
    assert json.loads((out / "training_arguments.json").read_text())["per_device_train_batch_size"] == 2
    assert str(out / "autoprec_train.py") in done.stdout
    monkeypatch.setattr(sys, "argv", ["autoprec_train.py", "--steps", "2"])
    runpy.run_path(str(out / "autoprec_train.py"), run_name="__main__")  # in a process of its own at night
    assert "train_loss" in capsys.readouterr().out
    assert Plan.load(out / "output" / "plan.json").assignment == Plan.load(out / "plan.json").assignment


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "said"), [((), "train_loss"), (("--mode", "infer"), "logits"), (("--method", "lora"), "train_loss")]
)
def test_scripts_run_by_themselves(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    command("demo", "--device", "cpu", "--batch-size", "2", "--seq-len", "32", *options, "--out", str(tmp_path))
    assert said in run_script(tmp_path)


def test_without_out_only_the_plan_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command("gpt2", "--device", "t4")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("model", "method", "wanted"),
    [
        (LLAMA, "full", 'LlamaForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", dtype="float32")'),
        (LLAMA, "lora", 'dtype="bfloat16")\nmodel = get_peft_model('),
        (LLAMA, "qlora", 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'),
    ],
)
def test_snippets_load_what_the_plan_needs(model: str, method: str, wanted: str) -> None:
    done = recommended(model, "h100-sxm", method=method)
    assert wanted in done.snippet
    for text in (done.snippet, done.script):
        compile(text, "snippet", "exec")


def test_a_plan_is_refitted_to_another_form_of_its_model() -> None:
    plan = recommended("gpt2", "t4").plan
    form = dataclasses.replace(catalogued_profile("gpt2"), fingerprint="that of packed weights")
    fitted = plan.refit(form)
    assert fitted.model.fingerprint == form.fingerprint and not fitted.diff(plan).units
    assert (fitted.units, fitted.grad_scaler, fitted.device) == (plan.units, plan.grad_scaler, plan.device)
    with pytest.raises(PlanError, match=r"not another form of openai-community/gpt2: unit 'blocks\.12\.attention'"):
        plan.refit(catalogued_profile(LLAMA))


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_plan_is_refitted_to_its_model_with_adapters() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    plan = recommend("demo", device="cpu", method="lora", batch_size=2, seq_len=32).plan
    adapted: Any = get_peft_model(
        GPT2LMHeadModel.from_pretrained(folder()), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    fitted = plan.refit(adapted)
    assert fitted.assignment == plan.assignment and fitted.model.fingerprint != plan.model.fingerprint
    with pytest.raises(PlanError, match=r"not another form of gpt2|not another form of openai-community/gpt2"):
        recommended("gpt2", "t4").plan.refit(adapted)


# the page


@pytest.mark.parametrize(("model", "device"), [(LLAMA, "h100-sxm"), ("gpt2", "t4"), ("gpt2", "cpu-avx2")])
def test_the_answer_comes_first_and_fits_a_terminal(model: str, device: str, tmp_path: Path) -> None:
    short = command(model, "--device", device, "--out", str(tmp_path)).stdout
    head, _, rest = short.partition("Plan for ")
    assert len(head.splitlines()) <= 50 and all(len(line) <= 80 for line in head.splitlines())
    assert ("spent on    matmul" in head) is (device != "cpu-avx2")
    for word in ("step  ", "memory  ", "safer  ", "faster  ", "\nDo"):
        assert word in head
    assert "To paste" in rest and "Expected" not in short
    full = command(model, "--device", device, "--explain", "--out", str(tmp_path)).stdout
    assert "Expected" in full and "[R17: huggingface/trl#4770" in full.replace("\n", " ").replace("     ", "")
