"""One command for an owner of a card: measure it, check the emulation and the predictions on it, write one small JSON.

    python scripts/gpu_check.py [--device cuda:0] [--quick] [--out FILE]

Takes about three minutes. The file holds medians, no names of machines or users, and can be added to
profiles/measured/. docs/predictions.md says what the lines mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, LlamaConfig

from autoprec import Plan, applied, probe_device, probe_units
from autoprec.catalog import device_names, find_entry
from autoprec.errors import AutoprecError, first_line
from autoprec.files import as_json
from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.predict import gemm_ms, step_time
from autoprec.records import DeviceProfile, Estimate, ModelProfile, Role, Support
from autoprec.runtime.fp8 import fp8_emulated_matmul, fp8_matmul, fp8_missing
from autoprec.runtime.target import WIDENED
from autoprec.runtime.tf32 import tf32_set

SCHEMA = "autoprec/card@1"
#: m, n, k: square ones, a transformer's projections, FFN and head, few and many tokens
SHAPES = (
    (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192),
    (512, 768, 768), (4096, 3072, 768), (4096, 768, 3072), (8192, 4096, 4096), (8192, 11008, 4096), (64, 4096, 4096),
    (4096, 50304, 768),
)  # fmt: skip
QUICK = ((64, 64, 64), (256, 128, 64))
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: operations on a tensor [8, 8] of positive numbers: of CUDA's FP32 list by name, and some that are on none
_ONE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "pow": lambda x: torch.pow(x, 2),
    "__pow__": lambda x: x**2,
    "__rpow__": lambda x: 2**x,
    "__rdiv__": lambda x: 1 / x,
    "sum": lambda x: x.sum(-1),
    "prod": lambda x: x.prod(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "norm": lambda x: torch.norm(x),
    "logsumexp": lambda x: x.logsumexp(-1),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "l1_loss": lambda x: F.l1_loss(x, x),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x),
    "mean": lambda x: x.mean(-1),
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    **{
        name: getattr(torch, name)
        for name in ("exp", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "reciprocal", "sinh", "cosh", "tan")
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", help="file to write; by default profiles/measured/<device>.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("Error: torch sees no CUDA device here; install a CUDA build of torch, or try --device cpu --quick")
        return 1
    profile = probe_device(str(device), seconds=2.0 if options.quick else 8.0)
    print(f"{profile.name}, {profile.kind}, torch {torch.__version__}")
    known = find_entry(profile.name).profile if profile.name in device_names() else profile
    found = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip},
        "device": as_json(profile),
        "numerics": list(numerics(device)),
        "matmuls": list(matmuls(device, profile, known, QUICK if options.quick else SHAPES)),
        "steps": list(steps(device, profile, known, options.quick)),
    }
    found["summary"] = summary(found)
    for name, value in found["summary"].items():
        print(f"{name}: {value}")
    out = Path(options.out or Path(__file__).parent.parent / "profiles" / "measured" / f"{profile.name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}")
    return 1 if found["summary"]["numerics that differ"] else 0


# the emulation against the card


def numerics(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare what is emulated elsewhere with what this device does: autocast's lists, FP8's rounding."""
    x = torch.rand(8, 8, device=device, dtype=torch.bfloat16) + 0.5
    for name, function in _ONE.items():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            here = str(function(x).dtype).removeprefix("torch.")
        emulated = "float32" if name in WIDENED else "bfloat16"
        # a CPU's own lists are others: that is what the emulation is for
        same = device.type == "cpu" or here == emulated
        yield {"what": f"autocast {name}", "here": here, "emulated": emulated, "same": same}
    if (missing := fp8_missing(device)) is not None:
        print(f"FP8 is not compared: {missing}")
        return
    for recipe in Fp8Recipe:
        yield from _fp8_numerics(device, recipe)


def _fp8_numerics(device: torch.device, recipe: Fp8Recipe) -> Iterator[dict[str, Any]]:
    """Compare a product in FP8 and its gradients with the emulated ones; the order of summation may differ."""
    torch.manual_seed(0)
    x = torch.randn(256, 512, device=device, dtype=torch.bfloat16)
    w = torch.randn(512, 384, device=device, dtype=torch.bfloat16) / 16
    grad = torch.randn(256, 384, device=device, dtype=torch.bfloat16)
    results = []
    for product in (fp8_matmul, fp8_emulated_matmul):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = product(a, b, recipe)
        y.backward(grad)
        results.append((y.detach(), a.grad, b.grad))
    for what, real, emulated in zip(("result", "input gradient", "weight gradient"), *results, strict=True):
        error = float((real.float() - emulated.float()).norm() / real.float().norm())
        # Hopper sums FP8 products with about 14 bits (DeepSeek-V3, section 3.3); BF16's own step is 2^-8
        yield {"what": f"fp8 {recipe} {what}", "relative_difference": error, "same": error < 2**-7}


# predictions against the card


def matmuls(
    device: torch.device, profile: DeviceProfile, known: DeviceProfile, shapes: tuple[tuple[int, int, int], ...]
) -> Iterator[dict[str, Any]]:
    """Time products in each format the device has, and predict them from its datasheet and from what was probed."""
    for key in (*_DTYPES, "fp8"):
        support = profile.tf32 if key == "tf32" else profile.formats[Format(key)]
        if support.support is not Support.NATIVE:
            continue
        with tf32_set(key == "tf32", device.type):
            for m, n, k in shapes:
                ms = product_ms(device, _product(device, profile, key, m, n, k))
                row = {"format": key, "m": m, "n": n, "k": k, "ms": ms}
                yield row | _guesses(known, profile, gemm_ms, m, n, k, key)


