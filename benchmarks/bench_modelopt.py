"""FP8 plans beside NVIDIA ModelOpt's: KL on unseen tokens at the same share of FP8 weights, and CPU time of the search.

    MODELOPT_PYTHON=/path/to/bin/python python benchmarks/bench_modelopt.py [--seeds 3] [--seconds 20]

$MODELOPT_PYTHON is the interpreter of an environment of its own with nvidia-modelopt 0.47, torch and transformers as in
constraints.txt, and requests, which ModelOpt needs and does not declare.

Both choose which linear layers of SmolLM2-135M but the head compute in FP8, from the same 4,096 tokens of an Austen
novel, on one thread. ModelOpt: `auto_quantize` by gradients, FP8 or nothing for each of its groups (q k v, output,
gate and up, down), to 12 effective bits, then solved again to 10 from the same scores. Its bits count FP32 as 16, and
the head, which is switched off, too: what is compared is the number of weights in FP8. Ours: `probe_sensitivity` of
every layer as a unit, and from the exact predicted front, weights outside FP8 in the place of time, the assignment of
the least predicted drop that has at least as many weights in FP8. CPU time is that of the process and its children
from the loaded model to both plans; the probe's clock is set to it, so that other processes do not matter.

Plans are judged by one plain arithmetic that is neither's: weight and input of each FP8 layer are rounded to E4M3 with
one scale a tensor (448 over the largest magnitude), all else is FP32; KL against FP32, in FP64, over windows of 512
tokens of another novel. Beside them, in hindsight: what drops probed at length on that other novel would have chosen,
among single layers and among ModelOpt's groups. No choice by sums of drops can be expected to do better than these.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from autoprec.records import ModelProfile

PLACE = Path(os.environ.get("AUTOPREC_MODELS") or Path(__file__).resolve().parent.parent / ".models")
SEEN, UNSEEN = "sense_and_sensibility", "pride_and_prejudice"
#: windows and their tokens: for the searches, and for judging
SEARCHED, JUDGED = (32, 128), (8, 512)
#: windows in a batch: the fewer calls the faster for ModelOpt; ours may end with some batches only
THEIRS, OURS = 4, 2
BITS = (12.0, 10.0)
HINDSIGHT_SECONDS = 120.0
LARGEST = 448.0  # of E4M3


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def load() -> Any:
    """Return SmolLM2-135M in FP32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PLACE / "smollm2", dtype=torch.float32).eval()


def windows(novel: str, count: int, length: int) -> Tensor:
    """Return windows [count, length] of a novel's tokens, evenly spread over it."""
    from transformers import AutoTokenizer

    text = (PLACE / "austen" / f"{novel}.txt").read_text()
    ids = AutoTokenizer.from_pretrained(PLACE / "smollm2")(text, return_tensors="pt").input_ids[0]
    apart = (len(ids) - length) // count
    return torch.stack([ids[i * apart : i * apart + length] for i in range(count)])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def search_modelopt() -> dict[str, Any]:
    """Let ModelOpt search (in its own environment); return its plans and what they took."""
    import modelopt
    import modelopt.torch.quantization as mtq

    model, batches = load(), windows(SEEN, *SEARCHED).split(THEIRS)
    begun, wall = cpu_seconds(), time.perf_counter()
    model, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": BITS[0]},
        quantization_formats=[mtq.FP8_DEFAULT_CFG],
        data_loader=batches,
        forward_step=lambda model, batch: model(input_ids=batch, labels=batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        disabled_layers=["*lm_head*"],
    )
    configs = [mtq.get_auto_quantize_config(state), mtq.get_auto_quantize_config(state, {"effective_bits": BITS[1]})]
    spent, wall = cpu_seconds() - begun, time.perf_counter() - wall
    plans = []
    for config in configs:
        on = {e["quantizer_name"] for e in config["quant_cfg"] if e.get("enable", True)}
        plans.append([n for n in linears(model) if f"{n}.weight_quantizer" in on])
    return {"version": modelopt.__version__, "cpu_s": spent, "wall_s": wall, "plans": plans}


