"""What is claimed of mixed precision and what autoprec finds of it: from recorded results and live predictions.

A finding is a text with its origin and source; a claim has the verdict that its findings give. Nothing here is timed:
predictions are the package's own, datasheets are its catalogue, measurements are read from benchmarks/results/ and
benchmarks/truths/.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from record import RESULTS

from autoprec.catalog import find_device
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast, Forecasted
from autoprec.records import Estimate, Mode, Origin

__all__ = [
    "BATCH",
    "CLAIMS",
    "LENGTH",
    "MODEL",
    "STEP",
    "TIMES",
    "Claim",
    "Finding",
    "Found",
    "Verdict",
    "baseline",
    "claim",
    "forecast",
    "needed",
    "percent",
    "ratio",
    "recorded",
    "result_source",
    "uniform",
]


class Verdict(StrEnum):
    """How a claim stands to what was found."""

    HOLDS = "holds"
    PART = "holds in part"
    NOT = "does not hold"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and where the figures are from."""

    text: str
    origin: Origin | str
    source: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, and the function that returns its verdict with what was found."""

    subject: str
    text: str
    find: Callable[[], tuple[Verdict, list[Finding]]]


CLAIMS: list[Claim] = []

Found = tuple[Verdict, list[Finding]]
#: sequences and tokens of a predicted training step: what fits every card of the table in FP32
BATCH, LENGTH = 8, 512
STEP = f"one training step of {BATCH} × {LENGTH} tokens, AdamW, eager"
MODEL = "openai-community/gpt2"
TIMES = "`autoprec.predict`, [predictions.md](predictions.md)"


def claim(subject: str, text: str) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    """Register a claim with the function below it."""

    def add(find: Callable[[], Found]) -> Callable[[], Found]:
        CLAIMS.append(Claim(subject, text, find))
        return find

    return add


# what figures are from


@functools.cache
def forecast(
    card: str, model: str = MODEL, batch: int = BATCH, length: int = LENGTH, *, compiled: bool = False
) -> Forecast:
    """Return the predictions of a model's training step on a card."""
    return Forecast(
        device=find_device(card),
        profile=catalogued_profile(model),
        facts=catalogued_facts(model),
        mode=Mode.TRAIN,
        batch_size=batch,
        seq_len=length,
        compiled=compiled,
    )


def uniform(given: Forecast, choice: str) -> Forecasted:
    """Return what is predicted of blanket autocast, or of TF32's switch alone."""
    tf32 = choice == "tf32"
    plan = Plan.uniform(given.profile, "fp32" if tf32 else choice, device=given.device, mode=given.mode, tf32=tf32)
    return given.of(plan)


def recorded(name: str) -> dict[str, Any] | None:
    """Return a recorded result, None where it was not recorded yet."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def needed(name: str) -> dict[str, Any]:
    found = recorded(name)
    assert found is not None, f"benchmarks/results/{name}.json is missing"
    return found


def result_source(name: str) -> str:
    """Return where a recorded figure is, and when and on what it was taken."""
    data = needed(name)
    return f"`benchmarks/results/{name}.json` ({data['date']}, {data['device']['name']})"


def ratio(found: Estimate) -> str:
    return f"{found.value:.2g} ({found.low:.2g}–{found.high:.2g})"


def percent(value: float) -> str:
    return f"{value:.2g} %"


def baseline(name: str) -> Mapping[str, Any]:
    """Return what the recorded search of SmolLM2 measured of a baseline."""
    return next(row for row in needed("search-smollm2-infer")["figures"]["baselines"] if row["name"] == name)
