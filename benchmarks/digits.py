"""A small vision transformer trained on scikit-learn's digits, and the images it is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["held_out", "train"]

_TRAINED, _EPOCHS, _BATCH = 1400, 60, 64


def _images() -> tuple[Tensor, Tensor, Tensor]:
    """Return images [N, 1, 8, 8] in -1 to 1, their digits, and a fixed order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images, torch.tensor(digits.target), order


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Return `count` images with their digits, none of which the model was trained on."""
    images, target, order = _images()
    chosen = order[_TRAINED : _TRAINED + count]
    return images[chosen], target[chosen]


def train(out: Path) -> float:
    """Train with a fixed seed on one thread, save to `out`, and return the accuracy on the images left out."""
    from transformers import ViTConfig, ViTForImageClassification

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, target, order = _images()
    chosen = order[:_TRAINED]
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    patches = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = ViTForImageClassification(ViTConfig(**sizes, **patches, **dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = _EPOCHS * -(-_TRAINED // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(_EPOCHS):
        for rows in torch.randperm(_TRAINED).split(_BATCH):
            pixels, labels = images[chosen[rows]], target[chosen[rows]]
            if torch.rand(1) < 0.5:  # moved by up to one pixel
                shift = [int(torch.randint(-1, 2, (1,))) for _ in range(2)]
                pixels = torch.roll(pixels, shift, (2, 3))
            loss = functional.cross_entropy(model(pixel_values=pixels).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    model.save_pretrained(out)
    torch.set_num_threads(threads)
    pixels, labels = held_out(397)
    with torch.no_grad():
        return float((model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())
