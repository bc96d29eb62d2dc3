"""Predicted drops against measured ones, what they cost, and rivals in the same run.

    python benchmarks/bench_sensitivity.py [smollm2] [minilm] [vit] [demo] [depth] [front] [--seeds 3]

Truths come from `benchmarks/truths/`, and are measured where they are missing (`truths.py`). For each model: rank
correlation, correlation of logs and ratios of predicted to true drops of single units; coverage of the 95 % intervals;
joint drops of random assignments predicted by the sum; seconds against those of measuring one by one, timed on a few
plans before and after. Beside it, from the same batches: replay layer by layer instead of by whole units, and the
diagonal score Σ (∂loss/∂y ⊙ (y_format − y))² of NVIDIA's Model Optimizer, by layer, on the labels of the data.
`depth`: what a probe takes for each unit and format as a model gets deeper. `front`: the exact front of 1,000 units.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from record import write_result
from scipy import stats
from torch import Tensor
from truths import FORMATS, WORKLOADS, Truths, measure

from autoprec import Plan, Workload, probe_sensitivity, probe_units
from autoprec.formats import Format
from autoprec.probe.direct import measured_drops
from autoprec.probe.directions import draw_direction
from autoprec.probe.estimation import predict
from autoprec.probe.passes import Tally
from autoprec.probe.readout import Readout, ReadoutKind
from autoprec.probe.replay import Replayer, frozen, repeatable
from autoprec.probe.sites import find_sites
from autoprec.probe.steps import peak_bytes, plain_fp32
from autoprec.records import SensitivityProfile
from autoprec.runtime.identity import canonical_modules, weights_digest
from autoprec.study.front import ChainUnit, Choice, predicted_front

Drops = dict[str, float]  # 'fp8 blocks.0.ffn' -> nats
#: pairs whose true drop is below this do not count
_FLOOR = 1e-10


class Diagonal(Replayer):
    """Sums of squares element by element, as a diagonal approximation of the Hessian has them."""

    scores: Drops

    def _arrived(self, effects: Any, call: Any, grads: Sequence[Tensor | None], formats: Any, check: bool) -> None:
        for choice in formats:
            if choice in call.site.swaps:
                pairs = zip(grads, self._replay(call, choice), call.results, strict=True)
                square = sum(float(((x - y) * g).square().sum()) for g, x, y in pairs if g is not None)
                key = f"{choice} {call.site.unit}"
                self.scores[key] = self.scores.get(key, 0.0) + square


def label_gradient(read: Readout, seed: int) -> Tensor:
    """Return the gradient of the log-likelihood of the data's labels; of drawn ones where it has none."""
    if read.labels is None or read.kind is not ReadoutKind.LOGITS:
        return draw_direction(read, seed)
    p = read.predictions.detach().float().softmax(-1)
    labels = read.labels.clamp(min=0)[..., None]
    slope = p.neg().scatter_add_(-1, labels, torch.ones_like(labels, dtype=p.dtype))
    return torch.where(read.counted[..., None], slope, 0.0)


def rivals(workload: Workload) -> dict[str, Drops]:
    """Return diagonal scores, and replay layer by layer with two draws, by layers of their own."""
    model, modules, profile = workload.model.eval(), canonical_modules(workload.model), probe_units(workload.model)
    formats = [Format(f) for f in FORMATS]
    names = frozenset(u.name for u in profile.units)
    sites = find_sites(profile, modules, formats, Format.BF16, emulated=True, apart=names)
    diagonal, tally = Diagonal(workload, sites, modules, Format.BF16), Tally()
    diagonal.scores = {}
    layers = Replayer(workload, sites, modules, Format.BF16)
    with plain_fp32("cpu"), repeatable(model), frozen(model):
        for index, batch in enumerate(workload.batches):
            diagonal.run(batch, formats, lambda read, index=index: label_gradient(read, index))
            for _ in range(2):
                tally.draw(layers, workload, index, formats, 0)
    roles = {u.name: str(u.role) for u in profile.units}
    by_layer = {f"{f} {u}": p.value for f in formats for u, p in predict(tally.scores(f, roles)).items()}
    return {"diagonal": diagonal.scores, "by layer": by_layer}