def _product(device: torch.device, profile: DeviceProfile, key: str, m: int, n: int, k: int) -> Callable[[], Any]:
    """Return a product of random operands; in FP8 with scales of 1 and a result in BF16."""
    a, b = (torch.randn(rows, k, device=device) for rows in (m, n))
    if key != "fp8":
        return partial(F.linear, a.to(_DTYPES[key]), b.to(_DTYPES[key]))
    dtype = torch.float8_e4m3fnuz if profile.fp8_family is Fp8Family.FNUZ else torch.float8_e4m3fn
    one = torch.ones((), device=device)
    return partial(torch._scaled_mm, a.to(dtype), b.to(dtype).t(), one, one, out_dtype=torch.bfloat16)


def steps(device: torch.device, profile: DeviceProfile, known: DeviceProfile, quick: bool) -> Iterator[dict[str, Any]]:
    """Time training and inference steps of models with random weights, eager, and predict them."""
    for name, model, batch, length in _models(quick):
        model = model.to(device).train()
        ids = torch.randint(0, 1000, (batch, length), device=device)
        units = probe_units(model, model_id=name)
        for choice in ("fp32", "bf16", "fp16", "fp8"):
            if profile.supports(Format(choice)) is not Support.NATIVE:
                continue
            for mode in ("train", "infer"):
                plan = _plan(units, choice, mode)
                row = {"model": name, "format": choice, "mode": mode, "batch": batch, "length": length}
                try:
                    with applied(model, plan):
                        row["ms"] = timed(device, _step(model, ids, mode), seconds=0.2 if quick else 2.0)
                except (AutoprecError, RuntimeError) as error:  # the rest is worth having
                    yield row | {"error": first_line(error)}
                else:
                    yield row | _guesses(known, profile, partial(_predicted_step, model), plan, batch, length, mode)


def _plan(units: ModelProfile, choice: str, mode: str) -> Plan:
    """Return one format for all; FP8 for blocks only, as is usual, since heads' vocabularies are seldom multiples."""
    if choice != "fp8":
        return Plan.uniform(units, choice, mode=mode)
    blocks = [u.name for u in units.units if u.role in (Role.ATTENTION, Role.FFN)]
    return Plan.assign(units, dict.fromkeys(blocks, "fp8"), fp8_recipe="tensorwise", mode=mode)


def _predicted_step(model: Any, device: DeviceProfile, *step: Any) -> Estimate:
    return step_time(model, device, *step).step_ms


def _models(quick: bool) -> Iterator[tuple[str, Any, int, int]]:
    torch.manual_seed(0)
    if quick:
        small = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 1024}
        yield "gpt2, 2 blocks", AutoModelForCausalLM.from_config(GPT2Config(**small, resid_pdrop=0.0)), 2, 32
        return
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    yield "gpt2", AutoModelForCausalLM.from_config(GPT2Config(**quiet)), 8, 512
    yield "bert-base", BertForMaskedLM(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), 16, 384
    llama = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=32000)  # fmt: skip
    yield "llama, 8 blocks of 2048", AutoModelForCausalLM.from_config(llama), 4, 1024


def _step(model: Any, ids: torch.Tensor, mode: str) -> Callable[[], Any]:
    if mode == "infer":

        def infer() -> None:
            with torch.no_grad():
                model(ids)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    return train


def timed(device: torch.device, work: Callable[[], Any], seconds: float = 0.3) -> float:
    """Return the median milliseconds of one call: events on CUDA, the clock elsewhere."""
    for _ in range(3):
        work()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        if device.type == "cuda":
            begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(stop))
        else:
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def product_ms(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the median milliseconds of a kernel: on CUDA several in a graph, without the host that launches them."""
    if device.type != "cuda":
        return timed(device, work)
    work()
    graph, count = torch.cuda.CUDAGraph(), 10
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    return timed(device, graph.replay) / count


def _guesses(
    known: DeviceProfile, probed: DeviceProfile, predict: Callable[..., Estimate], *case: Any
) -> dict[str, Any]:
    """Return what is predicted from the datasheet and from what was probed, or why nothing is."""
    found: dict[str, Any] = {}
    for source, device in (("datasheet", known), ("probed", probed)):
        try:
            one = predict(device, *case)
            found[f"predicted_{source}"] = {"value": one.value, "low": one.low, "high": one.high}
        except AutoprecError as error:
            found[f"predicted_{source}"] = str(error)
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return how well it went, in one line each."""
    lines: dict[str, Any] = {"numerics that differ": [r["what"] for r in found["numerics"] if not r["same"]]}
    for row in found["steps"]:
        if "error" in row:
            lines[f"{row['model']} in {row['format']}, {row['mode']}"] = f"not run: {row['error']}"
    for part in ("matmuls", "steps"):
        for source in ("datasheet", "probed"):
            pairs = [(r["ms"], r[f"predicted_{source}"]) for r in found[part] if "ms" in r]
            known = [(ms, p) for ms, p in pairs if isinstance(p, dict)]
            if known:
                errors = [abs(math.log(p["value"] / ms)) for ms, p in known]
                held = sum(p["low"] <= ms <= p["high"] for ms, p in known)
                lines[f"{part}, predicted from {source}"] = (
                    f"median |log error| {statistics.median(errors):.3f}, {held} of {len(known)} within their interval"
                )
            elif pairs:
                lines[f"{part}, predicted from {source}"] = "not predicted: " + str(pairs[0][1])
    return lines


if __name__ == "__main__":
    sys.exit(main())
