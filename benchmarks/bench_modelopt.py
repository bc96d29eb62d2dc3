"""FP8 plans beside NVIDIA ModelOpt's: KL on unseen tokens at the same share of FP8 weights, and CPU time of the search.

    MODELOPT_PYTHON=/path/to/bin/python python benchmarks/bench_modelopt.py [--seeds 3] [--seconds 28]

$MODELOPT_PYTHON is the interpreter of an environment of its own with nvidia-modelopt 0.47, torch and transformers as in
constraints.txt, and requests, which ModelOpt needs and does not declare.

Both choose which linear layers of SmolLM2-135M but the head compute in FP8, from the same 4,096 tokens of an Austen
novel, on one thread. ModelOpt: `auto_quantize` by gradients, FP8 or nothing for each of its groups (q k v, output,
gate and up, down), to 12 effective bits, then solved again to 10 from the same scores. Its bits count FP32 as 16, and
the head, which is switched off, too: what is compared is the number of weights in FP8. Ours: `probe_sensitivity` of the
same groups, as the space `modules` cuts units, and from the exact predicted front, weights outside FP8 in the place of
time, the assignment of the least predicted drop that has at least as many weights in FP8. CPU time is that of the
process and its children from the loaded model to both plans.

Plans are judged by one plain arithmetic that is neither's: weight and input of each FP8 layer are rounded to E4M3 with
one scale a tensor (448 over the largest magnitude), all else is FP32; KL against FP32, in FP64, over windows
of 512 tokens of another novel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLACE = Path(os.environ.get("AUTOPREC_MODELS") or Path(__file__).resolve().parent.parent / ".models")
SEEN, UNSEEN = "sense_and_sensibility", "pride_and_prejudice"
#: windows and their tokens: for the searches, and for judging
SEARCHED, JUDGED = (32, 128), (8, 512)
#: windows in a batch: the fewer calls the faster for ModelOpt; ours may end with some batches only
THEIRS, OURS = 4, 2
BITS = (12.0, 10.0)
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
    begun, wall = cpu_seconds(), time.monotonic()
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
    spent, wall = cpu_seconds() - begun, time.monotonic() - wall
    plans = []
    for config in configs:
        on = {e["quantizer_name"] for e in config["quant_cfg"] if e.get("enable", True)}
        plans.append([n for n in linears(model) if f"{n}.weight_quantizer" in on])
    return {"version": modelopt.__version__, "cpu_s": spent, "wall_s": wall, "plans": plans}


def search_ours(least: Sequence[int], seconds: float, seed: int) -> dict[str, Any]:
    """Probe, and choose for each number of weights in FP8 the least predicted drop; return the plans and their cost."""
    from autoprec import Workload, probe_sensitivity, probe_units
    from autoprec.formats import Format
    from autoprec.study.chain import ChainUnit, Choice
    from autoprec.study.front import predicted_front
    from autoprec.study.space import split_units

    model = load()
    batches = [{"input_ids": part} for part in windows(SEEN, *SEARCHED).split(OURS)]
    begun, wall = cpu_seconds(), time.monotonic()
    profile = split_units(probe_units(model))
    workload = Workload(model, batches, mode="infer")
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
    spent, wall = cpu_seconds() - begun, time.monotonic() - wall
    return {
        "cpu_s": spent,
        "wall_s": wall,
        "plans": plans,
        "predicted": drops,
        "exact": front.exact,
        "passes": probed.passes,
        "notes": probed.notes,
    }


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
    found: list[list[float]] = [[] for _ in plans]
    for window in tokens.split(1):
        reference = model(input_ids=window).logits.double().log_softmax(-1)
        for plan, own in zip(plans, found, strict=True):
            with in_fp8(model, plan):
                other = model(input_ids=window).logits.double().log_softmax(-1)
            own.append(float((reference.exp() * (reference - other)).sum(-1).mean()))
    return found


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
    parser.add_argument("--seconds", type=float, default=28.0, help="allowed to our probe")
    parser.add_argument("--search", choices=["modelopt", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--least", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.search:
        found = search_modelopt() if asked.search == "modelopt" else search_ours(asked.least, asked.seconds, asked.seed)
        asked.out.write_text(json.dumps(found))
        return
    python = os.environ.get("MODELOPT_PYTHON")
    if not python:
        raise SystemExit(
            "MODELOPT_PYTHON is not set; it is the interpreter of an environment with nvidia-modelopt 0.47"
        )
    from record import write_result

    model = load()
    sizes = {n: m.weight.numel() for n, m in linears(model).items()}
    theirs = apart("modelopt", python=python)
    least = [sum(sizes[n] for n in plan) for plan in theirs["plans"]]
    common = ("--least", *map(str, least), "--seconds", str(asked.seconds))
    own = [apart("ours", *common, "--seed", str(seed)) for seed in range(asked.seeds)]
    searches = [theirs, *own]
    unseen, seen = windows(UNSEEN, *JUDGED), windows(SEEN, *SEARCHED).reshape(-1, JUDGED[1])
    every = [plan for search in searches for plan in search["plans"]]
    judged = {"unseen": divergences(model, every, unseen), "searched": divergences(model, every, seen)}
    write_result("modelopt-smollm2", figures(searches, sizes, judged, asked.seconds))


def figures(
    searches: Sequence[dict[str, Any]], sizes: dict[str, int], judged: dict[str, list[list[float]]], seconds: float
) -> dict[str, Any]:
    """Return what is written: by effective bits the plans of both, and CPU seconds."""
    theirs, *own = searches
    table = {}
    for index, bits in enumerate(BITS):
        at = [index + len(BITS) * i for i in range(len(searches))]
        rows = []
        for place, search in zip(at, searches, strict=True):
            drops, first = judged["unseen"][place], judged["unseen"][at[0]]
            rows.append(
                {
                    "layers": len(search["plans"][index]),
                    "share of weights": round(sum(sizes[n] for n in search["plans"][index]) / sum(sizes.values()), 4),
                    "kl unseen": statistics.mean(drops),
                    "kl searched tokens": statistics.mean(judged["searched"][place]),
                    "kl by unseen window": [round(d, 6) for d in drops],
                    "over ModelOpt's": round(statistics.mean(drops) / statistics.mean(first), 4),
                    "by window": [round(a / b, 3) for a, b in zip(drops, first, strict=True)],
                }
                | ({"predicted": search["predicted"][index]} if "predicted" in search else {})
            )
        table[f"{bits:g} bits"] = {"ModelOpt": rows[0], "ours, by seed": rows[1:]}
    return {
        "model": "SmolLM2-135M-Instruct",
        "modelopt": theirs["version"],
        "tokens searched": SEARCHED[0] * SEARCHED[1],
        "tokens judged": JUDGED[0] * JUDGED[1],
        "plans": table,
        "cpu_s": {"ModelOpt": round(theirs["cpu_s"], 1), "ours": [round(s["cpu_s"], 1) for s in own]},
        "wall_s": {"ModelOpt": round(theirs["wall_s"], 1), "ours": [round(s["wall_s"], 1) for s in own]},
        "cpu over ModelOpt's": [round(s["cpu_s"] / theirs["cpu_s"], 3) for s in own],
        "probe": {"seconds allowed": seconds, "passes": [s["passes"] for s in own], "notes": own[0]["notes"]},
        "front exact": all(s["exact"] for s in own),
    }


if __name__ == "__main__":
    main()
