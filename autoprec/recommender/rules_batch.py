"""Rules on the batch and what is around it: recomputing, accumulating, larger batches, several devices, data."""

from __future__ import annotations

from autoprec.recommender.rule import Case, Level, Rule, Topic

__all__ = ["BATCH_RULES"]

_GB = 1e9
#: a step shorter than this is easily kept waiting by one process that reads data
_SHORT_STEP_MS = 250.0
#: a larger micro-batch is worth changing for from this gain in tokens a second
_BATCH_GAIN = 1.1


def _grows(case: Case) -> float:
    """Return how many times more tokens a second the largest batch gives; 1 where nothing is predicted."""
    largest, step = case.expected.get("at_largest_batch"), case.step_ms()
    if not largest or not step or not case.micro_batch or "tokens_per_s" not in largest["plan"]:
        return 1.0
    if largest["plan"]["batch_size"] <= case.micro_batch:
        return 1.0
    return float(largest["plan"]["tokens_per_s"]["value"]) / (1e3 * case.micro_batch * case.seq_len / step)


def _larger(case: Case) -> str:
    size = case.expected["at_largest_batch"]["plan"]["batch_size"]
    return (
        f"up to {size} sequences fit at once and give {_grows(case):.2f}x the tokens a second, predicted: where you "
        "accumulate, take fewer passes of a larger batch; beyond that the learning rate is part of the change"
    )


def _accumulates(case: Case) -> str:
    return (
        f"{case.micro_batch} sequences at once and {case.memory['accumulation']} times accumulated give the batch that "
        "was asked: not all of it fits at once"
    )


def _sharding(case: Case) -> str:
    remedy = case.remedy("weights and states over")
    assert remedy is not None  # the rule's condition
    count = remedy["name"].removeprefix("weights and states over ")
    return (
        f"sharded over {count} it fits, {remedy['total_bytes'] / _GB:.1f} GB each: autoprec export --to fsdp2, or "
        "--to deepspeed (ZeRO-3, whose bf16 section must stay off or no unit could be fp32)"
    )


def _data(case: Case) -> str:
    step = case.step_ms()
    assert step is not None  # the rule's condition
    rate = 1e3 * max(1, case.micro_batch) / step
    return (
        f"a step takes about {step:.0f} ms, so {rate:.0f} sequences a second must arrive: dataloader_num_workers=4 and "
        "tokenised data, or faster formats only wait longer"
    )


BATCH_RULES = (
    Rule(
        code="R25",
        topic=Topic.MEMORY,
        level=Level.SHOULD,
        applies=lambda c: c.trains and bool(c.micro_batch) and c.memory["checkpointing"] != "none",
        says=lambda c: (
            "the batch does not fit with all activations kept: recompute them, for about a third more compute "
            f"({c.memory['total_bytes'] / _GB:.1f} GB then)"
        ),
        source="Chen et al. (arXiv:1604.06174); torchtitan docs",
    ),
    Rule(
        code="R39",
        topic=Topic.MEMORY,
        level=Level.STOPS,
        applies=lambda c: bool(c.micro_batch) and c.memory["accumulation"] > 1,
        says=_accumulates,
        source="the memory model of this package (docs/memory.md)",
    ),
    Rule(
        code="R40",
        topic=Topic.SPEED,
        level=Level.SHOULD,
        applies=lambda c: c.trains and _grows(c) >= _BATCH_GAIN,
        says=_larger,
        source="the time and memory models of this package",
    ),
    Rule(
        code="R41",
        topic=Topic.DEVICES,
        level=Level.SHOULD,
        applies=lambda c: c.trains_all and not c.micro_batch and c.remedy("weights and states over") is not None,
        says=_sharding,
        source="Rajbhandari et al., ZeRO (arXiv:1910.02054); PyTorch FSDP2",
    ),
    Rule(
        code="R42",
        topic=Topic.DEVICES,
        level=Level.NOTE,
        applies=lambda c: c.trains and c.cuda and c.low,
        says=lambda c: (
            "on several devices gradients are those of fp32 weights and are reduced in fp32; FSDP2: "
            "MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32), which leaves casting to the plan"
            + (", and every rank must skip the same steps: an overflow is every rank's" if c.plan.grad_scaler else "")
        ),
        source="PyTorch FSDP2 docs; Micikevicius et al. (arXiv:1710.03740)",
    ),
    Rule(
        code="R43",
        topic=Topic.SPEED,
        level=Level.NOTE,
        applies=lambda c: c.trains and (c.step_ms() or _SHORT_STEP_MS) < _SHORT_STEP_MS,
        says=_data,
        source="PyTorch performance tuning guide",
    ),
)
