"""Train the demo model with the Hugging Face Trainer and a plan in force.

    python examples/train_trainer.py --plan plan.json --out trained
    python examples/train_trainer.py --format bf16 --out trained

The plan is applied before the Trainer is made. `plan.training_arguments` holds the global flags that go with it: the
plan decides each unit, the flags decide what the Trainer does around the model, such as scaling the loss for FP16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import autoprec
from autoprec.demo import folder, text_path


def examples(seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Return the demo text in windows of `seq_len` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    ids = tokenizer(text_path().read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return [{"input_ids": window, "labels": window} for window in windows]


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, save, print the first and the last loss, and return the loss of every step."""
    parser = argparse.ArgumentParser(description="Train the demo model with the Trainer and a plan in force.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--plan", help="a plan.json made for the demo model")
    choice.add_argument("--format", default="bf16", help="one format for all units (default: %(default)s)")
    parser.add_argument("--emulate", action="store_true", help="emulate FP8 where the device has none")
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    plan = autoprec.Plan.load(options.plan) if options.plan else autoprec.Plan.uniform(model, options.format)
    applied = autoprec.apply(model, plan, emulate=options.emulate)

    arguments = TrainingArguments(
        **plan.training_arguments,
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(options.seq_len))
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    applied.remove()
    trainer.save_model()
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
    return losses


if __name__ == "__main__":
    main()
