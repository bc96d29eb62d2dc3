"""`AutoPrecisionArguments`: TrainingArguments that say where the plan comes from when none is given."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments

from autoprec.errors import UsageError
from autoprec.plan import Plan
from autoprec.recommender.recommender import recommend

__all__ = ["AutoPrecisionArguments", "chosen_plan"]

_logger = logging.getLogger(__name__)

#: tokens an example of which nothing is known: the default of `autoprec.recommend`
_TOKENS = 512


@dataclass
class AutoPrecisionArguments(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments that choose a plan when training starts: that of a file, or the one recommended."""

    auto_precision: bool = field(default=False, metadata={"help": "Recommend a plan for the model and this device."})
    precision_plan: str | None = field(default=None, metadata={"help": "A plan.json to use instead."})
    precision_max_drop: str = field(
        default="0.25%", metadata={"help": "Largest quality drop wanted: % of the loss, or nats."}
    )


def chosen_plan(model: nn.Module, args: Any) -> Plan:
    """Return the plan that the arguments ask for, and log why it is that.

    Raises:
        UsageError: they ask for none.
        PlanError: the file is no plan.
    """
    if path := getattr(args, "precision_plan", None):
        return Plan.load(path)
    if not getattr(args, "auto_precision", False):
        raise UsageError(
            "no plan is given: pass plan= (a Plan, or the path of a plan.json), or AutoPrecisionArguments("
            "auto_precision=True) to have one recommended"
        )
    found = recommend(
        model,
        device=str(args.device),
        batch_size=args.per_device_train_batch_size,
        seq_len=_tokens(model, args),
        method="lora" if hasattr(model, "peft_config") else "full",
        max_drop=getattr(args, "precision_max_drop", "0.25%"),
    )
    _logger.info("plan recommended for %s: %s", args.device, " ".join(found.reasons))
    return found.plan


def _tokens(model: nn.Module, args: Any) -> int:
    """Return what is known of an example's length: TRL's arguments say it, and a model takes no more than its own."""
    wanted = getattr(args, "max_length", None) or _TOKENS
    config = getattr(model, "config", None)
    return int(min(wanted, getattr(config, "max_position_embeddings", None) or wanted))
