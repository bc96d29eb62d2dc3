"""Predicted against real memory: steps on this CPU, counted by PyTorch itself, and published peaks of GPUs.

    python benchmarks/bench_memory.py [--only NAME]

The published peaks are read from $AUTOPREC_PUBLIC_DATA/memory.csv; without it that part is left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accounting import kept_tensors, peak_bytes, storage_bytes
from models import default_cache
from published import compare, read_rows
from record import write_result
from torch import Tensor, nn

import autoprec
from autoprec.plan import Plan
from autoprec.predict import memory_bytes

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with a batch, and its tokens a sequence as the prediction takes them."""

    name: str
    model: nn.Module
    batch: Batch
    batch_size: int
    seq_len: int
    loss: Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A way to train: the format or plan, the optimizer and the options of the prediction."""

    name: str
    format: str
    optimizer: str = "adamw"
    choices: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    #: the model whose variant is run, and its attention
    model: str = ""
    attention: str = "sdpa"
    cast: bool = False


CASES = (
    Case("fp32", "fp32"),
    Case("bf16 plan", "bf16"),
    Case("bf16 plan, checkpointing", "bf16", choices={"checkpointing": "full"}),
    Case("mixed plan, sgd with momentum", "bf16", "sgd-momentum", mixed=True),
)


#: what else the prediction distinguishes, each on one model
FURTHER = (
    Case("fp32, eager attention", "fp32", choices={"attention": "eager"}, model="llama-gqa", attention="eager"),
    Case("bf16 plan, eager attention", "bf16", choices={"attention": "eager"}, model="llama-gqa", attention="eager"),
    Case("bf16 plan, two accumulated", "bf16", choices={"accumulation": 2}, model="llama-gqa"),
    Case("model cast to bf16", "bf16", model="llama-gqa", cast=True),
    Case("fp32, foreach adamw", "fp32", "adamw-foreach", model="llama-gqa"),
    Case("fp32, sgd", "fp32", "sgd", model="gpt2-like"),
    Case("lora, base in bf16", "bf16", choices={"method": "lora"}, model="llama-gqa"),
)


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of transformers computes from labels."""
    result: Tensor = model(**batch).loss
    return result


def embedding_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A loss over the mean embedding of an encoder without a head."""
    return model(**batch).last_hidden_state.float().mean(1).pow(2).mean()


def subjects() -> Iterator[Subject]:
    """Yield the models, in training mode with dropout off, as plans are compared."""
    cache = default_cache()
    generator = torch.Generator().manual_seed(0)

    def ids(vocabulary: int, batch: int, length: int) -> Tensor:
        return torch.randint(3, vocabulary, (batch, length), generator=generator)

    def lm(name: str, model: nn.Module, batch: int, length: int) -> Subject:
        tokens = ids(model.config.vocab_size, batch, length)  # type: ignore[union-attr,arg-type]
        return Subject(name, model, {"input_ids": tokens, "labels": tokens}, batch, length, own_loss)

    load = transformers.AutoModelForCausalLM.from_pretrained
    yield lm("demo", load(autoprec_demo(), dtype=torch.float32), 8, 128)
    yield lm("smollm2", load(cache / "smollm2", dtype=torch.float32), 2, 256)
    minilm = transformers.AutoModel.from_pretrained(cache / "minilm", dtype=torch.float32)
    yield Subject("minilm", minilm, {"input_ids": ids(30000, 16, 128)}, 16, 128, embedding_loss)
    vit = transformers.ViTForImageClassification.from_pretrained(cache / "vit-digits", dtype=torch.float32)
    pixels = torch.randn(64, 1, 8, 8, generator=generator)
    digits = torch.randint(0, 10, (64,), generator=generator)
    yield Subject("vit-digits", vit, {"pixel_values": pixels, "labels": digits}, 64, 17, own_loss)
    llama = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8000,
        use_cache=False,
    )
    yield lm("llama-gqa", transformers.LlamaForCausalLM(llama), 4, 256)
    gpt2 = transformers.GPT2Config(n_layer=6, n_embd=384, n_head=6, vocab_size=16000, bos_token_id=0, eos_token_id=0)
    yield lm("gpt2-like", transformers.GPT2LMHeadModel(gpt2), 4, 256)


def autoprec_demo() -> str:
    from autoprec.demo import folder

    return str(folder())


def plan_of(subject: Subject, case: Case) -> Plan:
    """Return the plan of a case; the mixed one has every second unit of a block in FP32."""
    plan = Plan.uniform(subject.model, case.format)
    if not case.mixed:
        return plan
    units = [unit.name for unit in plan.units if "blocks." in unit.name]
    return plan.replace(dict.fromkeys(units[::2], "fp32"))


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return the optimizer of a case over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name.startswith("adamw"):
        foreach = name.endswith("foreach")
        return torch.optim.AdamW(trained, lr=1e-5, fused=not foreach, foreach=foreach or None)
    return torch.optim.SGD(trained, lr=1e-5, momentum=0.9 if name.endswith("momentum") else 0.0, fused=True)


def dropout_off(model: nn.Module) -> None:
    """Put a model in training mode with every dropout in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def prepared(subject: Subject, case: Case) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """Return the model of a case, a copy where it is changed for good, and the context it runs in."""
    model: Any = subject.model
    dropout_off(model)
    if case.choices.get("method") == "lora":
        model = adapted(model)
        return model, torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    if case.cast:
        return copy.deepcopy(model).to(torch.bfloat16), contextlib.nullcontext()
    model.config._attn_implementation = case.attention
    return model, autoprec.applied(model, plan_of(subject, case))