def search_ours(least: Sequence[int], novel: str, grouped: bool, seconds: float, seed: int) -> dict[str, Any]:
    """Probe, and choose for each number of weights in FP8 the least predicted drop; return the plans and their cost."""
    from autoprec import Workload, probe_sensitivity, probe_units
    from autoprec.formats import Format
    from autoprec.study.chain import ChainUnit, Choice
    from autoprec.study.front import predicted_front
    from autoprec.study.space import split_units

    model = load()
    workload = Workload(model, [{"input_ids": b} for b in windows(novel, *SEARCHED).split(OURS)], mode="infer")
    begun, wall = cpu_seconds(), time.perf_counter()
    profile = split_units(probe_units(model)) if grouped else every_layer(probe_units(model))
    with mock.patch("time.monotonic", time.process_time):
        probed = probe_sensitivity(workload, ("fp8",), seconds=seconds, seed=seed, cache=False, units=profile)
    sizes = {n: m.weight.numel() for n, m in linears(model).items()}
    units = []
    for unit in profile.units:
        if set(unit.modules) <= set(sizes):
            wide = Choice(Format.FP32, 0.0, float(sum(sizes[m] for m in unit.modules)))
            units.append(ChainUnit(unit.name, (wide, Choice(Format.FP8, probed[unit.name, "fp8"].value, 0.0))))
    front = predicted_front(units)
    plans, drops = [], []
    for count in least:
        fitting = np.flatnonzero(front.time_ms <= sum(sizes.values()) - count)
        index = int(fitting[np.argmin(front.drop[fitting])])
        low = {n for n, f in front.assignment(index).items() if f is Format.FP8}
        plans.append([m for unit in profile.units if unit.name in low for m in unit.modules])
        drops.append(float(front.drop[index]))
    spent, wall = cpu_seconds() - begun, time.perf_counter() - wall
    found = {"cpu_s": spent, "wall_s": wall, "plans": plans, "predicted": drops}
    return found | {"exact": front.exact, "passes": probed.passes, "notes": probed.notes}


def every_layer(profile: ModelProfile) -> ModelProfile:
    """Return the profile with every layer a unit of its own."""
    units = [dataclasses.replace(u, name=m, modules=(m,)) for u in profile.units for m in u.modules]
    return dataclasses.replace(profile, units=tuple(units))


