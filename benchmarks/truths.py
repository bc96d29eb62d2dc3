"""Drops of single units and of random assignments, measured one by one: what estimates are judged by.

    python benchmarks/truths.py [smollm2] [minilm] [vit] [demo] [--joint 50]

Writes `benchmarks/truths/<name>.json`, batch by batch; what is there is not measured again. The models come from
`python benchmarks/models.py`. A unit alone in a format, all others in FP32, ambient BF16, FP8 emulated; drops are means
over each batch's counted positions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from digits import held_out
from models import default_cache
from record import device
from spam import load_classifier

from autoprec import Plan, Workload, applied, probe_units
from autoprec.probe.compare import compare
from autoprec.probe.readout import Readout
from autoprec.probe.workload import workload_from
from autoprec.runtime.identity import weights_digest

FOLDER = Path(__file__).parent / "truths"
FORMATS = ("bf16", "fp8")


def smollm2() -> Workload:
    """SmolLM2-135M on 2,048 tokens of an Austen novel: 8 batches of 2 windows of 128."""
    cache = default_cache()
    text = cache / "austen" / "sense_and_sensibility.txt"
    return workload_from(str(cache / "smollm2"), data=text, mode="infer")


def minilm(mails: int = 128) -> Workload:
    """MiniLM with a head of one logit on mails that the head was not fitted on: batches of 16."""
    from transformers import AutoTokenizer

    cache = default_cache()
    tokenizer = AutoTokenizer.from_pretrained(cache / "minilm")
    lines = (cache / "spam-head" / "spam.jsonl").read_text().splitlines()[1200 : 1200 + mails]
    texts = [json.loads(line)["text"][:800] for line in lines]
    batches = []
    for start in range(0, len(texts), 16):
        rows = tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=128, return_tensors="pt")
        batches.append({"input_ids": rows.input_ids, "attention_mask": rows.attention_mask})
    model = load_classifier(cache)
    return Workload(model, batches, mode="infer", outputs="logits", task="classification", model_id="minilm-spam")


def minilm_training() -> Workload:
    """The same model on 16 batches, with labels to train towards: binary cross entropy of a spam's logit."""
    found, lines = minilm(256), (default_cache() / "spam-head" / "spam.jsonl").read_text().splitlines()[1200:1456]
    labels = torch.tensor([float(json.loads(line)["label"]) for line in lines]).split(16)
    batches = [{**batch, "labels": own} for batch, own in zip(map(dict, found.batches), labels, strict=True)]

    def loss(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], batch["labels"])

    return Workload(
        found.model, batches, mode="train", loss=loss, outputs="logits", task=found.task, model_id="minilm-spam"
    )


def vit() -> Workload:
    """The digits ViT on 256 images that it was not trained on: 8 batches of 32."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(default_cache() / "vit-digits", dtype=torch.float32).eval()
    pixels, labels = held_out(256)
    pairs = zip(pixels.split(32), labels.split(32), strict=True)
    batches = [{"pixel_values": p, "labels": y} for p, y in pairs]
    return Workload(model, batches, mode="infer", model_id="vit-digits")


def demo() -> Workload:
    """The GPT that ships with autoprec on its own held-out text: 8 batches of 8 windows of 128."""
    return workload_from("demo", mode="infer")


WORKLOADS: dict[str, Callable[[], Workload]] = {"smollm2": smollm2, "minilm": minilm, "vit": vit, "demo": demo}


class Truths:
    """The file of one workload's truths; every figure is a list of drops, one a batch."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.json"
        self.data: dict[str, Any] = {"single": {}, "joint": [], "seconds": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def save(self) -> None:
        """Write the file in one step."""
        self.path.parent.mkdir(exist_ok=True)
        part = self.path.with_suffix(".tmp")
        part.write_text(json.dumps(self.data) + "\n")
        part.rename(self.path)


def plans(workload: Workload, joint: int, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every assignment to be measured, with a key: single units, then seeded random ones of all densities."""
    units = probe_units(workload.model).units
    for choice in FORMATS:
        for unit in units:
            if choice in unit.formats:
                yield f"{choice} {unit.name}", {unit.name: choice}
    draw = random.Random(name)
    for index in range(joint):
        weights = [draw.random() for _ in range(3)]
        assignment = {}
        for unit in units:
            allowed = [f for f in ("fp32", *FORMATS) if f in unit.formats]
            assignment[unit.name] = draw.choices(allowed, weights[: len(allowed)])[0]
        yield f"joint {index}", assignment


def measure(name: str, joint: int) -> Truths:
    """Measure what is missing of one workload's truths, a batch at a time."""
    truths, workload = Truths(name), WORKLOADS[name]()
    model = workload.model.eval()
    units = probe_units(model).units
    base = Plan.assign(model, {u.name: "fp32" for u in units}, ambient="bf16", mode="infer")
    wanted = dict(plans(workload, joint, name))
    single: dict[str, list[float]] = truths.data["single"]
    done = min((len(single.get(key, ())) for key in wanted), default=0)
    truths.data |= {
        "weights_digest": weights_digest(model),
        "data_digest": workload.data_digest(),
        "device": device(),
        "torch": torch.__version__,
        "joint": [assignment for key, assignment in wanted.items() if key.startswith("joint")],
    }
    for index in range(done, len(workload.batches)):
        batch, begun = workload.batches[index], time.monotonic()
        with torch.no_grad():
            reference = workload.readout(batch, workload.forward(batch))
            reference = Readout(reference.kind, reference.predictions.clone(), reference.counted, reference.labels)
            for key, assignment in wanted.items():
                with applied(model, base.replace(assignment), emulate=True):
                    part = compare(reference, workload.readout(batch, workload.forward(batch)))
                single.setdefault(key, [])[index:] = [float(part.drop.sum() / part.weight.sum())]
        took = (time.monotonic() - begun) / len(wanted)
        truths.data["seconds"][str(index)] = round(took, 4)
        truths.save()
        print(f"{name}: batch {index}, {len(wanted)} plans, {took:.3f} s each", file=sys.stderr, flush=True)
    return truths


def main() -> None:
    """Measure the named workloads, all where none is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *WORKLOADS], metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--joint", type=int, default=50)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for name in asked.names or WORKLOADS:
        measure(name, asked.joint)


if __name__ == "__main__":
    main()
