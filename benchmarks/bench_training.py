"""Plans trained beside FP32, over seeds: verdicts with intervals, and false alarms of FP32 with other seeds.

    python benchmarks/bench_training.py [minilm] [smollm2] [demo] [overflow] [--steps N] [--seeds K] [--plan FILE]

`minilm`: the spam classifier on 40 batches of 8 mails of up to 64 tokens, 200 steps. `smollm2`: LoRA (rank 8, all
projections) on 2 windows of 64 tokens, or --batch-size of --seq-len, 60 steps. `demo`: the demo GPT, all weights, 200
steps. `overflow`: SmolLM2 with the FFNs' gate products 4096 times as large and their output weights as much smaller, in
all blocks or every --every'th: the same function, but past FP16's 65,504. Plans are those for --device, whose
arithmetic is emulated unless it is `cuda`: uniform BF16, FP16 and FP8 (tensorwise); BF16 weights without FP32 copies
(`cast bf16`) where all weights are trained; a plan, that of --plan or of a search of --budget; and FP16 and FP8 but for
the units that overflow or lose most by it, as `probe_sensitivity` has them, which run in BF16 until the sum of the
others is within 0.25 %. False alarms: FP32 runs of twice the seeds, split in two at random, 20 times; how often one
half is called worse. What is complete is written as it comes; results for another device than the default carry its
name.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import default_cache
from record import write_result
from spam import load_classifier

from autoprec import Plan, Workload, probe_device, probe_sensitivity, search
from autoprec.catalog import find_device
from autoprec.files import as_json
from autoprec.formats import Format
from autoprec.probe.workload import workload_from
from autoprec.records import DeviceProfile, TrainingCurve, TrainingVerdict
from autoprec.training import REFERENCE, Ends, confirm_training, judged

STEPS = {"minilm": 200, "smollm2": 60, "demo": 200, "overflow": 60}
#: LoRA and a classifier learn at other rates than all weights of a language model
RATES = {"minilm": 2e-5, "smollm2": 2e-4, "demo": 1e-4, "overflow": 2e-4}
SPLITS = 20
#: batches that a search has at most; on one core a step of SmolLM2 on one of 4x128 tokens took 7 s
SEARCHED_ON = 8
DEVICE = "h100-sxm-80gb"
SEARCHED = "the searched plan"


def minilm(device: str = "cpu") -> Workload:
    """Return the spam classifier with labelled mails that its head was not fitted on."""
    from transformers import AutoTokenizer

    cache = default_cache()
    tokenizer = AutoTokenizer.from_pretrained(cache / "minilm")
    rows = [json.loads(line) for line in (cache / "spam-head" / "spam.jsonl").read_text().splitlines()[1200:1520]]
    batches = []
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        made = tokenizer(
            [row["text"][:800] for row in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        labels = torch.tensor([row["label"] for row in part])
        batch = {"input_ids": made.input_ids, "attention_mask": made.attention_mask, "labels": labels}
        batches.append({key: value.to(device) for key, value in batch.items()})
    model = load_classifier(cache).to(device)
    return Workload(model, batches, mode="train", outputs="logits", task="classification", model_id="minilm-spam")


def smollm2(device: str = "cpu", loud: bool = False, every: int = 1, **size: int) -> Workload:
    """Return SmolLM2 with LoRA adapters on an Austen novel; `loud` scales what goes into FFNs' last layers."""
    from peft import LoraConfig, get_peft_model

    cache = default_cache()
    text = cache / "austen" / "sense_and_sensibility.txt"
    size = {"batch_size": 2, "seq_len": 64, "batches": 32} | size
    found = workload_from(str(cache / "smollm2"), data=text, mode="train", device=device, **size)
    model: Any = found.model
    if loud:
        with torch.no_grad():
            for layer in model.model.layers[every - 1 :: every]:
                layer.mlp.up_proj.weight.mul_(4096.0)  # powers of two: no bit of any result changes in FP32
                layer.mlp.down_proj.weight.div_(4096.0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if loud:  # what an adapter of these learns would be 4096 times as large, or as small: FP32's own loss rose to 7.3
        names = names[:-2]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM")).to(device)
    return Workload(adapted, found.batches, mode="train", task=found.task, model_id=found.model_id)


def demo(device: str = "cpu") -> Workload:
    """Return the demo GPT on its text."""
    return workload_from("demo", batches=32, mode="train", device=device)


WORKLOADS = {"minilm": minilm, "smollm2": smollm2, "demo": demo, "overflow": partial(smollm2, loud=True)}


def shape(workload: Workload) -> str:
    """Return how much data there is, in words."""
    sizes = "x".join(map(str, next(iter(workload.batches[0].values())).shape))
    return f"{len(workload.batches)} batches, the first of {sizes}"


def false_alarms(curves: list[TrainingCurve]) -> dict[str, int]:
    """Split runs of FP32 in two at random, again and again, and count the verdicts of one half on the other."""
    half, draw = len(curves) // 2, random.Random(0)
    counts = dict.fromkeys(map(str, TrainingVerdict), 0)
    for _ in range(SPLITS):
        draw.shuffle(curves)
        one, other = (Ends.of(part, REFERENCE) for part in (curves[:half], curves[half : 2 * half]))
        counts[str(judged("other seeds", one, other).verdict)] += 1
    return counts


def searched(workload: Workload, device: str, budget: str, max_drop: str) -> Plan | None:
    """Return the plan that a search chooses, None where it finds nothing worth using."""
    few = workload.with_batches(workload.batches[:SEARCHED_ON])
    with tempfile.TemporaryDirectory() as folder:
        result = search(few, device=device, budget=budget, max_drop=max_drop, out=folder)
        print(result.verdict.text, flush=True)
        path = Path(folder) / "plan.json"
        return Plan.load(path) if result.chosen is not None and path.exists() else None


def mostly(choice: Format, workload: Workload, device: DeviceProfile, seconds: float | None) -> Plan:
    """Return a uniform plan with BF16 in units that overflow, and in the most sensitive ones until 0.25 % is left."""
    profile = probe_sensitivity(workload, formats=(choice,), seconds=seconds)
    plan = Plan.uniform(workload.model, choice, device=device)
    vetoed = {row.unit for row in profile.vetoes if row.format is choice}
    own = {u.name for u in plan.units if u.format is choice}
    lost = {name: max(0.0, profile[name, choice].value) for name in own - vetoed}
    raised = sorted(own & vetoed)
    for name in sorted(lost, key=lambda name: -lost[name]):
        if sum(lost.values()) <= 0.0025 * profile.scale:
            break
        raised.append(name)
        lost.pop(name)
    return plan.replace(dict.fromkeys(raised, "bf16"))


def plans_of(
    workload: Workload, device: DeviceProfile, plan: Plan | None, asked: argparse.Namespace
) -> dict[str, Plan]:
    """Return what is trained beside FP32, made only where it is asked for."""
    model = workload.model
    makers = {f"uniform {f}": partial(Plan.uniform, model, f, device=device) for f in ("bf16", "fp16", "fp8")}
    if all(p.requires_grad for p in model.parameters()):
        makers["cast bf16"] = partial(Plan.cast, model, "bf16", device=device)
    for choice in (Format.FP16, Format.FP8):
        makers[f"{choice} but for sensitive units"] = partial(mostly, choice, workload, device, asked.probe_seconds)
    if plan is not None:
        makers[SEARCHED] = lambda: plan
    return {name: make() for name, make in makers.items() if not asked.only or name in asked.only}


def main() -> None:
    """Train what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="minilm, smollm2, demo, overflow; default: minilm and smollm2")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="of smollm2 and overflow")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--every", type=int, help="of overflow: blocks that are scaled")
    parser.add_argument(
        "--probe-seconds", type=float, help="of plans but for sensitive units; default: the probe's own"
    )
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--max-drop", default="0.25%", help="of the search")
    parser.add_argument("--only", nargs="+", help="of these plans, as 'uniform fp16'")
    asked = parser.parse_args()
    here = asked.device == "cuda"
    device = probe_device(asked.device) if here else find_device(asked.device)
    for name in asked.models or ["minilm", "smollm2"]:
        size = {key: value for key in ("batch_size", "seq_len", "every") if (value := vars(asked)[key])}
        workload = WORKLOADS[name]("cuda" if here else "cpu", **size)
        train = partial(
            confirm_training,
            seeds=asked.seeds,
            steps=asked.steps or STEPS[name],
            learning_rate=RATES[name],
            emulate=not here,
            tell=lambda text: print(text, flush=True),
        )
        plan = Plan.load(asked.plan) if asked.plan else None
        if plan is None and (not asked.only or SEARCHED in asked.only):
            plan = searched(workload, asked.device, asked.budget, asked.max_drop)
        plans = plans_of(workload, device, plan, asked)
        formats = {k: Counter(map(str, v.assignment.values())) for k, v in plans.items()}
        how = {"device" if here else "emulated": device.name, "data": shape(workload)}
        figures: dict[str, Any] = {"model": name, **how, "units by format": formats}
        found = train(workload, plans)
        figures["training"] = as_json(found)
        result = f"training-{name}" + ("" if asked.device == DEVICE else f"-{device.name}")
        print(write_result(result, figures), [str(arm.verdict) for arm in found.arms], flush=True)
        others = train(workload, {}, first_seed=asked.seeds)
        figures["FP32 with other seeds"] = as_json(others)
        curves = [c for c in (*found.curves, *others.curves) if c.name == REFERENCE]
        figures[f"verdicts on {SPLITS} splits of FP32's seeds"] = false_alarms(curves)
        write_result(result, figures)


if __name__ == "__main__":
    main()
