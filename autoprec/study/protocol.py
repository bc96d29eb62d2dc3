"""What a search and its worker process say to each other: one JSON document a line, over two pipes.

A request is `{"id", "do", "with"}`. It is answered by `{"id", "done", "seconds"}`, by `{"id", "error": {"kind",
"message"}}`, or by `{"id", "lost"}` from a worker that cannot go on. Before that may come `{"id", "news"}`, which hands
a `Progress` on, and `{"id", "beat"}`, which says only that the worker waits for its turn on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoprec.probe.workload import Workload, workload_from
from autoprec.study.race import Answer, Spread, judge

__all__ = ["Hopeless", "Loading", "Opened", "Order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How any process makes a workload: the arguments of `workload_from`, all of them plain."""

    model: str
    device: str
    data: str | None = None
    task: str | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    batches: int | None = None
    mode: str | None = None
    metric: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def load(self, device: str | None = None) -> Workload:
        """Make the workload, on another device if given.

        A user's function that draws weights without a seed draws the same ones each time.

        Raises:
            ModelError, DataError, DeviceError, UsageError: as `workload_from`.
        """
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("model", "device")}
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            torch.manual_seed(self.seed)
            return workload_from(self.model, device=device or self.device, **named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hopeless:
    """Says whether a plan's drops so far are shown to be above a limit, whatever is still to come."""

    limit: float
    #: drops by batch of plans measured before
    earlier: Sequence[tuple[float, ...]]
    #: batches in all
    planned: int

    def __call__(self, drops: Sequence[float]) -> bool:
        spread = Spread.of(self.earlier, drops)
        return judge(drops, self.limit, spread=spread, planned=self.planned) is Answer.ABOVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A `Request` in words: its workload is the batches of these numbers, its forecast is the worker's own."""

    plan: Mapping[str, Any]
    name: str
    batches: tuple[int, ...]
    emulate: bool
    forecast: bool
    reference_ms: float | None
    timing_seconds: float
    stop_slower: float | None
    #: of the time allowed; None: no limit
    left_seconds: float | None
    hopeless: Hopeless | None
    drop_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a worker has loaded."""

    weights: str
    data: str
