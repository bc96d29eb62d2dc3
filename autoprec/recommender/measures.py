"""What the decision tree asks about a unit: figures of shapes, place, device and allowance, none of them a name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from autoprec.formats import Format
from autoprec.predict.setup import Setup
from autoprec.quantities import DropLimit
from autoprec.recommender.features import UnitFacts, bandwidth, rate_tflops
from autoprec.recommender.gains import Gains
from autoprec.records import DeviceProfile, Role

__all__ = ["FEATURES", "SEEN", "limit_percent", "said", "unit_measures"]

#: a limit in nats as a share: language models' loss is about 2 nats a token, so 0.005 nats is the default's 0.25 %
_USUAL_LOSS_NATS = 2.0

FEATURES = (
    "half_gain",
    "fp8_gain",
    "fp8_saves",
    "limit",
    "room",
    "attention",
    "head",
    "depth",
    "log2_tokens",
    "log2_narrowest",
    "half_rate",
    "fp8_rate",
    "flop_per_byte",
    "train",
    "log2_outlier",
)
#: features that only weights tell; NaN where these were not seen
SEEN = ("log2_outlier",)
#: {value}, {threshold} and {than} ('at most' or 'more than') are filled in; what differs from block to block is said by
#: its threshold alone, so that equal units have equal reasons
_WORDS = {
    "half_gain": "in 16 bits it is {value:.2f}x as fast as in fp32 ({than} {threshold:.2f}x)",
    "fp8_gain": "in fp8 it is {value:.2f}x as fast as in 16 bits, casts counted ({than} {threshold:.2f}x)",
    "fp8_saves": "fp8 in this unit saves {than} {threshold:.2g} % of the step",
    "limit": "{value:g} % of drop are allowed ({than} {threshold:.2g} %)",
    "room": "{value:.2g} % of drop are allowed for each unit that fp8 speeds up ({than} {threshold:.2g} %)",
    "depth": "{than} {threshold:.0%} of the way through the stack",
    "log2_tokens": "{than} {power:.0f} tokens a step",
    "log2_narrowest": "its narrowest matmul is {than} {power:.0f} wide",
    "half_rate": "the device multiplies {value:.1f}x as fast in 16 bits as in fp32 ({than} {threshold:.1f}x)",
    "fp8_rate": "the device multiplies {value:.1f}x as fast in fp8 as in 16 bits ({than} {threshold:.1f}x)",
    "log2_outlier": "its largest weight is {than} {power:.0f} times the usual one",
    "flop_per_byte": "{value:.0f} FLOP in 16 bits for a byte of its memory ({than} {threshold:.0f})",
}
_FLAGS = {
    "attention": ("not attention", "attention"),
    "head": ("not the output head", "the output head"),
    "train": ("inference", "training"),
}


def said(feature: str, value: float, threshold: float, *, below: bool) -> str:
    """Return the answer to one question of the tree in words."""
    if math.isnan(value):
        return "its weights were not seen"
    if feature in _FLAGS:
        return _FLAGS[feature][not below]
    than = "at most" if below else "more than"
    return _WORDS[feature].format(
        value=value, threshold=threshold, than=than, power=2.0 ** min(threshold, 60.0) if "log2" in feature else 0.0
    )


def limit_percent(limit: DropLimit) -> float:
    """Return a limit in percent of the loss; one in nats by the usual loss of a language model."""
    return limit.value if limit.percent else 100 * limit.value / _USUAL_LOSS_NATS


def unit_measures(
    facts: Mapping[str, UnitFacts],
    found: Gains,
    device: DeviceProfile,
    setup: Setup,
    limit: float,
    may_fp8: Collection[str],
) -> dict[str, dict[str, float]]:
    """Return the features of units, by unit; those of `SEEN` are NaN where weights were not seen.

    Args:
        limit: allowance in percent.
        may_fp8: units that FP8 is not barred from; of others its gain is 0.
    """
    half, fp8 = rate_tflops(device, found.half), rate_tflops(device, Format.FP8)
    wide = rate_tflops(device, Format.FP32)
    moved = bandwidth(device)
    around = {
        "limit": limit,
        "log2_tokens": math.log2(setup.tokens),
        "half_rate": half.value / wide.value if half and wide else 2.0,
        "fp8_rate": fp8.value / half.value if half and fp8 else 0.0,
        "flop_per_byte": half.value * 1e12 / moved if half and moved else 100.0,
        "train": float(setup.trains),
    }
    gain = {name: found.fp8_gain(name) if name in may_fp8 else 0.0 for name in facts}
    paying = sum(value > 1 for value in gain.values())
    rows = {}
    for name, fact in facts.items():
        own = found.seconds[name]
        saved = own[found.half] - own.get(Format.FP8, own[found.half]) if gain[name] else 0.0
        narrow = min((min(leaf.inputs, leaf.outputs) for leaf in fact.gemms), default=1)
        rows[name] = around | {
            "half_gain": found.half_gain(name),
            "fp8_gain": gain[name],
            "fp8_saves": 100 * saved / found.step if found.step else 0.0,
            "room": limit / max(1, paying),
            "attention": float(fact.unit.role is Role.ATTENTION),
            "head": float(fact.unit.role is Role.LM_HEAD),
            "depth": fact.depth,
            "log2_narrowest": math.log2(max(1, narrow)),
            "log2_outlier": math.log2(fact.outlier) if fact.outlier else math.nan,
        }
    return rows
