"""How a model is run and stored: the closed choices that memory depends on, and what each costs a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from autoprec.errors import UsageError, closest
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import Mode

__all__ = [
    "Adapters",
    "Attention",
    "Checkpointing",
    "Loss",
    "Optimizer",
    "Setup",
    "Sharding",
    "StatePolicy",
    "States",
    "TrainMethod",
    "choice_of",
    "states_of",
    "stored_policy",
]

T = TypeVar("T", bound=StrEnum)


class TrainMethod(StrEnum):
    """What is trained."""

    FULL = "full"  #: every weight
    LORA = "lora"  #: adapters beside a frozen base
    QLORA = "qlora"  #: adapters beside a frozen base in 4 bits


class StatePolicy(StrEnum):
    """How weights, gradients and master copies are stored."""

    FP32 = "fp32"  #: all in FP32, with or without autocast
    MIXED = "mixed"  #: weights and gradients in 16 bits, moments in FP32: the simple count, without master copies
    MIXED_MASTER = "mixed-master"  #: the same with an FP32 master copy, as optimizers for 16-bit weights keep it
    BF16 = "bf16"  #: weights, gradients and moments in 16 bits: `model.to(bfloat16)`


class Optimizer(StrEnum):
    """What the optimizer keeps of each trained parameter."""

    ADAMW = "adamw"  #: fused, which the Trainer takes
    ADAMW_FOREACH = "adamw-foreach"  #: PyTorch's default on a GPU: needs a list of temporaries as large as the weights
    ADAMW_8BIT = "adamw-8bit"
    ADAMW_BF16_SR = "adamw-bf16-sr"  #: BF16 weights and moments, stochastic rounding instead of master copies
    SGD = "sgd"
    SGD_MOMENTUM = "sgd-momentum"


class Checkpointing(StrEnum):
    """Which activations are computed again in the backward."""

    NONE = "none"
    SELECTIVE = "selective"  #: results of matmuls and attention are kept, all else is computed again
    FULL = "full"  #: only the stream between blocks is kept


class Sharding(StrEnum):
    """What is divided among devices."""

    NONE = "none"
    ZERO1 = "zero1"  #: optimizer states and master copies
    ZERO2 = "zero2"  #: and gradients
    ZERO3 = "zero3"  #: and weights, gathered a unit at a time
    FSDP = "fsdp"  #: as ZeRO 3


class Loss(StrEnum):
    """How the cross-entropy is computed."""

    PLAIN = "plain"  #: all logits, widened to FP32, as transformers does
    NARROW = "narrow"  #: all logits, in the format they come in
    FUSED = "fused"  #: in chunks, with the head's matmul; no logits are kept


class Adapters(StrEnum):
    """Which layers have adapters."""

    ALL = "all-linear"  #: every linear layer of attention and FFN (QLoRA's advice)
    QUERY_VALUE = "query-value"  #: queries and values alone (LoRA's paper)


class Attention(StrEnum):
    """Which attention kernel runs."""

    SDPA = "sdpa"
    FLASH = "flash"
    EAGER = "eager"  #: keeps the probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to run a model."""

    mode: Mode
    batch_size: int
    seq_len: int
    method: TrainMethod = TrainMethod.FULL
    policy: StatePolicy = StatePolicy.FP32
    #: None: gradients alone, no optimizer
    optimizer: Optimizer | None = Optimizer.ADAMW
    checkpointing: Checkpointing = Checkpointing.NONE
    attention: Attention = Attention.SDPA
    loss: Loss = Loss.PLAIN
    sharding: Sharding = Sharding.NONE
    devices: int = 1
    #: backward passes between optimizer steps
    accumulation: int = 1
    dropout: bool = False
    adapter_rank: int = 16
    adapters: Adapters = Adapters.ALL
    #: 4-bit weights have their scales quantised as well
    double_quant: bool = False
    #: 4-bit layers keep their input for the backward, as those of bitsandbytes 0.41 did
    packed_inputs: bool = False
    #: format of cached keys and values; None: no cache
    cache: Format | None = None
    device_kind: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens a micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.mode is Mode.TRAIN


@dataclass(frozen=True, slots=True)
class States:
    """Bytes a trained parameter: as stored, its gradient, its master copy, the optimizer's states and temporaries."""

    weight: int
    gradient: int
    master: int
    optimizer: float
    temporary: int

    @property
    def total(self) -> float:
        """Bytes a parameter from one step to the next, gradient included."""
        return self.weight + self.gradient + self.master + self.optimizer


#: block-wise 8-bit states have one FP32 scale a block of 256 values (bitsandbytes `optimizer_update_8bit_blockwise`)
_SCALE_SHARE = 4 / 256
_WIDTHS = {Format.FP32: 4, Format.BF16: 2, Format.FP16: 2}


def states_of(policy: StatePolicy, optimizer: Optimizer | None) -> States:
    """Return the bytes a trained parameter takes."""
    wide = policy is StatePolicy.FP32
    weight = gradient = 4 if wide else 2
    master = 4 if policy is StatePolicy.MIXED_MASTER else 0
    moment = 2 if policy is StatePolicy.BF16 or optimizer is Optimizer.ADAMW_BF16_SR else 4
    kept = {
        None: 0.0,
        Optimizer.SGD: 0.0,
        Optimizer.SGD_MOMENTUM: float(moment),
        Optimizer.ADAMW_8BIT: 2 + 2 * _SCALE_SHARE,
    }.get(optimizer, 2.0 * moment)
    temporary = moment if optimizer is Optimizer.ADAMW_FOREACH else 0
    return States(weight, gradient, master, kept, temporary)


def stored_policy(plan: Plan, optimizer: Optimizer | None) -> StatePolicy:
    """Return how a plan stores its weights: autocast keeps them in FP32, a cast model and BF16 optimizers do not."""
    if optimizer is Optimizer.ADAMW_BF16_SR or plan.stream is not Format.FP32:
        return StatePolicy.BF16
    return StatePolicy.FP32


def choice_of(kind: type[T], value: str, what: str) -> T:
    """Return the member of an enum that a text names.

    Raises:
        UsageError: no member is called so; names the closest and all.
    """
    name = str(value).lower().replace("_", "-")
    try:
        return kind(name)
    except ValueError:
        raise UsageError(
            f"'{value}' is no {what}; choose one of {', '.join(kind)}{closest(name, list(kind))}"
        ) from None