def adapted(model: nn.Module) -> nn.Module:
    """Return a copy stored in BF16 with FP32 adapters of rank 16 on every linear layer of its blocks."""
    import peft

    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model).to(torch.bfloat16), config)  # type: ignore[arg-type]


def measure_training(subject: Subject, case: Case) -> dict[str, Any]:
    """Run real steps under a plan; return what was kept and the peak beside what was predicted."""
    plan = Plan.cast(subject.model, case.format) if case.cast else plan_of(subject, case)
    predicted = memory_bytes(
        subject.model,
        plan,
        subject.batch_size,
        subject.seq_len,
        "train",
        case.optimizer,
        device_kind="cpu",
        **case.choices,
    )
    model, context = prepared(subject, case)
    checkpointed = case.choices.get("checkpointing") == "full"
    if checkpointed:
        model.activation_checkpointing_enable()
    optimizer = optimizer_of(model, case.optimizer)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(case.choices.get("accumulation", 1)):
            subject.loss(model, subject.batch).backward()
        optimizer.step()

    with context:
        step()
        optimizer.zero_grad()
        kept = kept_tensors(lambda: subject.loss(model, subject.batch), [*model.parameters(), *model.buffers()])
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        peak = storage_bytes([*model.parameters(), *model.buffers(), *states]) + peak_bytes(step)
    optimizer.zero_grad()
    if checkpointed:
        model.activation_checkpointing_disable()
    model.config._attn_implementation = "sdpa"
    return row(subject, case.name, predicted, peak, sum(k.size_bytes for k in kept), checkpointed)


def measure_inference(subject: Subject, format: str) -> dict[str, Any]:
    """Run a forward; return its peak beside what was predicted."""
    model: Any = subject.model.eval()
    plan = Plan.uniform(model, format, mode="infer")
    inputs = {k: v for k, v in subject.batch.items() if k != "labels"}
    cached = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and model.config.use_cache
    predicted = memory_bytes(
        model,
        plan,
        subject.batch_size,
        subject.seq_len,
        "infer",
        device_kind="cpu",
        cache="auto" if cached else None,
    )
    with autoprec.applied(model, plan), torch.inference_mode():
        model(**inputs)
        peak = storage_bytes([*model.parameters(), *model.buffers()]) + peak_bytes(lambda: model(**inputs))
    return row(subject, f"infer {format}", predicted, peak, None, False)


def row(subject: Subject, case: str, predicted: Any, peak: int, kept: int | None, checkpointed: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "model": subject.name,
        "case": case,
        "measured_bytes": peak,
        "predicted_bytes": predicted.allocated_bytes,
        "error_percent": round(100 * (predicted.allocated_bytes / peak - 1), 2),
        "moment": str(predicted.moment),
    }
    if kept is not None and not checkpointed:
        figures["kept_measured_bytes"] = kept
        figures["kept_error_percent"] = round(100 * (predicted.kept_bytes / kept - 1), 2)
    print(
        f"{subject.name:12} {case:32} {peak / 1e6:9.1f} MB  {figures['error_percent']:+6.2f} %  {figures['moment']:15}"
        f" kept {figures.get('kept_error_percent', '')} %",
        file=sys.stderr,
        flush=True,
    )
    return figures


def summary(rows: list[dict[str, Any]], key: str = "error_percent") -> dict[str, float]:
    if not rows:
        return {"rows": 0}
    errors = [abs(r[key]) for r in rows if key in r]
    return {"rows": len(errors), "mean_percent": round(statistics.mean(errors), 2), "worst_percent": max(errors)}


def public_part() -> dict[str, Any]:
    """Compare with published peaks; rows without a prediction are listed with the reason."""
    rows = read_rows()
    if rows is None:
        return {"skipped": "no $AUTOPREC_PUBLIC_DATA/memory.csv"}
    compared = [compare(published) for published in rows if published.options is not None]
    reasons = Counter(published.reason for published in rows if published.options is None)
    left = [
        {key: p.row[key] for key in ("gpu", "ngpu", "model", "mode", "dtype", "micro_batch", "source")}
        | {"reason": p.reason}
        for p in rows
        if p.options is None
    ]
    groups = {
        "all": compared,
        "training in 16 bits": [r for r in compared if r["mode"] == "lora" and "nf4" not in r["dtype"]],
        "training on 4 bits": [r for r in compared if r["mode"] == "lora" and "nf4" in r["dtype"]],
        "inference in 16 bits": [r for r in compared if r["mode"] != "lora" and "nf4" not in r["dtype"]],
        "inference on 4 bits": [r for r in compared if r["mode"] != "lora" and "nf4" in r["dtype"]],
    }
    return {
        "summary": {name: summary(own) for name, own in groups.items()},
        "rows": compared,
        "left_out_counts": dict(reasons),
        "left_out": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="models whose name has this; nothing is written then")
    options = parser.parse_args()
    torch.manual_seed(0)
    training, further, inference = [], [], []
    for subject in subjects():
        if options.only in subject.name:
            training += [measure_training(subject, case) for case in CASES]
            inference += [measure_inference(subject, format) for format in ("fp32", "bf16")]
            further += [measure_training(subject, case) for case in FURTHER if case.model == subject.name]
    figures = {
        "training": {"summary": summary(training), "kept": summary(training, "kept_error_percent"), "rows": training},
        "further": {"summary": summary(further), "rows": further},
        "inference": {"summary": summary(inference), "rows": inference},
        "published": public_part(),
    }
    print({name: part.get("summary") for name, part in figures.items()}, file=sys.stderr)
    if not options.only:
        print(write_result("memory", figures))


if __name__ == "__main__":
    main()
