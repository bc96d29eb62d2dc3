"""A plan in the Trainer: uniform BF16 against the Trainer's own bf16=True, and what a watched step costs.

Losses of `--steps` steps must be equal to the bit. Then steps (forward, backward, clipping, AdamW of size 0) take
turns: the Trainer's own, the plan, the plan watched by a tripwire, and the Trainer's own again (A/A).

    python benchmarks/bench_trainer.py [--model demo|smollm2] [--steps 100] [--pairs 200]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ratios import ratio_row
from record import ROOT, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from autoprec import Plan
from autoprec.demo import folder, text_path
from autoprec.integrations.transformers import PrecisionTrainer
from autoprec.probe.compare import median_ci95
from autoprec.probe.steps import timed
from autoprec.runtime.tripwire import Tripwire

#: batch and window of the recorded figures
SIZES = {"demo": (8, 128), "smollm2": (2, 256)}


def load(model: str) -> Any:
    """Return the model with FP32 weights."""
    place = folder() if model == "demo" else ROOT / ".models" / model
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


def windows(model: str) -> list[dict[str, torch.Tensor]]:
    """Return the text in windows of tokens."""
    place = folder() if model == "demo" else ROOT / ".models" / model
    text = text_path() if model == "demo" else ROOT / ".models" / "austen" / "sense_and_sensibility.txt"
    ids = AutoTokenizer.from_pretrained(place)(text.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    length = SIZES[model][1]
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]


def trainer_of(model: str, own: bool, out: str, **changes: Any) -> Any:
    """Return a Trainer with bf16=True, or ours with the plan of the same."""
    settings: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": SIZES[model][0],
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "bf16": own,
    }
    arguments, loaded, data = TrainingArguments(**settings | changes), load(model), windows(model)
    if own:
        return Trainer(loaded, arguments, train_dataset=data)
    return PrecisionTrainer(loaded, arguments, train_dataset=data, plan=Plan.uniform(loaded, "bf16"))


def losses(model: str, own: bool, steps: int) -> list[float]:
    """Train and return the loss of each step."""
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(model, own, out, max_steps=steps)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def step_of(trainer: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return one step as the Trainer takes it."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: dict[str, torch.Tensor]) -> None:
        trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rounds(model: str, pairs: int) -> dict[str, list[float]]:
    """Time steps in turns and return the seconds of each side."""
    with tempfile.TemporaryDirectory() as out:
        own, plan = (trainer_of(model, side, out, learning_rate=0.0) for side in (True, False))
        own_step, plan_step = step_of(own), step_of(plan)
        wire = Tripwire(plan.applied, every=1)

        def watched(batch: dict[str, torch.Tensor]) -> None:
            wire.begin(0)
            plan.training_step(plan.model_wrapped, dict(batch))
            wire.judge(0)
            plan.accelerator.clip_grad_norm_(plan.model.parameters(), 1.0)
            plan.optimizer.step()
            plan.optimizer.zero_grad()

        sides = [("own", own_step), ("plan", plan_step), ("watched", watched), ("own again", own_step)]
        seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
        count, data = SIZES[model][0], windows(model)
        batches = [{k: torch.stack([row[k] for row in data[i : i + count]]) for k in data[0]} for i in (0, count)]
        for index in range(-3, pairs):
            order = sides[index % 4 :] + sides[: index % 4]
            for name, step in order if (index // 4) % 2 else reversed(order):
                spent, _ = timed(torch.device("cpu"), partial(step, batches[index % 2]))
                if index >= 0:  # three rounds of warm-up
                    seconds[name].append(spent)
        assert not wire.crossings
    return seconds


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return ratios by median and 95 % interval."""
    both = [(a + b) / 2 for a, b in zip(seconds["own"], seconds["own again"], strict=True)]
    result: dict[str, Any] = {"pairs": len(both)}
    for name, one, other in (
        ("plan / bf16=True", seconds["plan"], both),
        ("watched / plan", seconds["watched"], seconds["plan"]),
        ("A/A: bf16=True / bf16=True", seconds["own again"], seconds["own"]),
    ):
        result[name] = ratio_row(a / b for a, b in zip(one, other, strict=True))
    result["bf16=True step, ms (median; this machine, this hour)"] = round(1e3 * median_ci95(both)[0], 1)
    return result


def main() -> None:
    """Measure the asked model, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    for model in [asked.model] if asked.model else list(SIZES):
        own, ours = (losses(model, side, asked.steps) for side in (True, False))
        equal = {"steps": len(own), "equal to the bit": own == ours, "first": own[0], "last": own[-1]}
        found = {"losses": equal} | figures(rounds(model, asked.pairs))
        rows, window = SIZES[model]
        path = write_result(f"trainer-{model}", {"model": model, "step": f"train, {rows}x{window} tokens"} | found)
        print(Path(path).read_text())


if __name__ == "__main__":
    main()
