"""Troubles made to happen here, on the CPU, and what the doctor says of them."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import gpt2, save
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from autoprec.doctor.diagnosis import diagnose
from autoprec.doctor.storage import lost_share
from autoprec.doctor.weights import exponents
from autoprec.records import Diagnosis, Severity


def codes(found: Diagnosis, least: Severity = Severity.NOTE) -> set[str]:
    return {finding.code for finding in found.findings if finding.severity.rank <= least.rank}


def evidence(found: Diagnosis, code: str) -> str:
    return " ".join(piece.text for f in found.findings if f.code == code for piece in f.evidence)


# errors of torch and transformers as they are raised by the versions installed here


def unscale_half() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight.float() ** 2).sum()).backward()
    scaler.unscale_(torch.optim.SGD([weight], lr=0.1))


def conv_types() -> None:
    nn.Conv1d(4, 4, 1).half()(torch.ones(1, 4, 4))


def attention_types() -> None:
    q, k = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(q, k, k)


def linear_types() -> None:
    nn.Linear(4, 4)(torch.ones(1, 4, dtype=torch.bfloat16))


def norm_types() -> None:
    F.layer_norm(torch.ones(2, 4), (4,), torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16))


def kernel_missing() -> None:
    torch.linalg.qr(torch.ones(4, 4, dtype=torch.float16))


def sampling() -> None:
    torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)


def bf16_without_gpu() -> None:
    TrainingArguments("out", bf16=True)


def both_formats() -> None:
    TrainingArguments("out", bf16=True, fp16=True, use_cpu=True)


def retired_argument() -> None:
    TrainingArguments("out", evaluation_strategy="no")


def anomaly() -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        (torch.zeros(2, requires_grad=True) ** 0.5 * 0).sum().backward()


def clipped() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([float("inf"), 1.0])
    nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU BF16 is accepted")


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("AP001", unscale_half),
        ("AP003", anomaly),
        ("AP003", clipped),
        ("AP004", sampling),
        pytest.param("AP007", bf16_without_gpu, marks=no_gpu),
        ("AP014", attention_types),
        ("AP014", conv_types),
        ("AP015", linear_types),
        ("AP016", norm_types),
        ("AP017", kernel_missing),
        ("AP031", both_formats),
        ("AP109", retired_argument),
    ],
)
def test_what_is_raised_here_is_found(code: str, trouble: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        trouble()
    log = tmp_path / "run.log"
    try:
        trouble()
    except Exception:
        log.write_text("step 1 loss 2.3\n" + traceback.format_exc())
    found = diagnose(logs=[str(log)])
    assert codes(found, Severity.WARNING) == {code}


def test_a_loss_that_overflows_in_fp16_is_found_in_its_log(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64)
    lines = []
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (layer(torch.full((2, 64), 10.0 ** (2 + 2 * step))).float() ** 2).mean()
        lines.append(
            f"step {step} | loss {(loss - loss + loss).item():.4f}"
            if step < 2
            else f"step {step} | loss {(loss - loss).item()}"
        )
    log = tmp_path / "run.log"
    log.write_text("\n".join(lines))
    assert "nan" in log.read_text()
    assert codes(diagnose(logs=[str(log)])) == {"AP003"}


def test_a_scale_that_only_falls_is_found_in_log_and_checkpoint(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    lines = []
    for step in range(18):
        optimizer.zero_grad()
        (scaler.scale(weight.sum()) * float("inf")).backward()  # every step overflows
        scaler.step(optimizer)
        scaler.update()
        lines.append(f"step {step}: loss scale: {scaler.get_scale()}")
    (tmp_path / "run.log").write_text("\n".join(lines))
    assert codes(diagnose(logs=[str(tmp_path / "run.log")])) == {"AP020"}
    folder = save(gpt2(), tmp_path / "checkpoint")
    torch.save(scaler.state_dict(), folder / "scaler.pt")
    assert "AP020" in codes(diagnose(str(folder)), Severity.ERROR)


# checkpoints


def trained_bf16(folder: Path, learning_rate: float = 1e-4, steps: int = 5) -> Path:
    """Train a small Llama in pure BF16 and save it as a Trainer does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    state = {"global_step": steps, "log_history": [{"loss": 4.1, "step": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_pure_bf16_training_is_seen_in_its_checkpoint(tmp_path: Path) -> None:
    found = diagnose(str(trained_bf16(tmp_path / "out")))
    assert "AP021" in codes(found, Severity.WARNING)
    assert "moments are bf16" in evidence(found, "AP021")
    assert "norm weights are exactly 1.0" in evidence(found, "AP021")


def test_the_share_of_lost_updates_is_what_bf16_really_does() -> None:
    weights = torch.randn(200_000) * 0.02
    for rate in (1e-5, 1e-4, 1e-3):
        stored = weights.to(torch.bfloat16)
        moved = stored + torch.tensor(rate, dtype=torch.float32).to(torch.bfloat16) * stored.sign()
        stayed = float((moved == stored).float().mean())
        told = lost_share(exponents(stored.float().numpy()), rate)
        # the estimate goes by whole exponents: between the two neighbouring powers of two
        assert lost_share(exponents(stored.float().numpy()), 2 * rate) - 0.02 <= stayed <= told + 0.35
    assert lost_share(exponents(np.full(10, 1.0, np.float32)), 1e-4) == 1.0
    assert lost_share(exponents(np.full(10, 1.0, np.float32)), 1e-1) == 0.0


def test_a_bf16_checkpoint_and_bf16_true_train_without_masters(tmp_path: Path) -> None:
    folder = save(gpt2().to(torch.bfloat16), tmp_path / "model")
    script = tmp_path / "train.py"
    script.write_text(
        "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "Trainer(model, TrainingArguments('out', bf16=True, learning_rate=1e-5)).train()\n"
    )
    found = diagnose(str(folder), settings=[str(script)])
    assert "AP022" in codes(found, Severity.WARNING) and "learning rate of 1e-05" in evidence(found, "AP022")
    script.write_text(script.read_text().replace(f"({str(folder)!r})", f"({str(folder)!r}, dtype='float32')"))
    assert "AP022" not in codes(diagnose(str(folder), settings=[str(script)]))


def test_fp16_true_meets_the_format_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"fp16": true, "learning_rate": 1e-4}')
    for dtype, code in ((torch.bfloat16, "AP002"), (torch.float16, "AP001")):
        folder = save(gpt2().to(dtype), tmp_path / str(dtype))
        assert code in codes(diagnose(str(folder), settings=[str(tmp_path / "args.json")]), Severity.WARNING)


def test_spoiled_weights_and_odd_dimensions_are_named(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3, 4] = float("nan")
    found = diagnose(str(save(model, tmp_path / "model")))
    assert "h.0.mlp.c_fc.weight" in evidence(found, "AP025") and "AP025" in codes(found, Severity.ERROR)
    assert "has 261: pad it to 264" in evidence(found, "AP026")


def test_rotary_tables_in_bf16_are_found_in_files_and_in_memory(tmp_path: Path) -> None:
    save_file({"model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert "AP023" in codes(diagnose(str(tmp_path)), Severity.WARNING)
    file = tmp_path / "models.py"
    file.write_text(
        "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "def made():\n"
        "    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, "
        "num_attention_heads=2)\n"
        "    return LlamaForCausalLM(config).to(torch.bfloat16)\n"
    )
    assert "inv_freq is bf16" in evidence(diagnose(f"{file}:made"), "AP023")


def test_a_trainer_state_with_nan_is_read(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "model")
    (folder / "trainer_state.json").write_text('{"log_history": [{"loss": 2.0}, {"loss": NaN, "grad_norm": NaN}]}')
    assert "AP003" in codes(diagnose(str(folder)), Severity.ERROR)


@pytest.mark.parametrize("cut", [3, 40, -10])
def test_cut_off_weights_are_refused(cut: int, tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(Exception, match="cut off|damaged"):
        diagnose(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_models_are_well(dtype: torch.dtype, tmp_path: Path) -> None:
    assert not codes(diagnose(str(save(gpt2().to(dtype), tmp_path / "model"))), Severity.WARNING)


def test_the_demo_is_well() -> None:
    assert not codes(diagnose("demo"), Severity.WARNING)


def test_a_catalogued_model_on_a_device_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"bf16": true, "learning_rate": 1e-5, "max_length": 8192}')
    found = diagnose("meta-llama/Llama-3.1-8B", settings=[str(tmp_path / "args.json")], device="rtx-4090")
    assert "16 bytes a parameter" in evidence(found, "AP012") and "AP012" in codes(found, Severity.WARNING)
    assert "GB of logits" in evidence(found, "AP013")


# devices


def test_formats_a_cpu_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(
        "import torch\nwith torch.autocast('cpu', dtype=torch.bfloat16):\n    loss = model(x)\nloss.backward()\n"
    )
    monkeypatch.setattr("autoprec.doctor.hosts.cpu_instructions", lambda: ("avx2",))
    assert "AP011" in codes(diagnose(settings=[str(path)], device="cpu"), Severity.WARNING)
    monkeypatch.setattr("autoprec.doctor.hosts.cpu_instructions", lambda: ("avx2", "avx512_bf16"))
    assert not codes(diagnose(settings=[str(path)], device="cpu"), Severity.WARNING)


@pytest.mark.parametrize(
    ("device", "args", "code"),
    [
        ("t4", '{"bf16": true}', "AP006"),
        ("v100-sxm2-16gb", '{"mixed_precision": "bf16"}', "AP006"),
        ("t4", '{"tf32": true}', "AP007"),
        ("a100-sxm", '{"mixed_precision": "fp8", "torch_compile": true}', "AP008"),
    ],
)
def test_what_a_named_device_cannot_do(device: str, args: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(args)
    assert code in codes(diagnose(settings=[str(tmp_path / "args.json")], device=device), Severity.WARNING)
    assert not codes(diagnose(settings=[str(tmp_path / "args.json")], device="h100-sxm"), Severity.WARNING)


# the trace


WORKLOADS = """
import time
import torch
from torch.utils.data import DataLoader, Dataset
import autoprec
from tiny_models import BareGPT, BareBlock

class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = BareGPT()
    def forward(self, ids):
        return self.body(ids)

def batches():
    torch.manual_seed(0)
    return [torch.randint(0, 32, (2, 16)) for _ in range(3)]

def healthy():
    torch.manual_seed(0)
    return autoprec.Workload(BareGPT(), batches(), task="causal-lm")

def overflowing():
    torch.manual_seed(0)
    model = BareGPT()
    with torch.no_grad():
        model.blocks[1].fc1.weight *= 3e3
        model.blocks[1].fc2.weight *= 3e3
    return autoprec.Workload(model, batches(), task="causal-lm")

def infinite():
    model = BareGPT()
    with torch.no_grad():
        model.blocks[0].proj.weight *= 1e38
        model.blocks[0].proj.bias += 3e38
    return autoprec.Workload(model, batches(), task="causal-lm")

class Late(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.randint(0, 32, (16,))

def late():
    return autoprec.Workload(BareGPT(), DataLoader(Late(), batch_size=2), task="causal-lm")

def mismatched():
    model = BareGPT()
    half = torch.nn.Linear(16, 16).bfloat16()
    model.blocks[0].proj.register_forward_hook(lambda module, args, output: half(output))
    return autoprec.Workload(model, batches(), task="causal-lm")
"""


@pytest.fixture
def workloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "workloads.py"
    path.write_text(WORKLOADS)
    return path


def test_a_trace_names_the_unit_that_overflows(workloads: Path, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"fp16": true}')
    found = diagnose(f"{workloads}:overflowing", settings=[str(tmp_path / "args.json")], trace=True)
    assert found.trace is not None
    assert found.trace.format == "fp16" and found.trace.first_non_finite == "blocks.1.ffn"
    assert "AP040" in codes(found, Severity.ERROR) and "AP041" in codes(found, Severity.WARNING)
    largest = max(found.trace.units, key=lambda unit: unit.largest_activation)
    assert largest.largest_activation > 65504
    alone = diagnose(f"{workloads}:overflowing", trace=True)  # nothing asks for FP16: it would, which breaks nothing
    assert "AP040" in codes(alone, Severity.WARNING) and not alone.broken


def test_a_trace_of_a_sound_model_has_figures_and_nothing_above_a_note(workloads: Path) -> None:
    found = diagnose(f"{workloads}:healthy", trace=True)
    assert found.trace is not None and not codes(found, Severity.WARNING)
    trace = found.trace
    assert trace.first_non_finite is None and trace.non_finite_in_fp32 is None
    assert trace.loss_scale and trace.loss_scale == 2 ** round(np.log2(trace.loss_scale))
    assert trace.gradient_flushed_share is not None and trace.flushed_share_scaled is not None
    assert trace.flushed_share_scaled <= trace.gradient_flushed_share
    assert trace.low_precision_share == 1.0
    assert trace.waiting_share is None and "in memory" in str(trace.waiting_reason)


def test_a_trace_tells_values_that_are_not_finite_in_fp32(workloads: Path) -> None:
    found = diagnose(f"{workloads}:infinite", trace=True)
    assert found.trace is not None and "blocks.0" in str(found.trace.non_finite_in_fp32)
    assert "AP040" in codes(found, Severity.ERROR)


def test_a_trace_measures_the_wait_for_data(workloads: Path) -> None:
    found = diagnose(f"{workloads}:late", trace=True)
    assert found.trace is not None and found.trace.waiting_share is not None and found.trace.waiting_share > 0.2
    assert "AP028" in codes(found, Severity.WARNING)


def test_an_error_of_the_traced_step_is_diagnosed(workloads: Path) -> None:
    found = diagnose(f"{workloads}:mismatched", trace=True)
    assert "AP015" in codes(found, Severity.ERROR)
    assert any("could not be traced" in note for note in found.notes)


def test_a_gradients_shares_are_those_of_fp16(workloads: Path) -> None:
    from autoprec.doctor.exponent import Sizes

    sizes = Sizes()
    values = torch.exp2(torch.arange(-40, 10).float()) * 1.5
    sizes.add(values)
    for scale in (1.0, 1024.0, 65536.0):
        half = (values * scale).half()
        flushed = float((half == 0).float().mean())
        assert sizes.flushed(scale) == pytest.approx(flushed)


def test_settings_and_logs_are_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"bf16": true}')
    code = (
        "import sys; from autoprec.doctor.diagnosis import diagnose; "
        f"diagnose(settings=[{str(tmp_path / 'a.json')!r}]); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