def peaks(workload: Workload) -> dict[str, float]:
    """Return the process's peak in MB for one plain backward of frozen weights, and for one pass with all replays."""
    model, modules, profile = workload.model.eval(), canonical_modules(workload.model), probe_units(workload.model)
    formats, batch = [Format(f) for f in FORMATS], workload.batches[0]
    sites = find_sites(profile, modules, formats, Format.BF16, emulated=True)
    replayer = Replayer(workload, sites, modules, Format.BF16)
    with plain_fp32("cpu"), repeatable(model), frozen(model):
        steps = {
            "backward": lambda: replayer.run(batch, [], lambda read: draw_direction(read, 0)),
            "with replays": lambda: replayer.run(batch, formats, lambda read: draw_direction(read, 0)),
        }
        found = {}
        for name, step in steps.items():
            step()
            found[name] = round((peak_bytes(torch.device("cpu"), step).bytes or 0) / 1e6, 1)
    return found


def mean(values: Sequence[float]) -> float:
    """Return the mean of the batches' drops; all batches of these workloads count alike."""
    return float(np.mean(values))


def judged(predicted: Drops, truth: Drops, choice: str, *, scaled: bool = True) -> dict[str, Any]:
    """Return how single-unit predictions in one format stand to the truth."""
    keys = [k for k in truth if k.startswith(f"{choice} ") and truth[k] > _FLOOR and predicted.get(k, 0.0) > 0]
    true, own = np.array([truth[k] for k in keys]), np.array([predicted[k] for k in keys])
    found: dict[str, Any] = {
        "units": len(keys),
        "spearman": round(float(stats.spearmanr(true, own)[0]), 4),
        "log_correlation": round(float(np.corrcoef(np.log(true), np.log(own))[0, 1]), 4),
    }
    if scaled:
        ratio = own / true
        worst = max(range(len(keys)), key=lambda i: abs(np.log(ratio[i])))
        found |= {
            "median_ratio": round(float(np.median(ratio)), 3),
            "ratio_5_95": [round(float(np.quantile(ratio, q)), 3) for q in (0.05, 0.95)],
            "worst": [keys[worst].split(" ", 1)[1], round(float(ratio[worst]), 3)],
        }
    return found


def joint(profile: SensitivityProfile, truths: Truths) -> dict[str, Any]:
    """Return how sums of single drops stand to the drops of random assignments."""
    true, own = [], []
    for index, assignment in enumerate(truths.data["joint"]):
        true.append(mean(truths.data["single"][f"joint {index}"]))
        own.append(profile.ambient_drop + sum(profile[u, f].value for u, f in assignment.items()))
    ratio = np.array(own) / np.array(true)
    return {
        "assignments": len(true),
        "median_ratio": round(float(np.median(ratio)), 3),
        "ratio_range": [round(float(ratio.min()), 3), round(float(ratio.max()), 3)],
        "spearman": round(float(stats.spearmanr(true, own)[0]), 4),
    }


def one_by_one(workload: Workload, pairs: Sequence[str]) -> float:
    """Return the seconds of one plan on all batches, from a few spread over the units; the reference is shared."""
    wide = {u.name: "fp32" for u in probe_units(workload.model).units}
    base = Plan.assign(workload.model, wide, ambient="bf16", mode="infer")
    chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, 6).astype(int)]
    plans = [base.replace(dict([reversed(key.split(" ", 1))])) for key in chosen]
    begun = time.perf_counter()
    measured_drops(workload, plans, emulate=True)
    return (time.perf_counter() - begun) / len(plans)


