"""A model that real faults befall in some formats: `faulty.py:make` crashes, hangs, lacks memory or gives NaN there."""

from __future__ import annotations

import ctypes
import os
import time

import torch
from torch import Tensor, nn

from autoprec import Workload


class Block(nn.Module):
    """An FFN beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, stream: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(stream)))
        return result


class Faulty(nn.Module):
    """Two blocks and a head; what befalls it depends on the formats that it finds its results in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream, formats = self.embedding(input_ids), list[torch.dtype]()
        for block in self.blocks:
            added = block(stream)
            formats.append(added.dtype)
            stream = stream + added
        logits: Tensor = self.lm_head(stream)
        return fault([*formats, logits.dtype], stream.dtype, logits)


def fault(formats: list[torch.dtype], stream: torch.dtype, logits: Tensor) -> Tensor:
    if os.environ.get("NO_FAULTS"):
        return logits
    if stream is torch.bfloat16:  # cast bf16
        time.sleep(3600)
    if set(formats) == {torch.bfloat16}:  # uniform bf16
        ctypes.string_at(0)
    if set(formats) == {torch.float16}:  # uniform fp16
        raise MemoryError("no room for 7 TiB")
    if formats == [torch.bfloat16, torch.float32, torch.float32]:
        return logits * torch.nan
    return logits


def make() -> Workload:
    batches = [torch.randint(0, 32, (2, 8)) for _ in range(8)]
    return Workload(Faulty(), batches, mode="infer", outputs="logits")


def other_each_time() -> Workload:
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    return make()
