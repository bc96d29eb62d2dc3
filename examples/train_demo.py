"""Train the demo model that ships with autoprec: a GPT-2 of about a million parameters, on three novels by Jane Austen.

    python benchmarks/models.py austen      # fetches the texts, once
    python examples/train_demo.py --out demo-model

Trains a byte-level BPE of 1,024 tokens and then the model on *Emma*, *Mansfield Park* and *Pride and Prejudice*, and
judges it on the opening of *Sense and Sensibility*, which it has not seen. One CPU thread, fixed seed, no dropout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TRAINED_ON = ("emma", "mansfield_park", "pride_and_prejudice")
HELD_OUT = "sense_and_sensibility"
HELD_OUT_CHARACTERS = 300_000  # then on to the end of the chapter
END = "<|endoftext|>"
VOCABULARY, CONTEXT = 1024, 256


def read_text(folder: Path, name: str) -> str:
    """Return a novel with each paragraph on one line; the printed line breaks say nothing about the language."""
    try:
        text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"{folder / name}.txt is missing; fetch it with: python benchmarks/models.py austen") from None
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def held_out_part(text: str) -> str:
    """Return the opening chapters of the held-out novel, whole chapters only."""
    return text[: text.index("\n\nCHAPTER", HELD_OUT_CHARACTERS) + 1]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which gives any text back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def build_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, tokens: torch.Tensor, *, steps: int, batch_size: int, seed: int) -> float:
    """Train with AdamW, 50 steps of warm-up and a cosine to 5 %; return the mean loss of the last 50 steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (batch_size,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1}: loss {recent:.4f}, {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, tokens: torch.Tensor) -> float:
    """Return nats per token over all whole windows of the context, side by side."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Return nats per token of the tokens' own frequencies: what the best guess without any context would cost."""
    counts = Counter(tokens.tolist())
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, write the folder, and print and return the record of the run."""
    parser = argparse.ArgumentParser(description="Train the demo model of autoprec.")
    cache = Path(__file__).resolve().parent.parent / ".models" / "austen"
    parser.add_argument("--texts", type=Path, default=cache, help="folder of the novels (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: model/, text.txt, training.json")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    texts = [read_text(options.texts, name) for name in TRAINED_ON]
    held_out = held_out_part(read_text(options.texts, HELD_OUT))
    tokenizer = train_tokenizer(texts)
    tokens = torch.cat([encode(tokenizer, text + END) for text in texts])
    unseen = encode(tokenizer, held_out)
    model = build_model()
    started = time.process_time()
    training_loss = train(model, tokens, steps=options.steps, batch_size=options.batch_size, seed=options.seed)
    record = {
        "held_out_nats_per_token": round(mean_loss(model, unseen), 4),
        "held_out_unigram_entropy_nats": round(unigram_entropy(unseen), 4),
        "training_nats_per_token": round(training_loss, 4),
        "held_out_tokens": len(unseen),
        "training_tokens": len(tokens),
        "parameters": model.num_parameters(),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "context": CONTEXT,
        "seed": options.seed,
        "threads": 1,
        "cpu_seconds": round(time.process_time() - started),
        "date": datetime.date.today().isoformat(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "command": f"python examples/train_demo.py --steps {options.steps} --batch-size {options.batch_size}"
        f" --seed {options.seed} --out OUT",
    }
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    (options.out / "text.txt").write_text(held_out, encoding="utf-8")
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()