def model_figures(name: str, seeds: int) -> dict[str, Any]:
    """Probe one model with several seeds and judge each."""
    workload = WORKLOADS[name]()
    truths = Truths(name)
    if len(truths.data["seconds"]) < len(workload.batches):
        truths = measure(name, 50)
    same = truths.data["weights_digest"] == weights_digest(workload.model)
    if not (same and truths.data["data_digest"] == workload.data_digest()):
        raise SystemExit(f"{truths.path} is of other weights or data; remove it and measure it again")
    truth = {k: mean(v) for k, v in truths.data["single"].items() if not k.startswith("joint")}
    runs = []
    for seed in range(seeds):
        before = one_by_one(workload, list(truth))
        begun = time.perf_counter()
        profile = probe_sensitivity(workload, FORMATS, seed=seed, cache=False)
        took = time.perf_counter() - begun
        each = statistics.mean([before, one_by_one(workload, list(truth))])
        rows = {f"{d.format} {d.unit}": d for d in profile.drops}
        inside = [rows[k].drop.low <= t <= rows[k].drop.high for k, t in truth.items() if t > _FLOOR]
        final = {k: d.drop.value for k, d in rows.items()}
        replayed = {k: d.predicted for k, d in rows.items() if d.predicted is not None}
        runs.append(
            {
                "seed": seed,
                "passes": profile.passes,
                "direct": sum(d.method == "direct" for d in profile.drops),
                "positions": profile.replayed_positions,
                **{f: judged(final, truth, f) for f in FORMATS},
                "replay alone": {f: judged(replayed, truth, f) for f in FORMATS},
                "coverage": round(float(np.mean(inside)), 3),
                "median_reach": round(
                    float(np.median([d.drop.high / d.drop.value for d in rows.values() if d.drop.value > 0])), 2
                ),
                "joint": joint(profile, truths),
                "seconds": round(took, 2),
                "one_by_one_seconds": round(each * len(truth), 1),
                "cost": round(took / (each * len(truth)), 4),
            }
        )
        print(name, json.dumps(runs[-1]), file=sys.stderr, flush=True)
    others = {
        kind: {f: judged(scores, truth, f, scaled=kind != "diagonal") for f in FORMATS}
        for kind, scores in rivals(workload).items()
    }
    return {"pairs": len(truth), "runs": runs, "rivals": others, "peak_mb": peaks(workload)}


def depth_figures() -> list[dict[str, Any]]:
    """Return seconds for each unit and format of a probe with default settings, from 12 to 96 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    for layers in (12, 24, 48, 96):
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 2048, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).eval()
        batches = [{"input_ids": torch.randint(2048, (2, 128))} for _ in range(4)]
        workload = Workload(model, batches, mode="infer")
        pairs = sum(f in u.formats for u in probe_units(model).units for f in FORMATS)
        took = []
        for seed in range(2):
            begun = time.perf_counter()
            probe_sensitivity(workload, FORMATS, seed=seed, cache=False)
            took.append((time.perf_counter() - begun) / pairs)
        rows.append({"layers": layers, "pairs": pairs, "ms_each": [round(1e3 * t, 2) for t in sorted(took)]})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def front_figures() -> list[dict[str, Any]]:
    """Return time and memory of the front of random chains, and how near its points come to the bound."""
    rows = []
    for count in (62, 200, 1000):
        draw = np.random.default_rng(0)
        kinds = ((Format.FP32, 0.0, 4.0), (Format.BF16, 1, 2), (Format.FP16, 0.1, 2.1), (Format.FP8, 60, 1))
        units = []
        for index in range(count):
            scale = 10 ** draw.uniform(-8, -3)
            costs = [*kinds, (Format.FP8, 40, 1.2)]  # FP8 with another recipe
            choices = [Choice(f, d * scale * draw.lognormal(0, 0.3), t * draw.lognormal(0, 0.2)) for f, d, t in costs]
            units.append(ChainUnit(f"unit {index}", tuple(choices)))
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            front = predicted_front(units, border_ms=0.1)
            seconds.append(time.perf_counter() - begun)
        gaps = [t / front.least_ms(d) - 1 for t, d in zip(front.time_ms, front.drop, strict=True)]
        rows.append(
            {
                "units": count,
                "formats": 5,
                "seconds": [round(s, 3) for s in sorted(seconds)],
                "points": len(front),
                "exact": front.exact,
                "largest_gap_to_bound_percent": round(100 * max(gaps), 3),
                "widest_step_in_time_percent": round(100 * float(np.diff(front.time_ms).max() / front.time_ms[-1]), 3),
                "process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            }
        )
    return rows


def main() -> None:
    """Make the named tables, all where none is named, and write a result each."""
    parts = ["front", "depth", *WORKLOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for part in asked.parts or parts:
        if part == "front":
            found: Any = front_figures()
        else:
            found = depth_figures() if part == "depth" else model_figures(part, asked.seeds)
        path = write_result(f"sensitivity-{part}", {"rows": found} if isinstance(found, list) else found)
        print(path.read_text())


if __name__ == "__main__":
    main()
