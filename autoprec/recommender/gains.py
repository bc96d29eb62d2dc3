"""What each unit's formats save on a device: seconds of a step by unit and format, predicted, else by roofline.

A device that the time model does not know (a CPU, say) gets the roofline of its matmul rates; one without rates gets
what every catalogued device with native 16-bit units has at the least, twice the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprec.errors import DeviceError
from autoprec.formats import Format, Fp8Recipe
from autoprec.predict.additive import StepPrices, step_prices
from autoprec.predict.setup import Setup
from autoprec.recommender.features import UnitFacts, bandwidth, fp8_seconds, gemm_seconds, rate_tflops
from autoprec.records import DeviceProfile, ModelFacts, ModelProfile

__all__ = ["Gains", "gains"]

#: 16-bit over FP32 rate where none is known: the least of all catalogued peaks of devices with native units
_UNKNOWN_GAIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """Seconds that each unit adds to a step in FP32, in the 16-bit format and, where it is known, in FP8.

    `predicted`: by the time model, host and casts counted; else by roofline. `step` is the whole step's, 16-bit.
    """

    seconds: Mapping[str, Mapping[Format, float]]
    half: Format
    step: float
    prices: StepPrices | None

    def half_gain(self, unit: str) -> float:
        """How many times faster than in FP32 a unit is in the 16-bit format."""
        own = self.seconds[unit]
        return own[Format.FP32] / own[self.half] if own[self.half] > 0 else 1.0

    def fp8_gain(self, unit: str) -> float:
        """How many times faster than in the 16-bit format a unit is in FP8; 0 where FP8 cannot be."""
        own = self.seconds[unit]
        return own[self.half] / own[Format.FP8] if own.get(Format.FP8, 0.0) > 0 else 0.0

    def total(self, assignment: Mapping[str, Format]) -> float:
        """Return the seconds of a step of an assignment."""
        if self.prices is not None:
            return self.prices.seconds(assignment)
        return sum(own.get(assignment[name], own[self.half]) for name, own in self.seconds.items())


def gains(
    profile: ModelProfile,
    facts: Mapping[str, UnitFacts],
    device: DeviceProfile,
    setup: Setup,
    model_facts: ModelFacts | None,
    *,
    half: Format,
    recipe: Fp8Recipe | None,
    tf32: bool,
    compiled: bool = False,
) -> Gains:
    """Return what units take on a device.

    Args:
        half: the 16-bit format.
        recipe: of FP8; None: FP8 is not considered.
        tf32: FP32 runs in TF32.
    """
    try:
        prices = step_prices(profile, device, setup, model_facts, tf32=tf32, compiled=compiled, recipe=recipe)
        base = {u.name: half if half in u.formats else Format.FP32 for u in profile.units}
        tangent = prices.tangent(base)
    except (DeviceError, KeyError):  # a peak is missing, or the time model does not know the device
        return _by_roofline(facts, device, setup, half=half, recipe=recipe, tf32=tf32)
    found: dict[str, dict[Format, float]] = {}
    for unit in profile.units:
        wanted = {base[unit.name], Format.FP32, *([Format.FP8] if recipe else [])}
        found[unit.name] = own = {
            f: prices.unit_seconds(unit.name, f, tangent) for f in wanted if f in prices.units[unit.name]
        }
        own.setdefault(Format.FP32, _UNKNOWN_GAIN * own[base[unit.name]])
        own.setdefault(half, own[Format.FP32])
    whole = all(Format.FP32 in own for own in prices.units.values())
    return Gains(seconds=found, half=half, step=prices.seconds(base), prices=prices if whole else None)


def _by_roofline(
    facts: Mapping[str, UnitFacts],
    device: DeviceProfile,
    setup: Setup,
    *,
    half: Format,
    recipe: Fp8Recipe | None,
    tf32: bool,
) -> Gains:
    """Return the seconds of matmuls alone."""
    wide, low, fp8 = (rate_tflops(device, f) for f in ("tf32" if tf32 else Format.FP32, half, Format.FP8))
    moved = bandwidth(device)
    known = wide is not None and low is not None
    fast = low.value if known and low else _UNKNOWN_GAIN
    slow = wide.value if known and wide else 1.0
    found: dict[str, dict[Format, float]] = {}
    for name, fact in facts.items():
        found[name] = {
            Format.FP32: _matmuls(fact, setup, slow, moved if known else None, 4),
            half: _matmuls(fact, setup, fast, moved if known else None, 2),
        }
        if recipe and fp8 and moved and known:
            found[name][Format.FP8] = sum(
                sum(fp8_seconds(leaf, setup.tokens, setup.mode, fp8.value, moved, recipe)) for leaf in fact.gemms
            )
    return Gains(seconds=found, half=half, step=sum(own[half] for own in found.values()), prices=None)


def _matmuls(fact: UnitFacts, setup: Setup, rate: float, moved: float | None, width: int) -> float:
    return sum(gemm_seconds(leaf, setup.tokens, setup.mode, rate, moved, width) for leaf in fact.gemms)