def rounded(values: Tensor) -> Tensor:
    """Return values rounded to E4M3 with one scale, in FP32."""
    scale = LARGEST / values.abs().max().clamp(min=1e-12)
    return (values * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale


@contextlib.contextmanager
def in_fp8(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Round weight and input of the named layers, for the length of a block."""
    layers = [m for n, m in linears(model).items() if n in names]
    weights = [layer.weight.data for layer in layers]
    handles = [m.register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:])) for m in layers]
    for layer in layers:
        layer.weight.data = rounded(layer.weight.data)
    try:
        yield
    finally:
        for layer, weight, handle in zip(layers, weights, handles, strict=True):
            layer.weight.data = weight
            handle.remove()


@torch.no_grad()
def divergences(model: nn.Module, plans: Sequence[Collection[str]], tokens: Tensor) -> list[list[float]]:
    """Return for each plan its KL in nats a token, by window."""
    references = [model(input_ids=window).logits for window in tokens.split(1)]
    found = []
    for plan in plans:
        with in_fp8(model, plan):
            found.append(
                [_divergence(r, model(input_ids=w).logits) for r, w in zip(references, tokens.split(1), strict=True)]
            )
    return found


def _divergence(reference: Tensor, other: Tensor) -> float:
    log_p, log_q = (x.double().log_softmax(-1) for x in (reference, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def apart(search: str, *options: str, python: str = sys.executable) -> dict[str, Any]:
    """Run one search in a process of its own; return what it found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [python, __file__, "--search", search, "--out", str(out), *options]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> None:
    """Run both searches, judge their plans, and write the result; or run one search alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds allowed to our probe")
    parser.add_argument("--search", choices=["modelopt", "layers", "groups"], help=argparse.SUPPRESS)
    parser.add_argument("--novel", default=SEEN, help=argparse.SUPPRESS)
    parser.add_argument("--least", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.search == "modelopt":
        asked.out.write_text(json.dumps(search_modelopt()))
    elif asked.search:
        found = search_ours(asked.least, asked.novel, asked.search == "groups", asked.seconds, asked.seed)
        asked.out.write_text(json.dumps(found))
    else:
        compared(asked.seeds, asked.seconds)


def compared(seeds: int, seconds: float) -> None:
    """Run both searches and those in hindsight, judge all plans, and write the result."""
    from record import write_result

    python = os.environ.get("MODELOPT_PYTHON")
    if not python:
        raise SystemExit("MODELOPT_PYTHON is not set; it is the Python of an environment with nvidia-modelopt 0.47")
    theirs = apart("modelopt", python=python)
    model = load()
    sizes = {n: m.weight.numel() for n, m in linears(model).items()}
    least = ("--least", *(str(sum(sizes[n] for n in plan)) for plan in theirs["plans"]))
    searches = {"ModelOpt": theirs}
    for seed in range(seeds):
        searches[f"ours, seed {seed}"] = apart("layers", *least, "--seconds", str(seconds), "--seed", str(seed))
    for kind in ("layers", "groups"):
        found = apart(kind, *least, "--seconds", str(HINDSIGHT_SECONDS), "--novel", UNSEEN)
        searches[f"in hindsight, of {kind}"] = found
    plans = [plan for search in searches.values() for plan in search["plans"]]
    unseen = divergences(model, plans, windows(UNSEEN, *JUDGED))
    seen = divergences(model, plans, windows(SEEN, *SEARCHED).reshape(-1, JUDGED[1]))
    table: dict[str, Any] = {f"{bits:g} bits": {} for bits in BITS}
    for index, name in enumerate(searches):
        for at, bits in enumerate(BITS):
            place = len(BITS) * index + at
            table[f"{bits:g} bits"][name] = row(searches[name], at, sizes, (unseen[place], unseen[at]), seen[place])
    own = [search for name, search in searches.items() if name.startswith("ours")]
    figures = {
        "model": "SmolLM2-135M-Instruct",
        "modelopt": theirs["version"],
        "tokens searched": SEARCHED[0] * SEARCHED[1],
        "tokens judged": JUDGED[0] * JUDGED[1],
        "plans": table,
        "cpu_s": {"ModelOpt": round(theirs["cpu_s"], 1), "ours": [round(s["cpu_s"], 1) for s in own]},
        "wall_s": {"ModelOpt": round(theirs["wall_s"], 1), "ours": [round(s["wall_s"], 1) for s in own]},
        "cpu over ModelOpt's": [round(s["cpu_s"] / theirs["cpu_s"], 3) for s in own],
        "probe": {"cpu_s allowed": seconds, "passes": [s["passes"] for s in own], "notes": own[0]["notes"]},
        "fronts exact": all(s["exact"] for s in searches.values() if s is not theirs),
    }
    print(json.dumps(figures, indent=1), file=sys.stderr)
    write_result("modelopt-smollm2", figures)


def row(
    search: dict[str, Any], at: int, sizes: dict[str, int], unseen: tuple[list[float], list[float]], seen: list[float]
) -> dict[str, Any]:
    """Return what is written of a plan; `unseen`: its drops by window, and those of ModelOpt's plan."""
    plan, (own, theirs) = search["plans"][at], unseen
    found = {
        "layers": len(plan),
        "share of weights": round(sum(sizes[n] for n in plan) / sum(sizes.values()), 4),
        "kl unseen": round(statistics.mean(own), 6),
        "over ModelOpt's": round(statistics.mean(own) / statistics.mean(theirs), 4),
        "over ModelOpt's, by window": [round(a / b, 3) for a, b in zip(own, theirs, strict=True)],
        "kl searched tokens": round(statistics.mean(seen), 6),
    }
    return found | ({"kl predicted": round(search["predicted"][at], 6)} if "predicted" in search else {})


if __name__ == "__main__":
    main()
