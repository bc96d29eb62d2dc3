"""A device as the time model sees it: sustained rates by format, multiprocessors, bandwidth, and what is known of each.

A new card needs single numbers only: its datasheet's peaks, or what `autoprec probe` measures on it. Where nobody
measured what large matmuls reach of a peak, it is a share that depends on the kind of unit, and on whether the board's
power feeds the peak at full clock (an L4 has 1.7 TFLOP/s a watt to feed, an H100 SXM 1.4, an A100 SXM 0.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autoprec.errors import DeviceError
from autoprec.formats import Format
from autoprec.kept import BOOST
from autoprec.predict.coefficients import AttentionShares, Coefficients, Family, Sustained
from autoprec.records import DeviceProfile, Hardware, Support

__all__ = ["LOW_POWER_WATTS", "TF32", "Card", "Rate", "Units", "card_of", "sustained_share"]

TF32 = "tf32"
#: a format's place in the scale of work a watt: 16-bit matrix units are 1
_WORK = {"bf16": 1.0, "fp16": 1.0, TF32: 0.5, "fp8": 2.0}
_ALIKE = {"bf16": "fp16", "fp16": "bf16"}
#: 16-bit over FP32 peak of cards whose FP32 accumulation is halved (GeForce): such units are never short of power
_HALVED = {"turing": 4.1, "ampere": 2.1, "ada": 2.1, "blackwell-geforce": 2.1}
#: capability from which a multiprocessor's second half of FP32 units shares its path with integers (GA10x whitepaper)
_SHARED_FP32 = (8, 6)
#: boards that a slot feeds alone, most of them cooled by the air of the chassis
LOW_POWER_WATTS = 75.0
#: multiprocessors of a card whose number nobody says: the middle of the catalogue's
_SOME_UNITS = 80
#: an operation of an eager step, its module and what autocast looks up counted in, over a launch by itself: of 1.6 to
#: 2.25 the best on an H200 (benchmarks/bench_cards.py)
_OPERATION = 2.0


class Units(StrEnum):
    """Which units multiply."""

    VECTOR = "vector"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Rate:
    """Sustained FLOP/s in a format; `measured` where a figure of this card says so, else it is an estimate."""

    flops: float
    units: Units
    measured: bool
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The numbers of one card."""

    name: str
    family: Family
    #: multiprocessors
    units: int
    #: inner dimension at which matmuls take twice as long; infinite where long rows cost nothing
    long_rows: float
    #: bytes a second, of the datasheet or what a measured copy implies
    bandwidth: float
    rates: Mapping[str, Rate]
    attention: AttentionShares
    #: why a format has no rate
    absent: Mapping[str, str]
    #: what its own host takes for an operation of an eager step; None where that was not measured
    eager_seconds: float | None = None
    #: what its rate is at depends on how warm it runs
    low_power: bool = False
    #: what is not as well known as it should be
    doubts: tuple[str, ...] = ()

    def rate(self, key: str) -> Rate:
        """Return the rate of a format or of `tf32`.

        Raises:
            DeviceError: the card does not compute in it, with the reason and what it does compute in.
        """
        if key not in self.rates:
            raise DeviceError(
                f"{self.name} has no matmul in {key}: {self.absent.get(key, 'no peak is known')}. "
                f"Choose one of {', '.join(sorted(self.rates))}, or another device."
            )
        return self.rates[key]


def card_of(profile: DeviceProfile, numbers: Coefficients) -> Card:
    """Return the card of a device profile.

    Raises:
        DeviceError: nothing is known to predict from, or figures contradict each other.
    """
    hardware = profile.hardware or Hardware(vendor="")
    family = numbers.families.get(hardware.vendor)
    moved = _bandwidth(profile, family)
    if family is None or moved is None or not (profile.peak_tflops or profile.gemm_rates):
        raise DeviceError(
            f"no time can be predicted for {profile.name}: {_missing(profile, numbers)}. Measure on it (`autoprec "
            "search` there), or name a GPU of the catalogue, such as h100-sxm-80gb."
        )
    check_contradictions(profile)
    rates, absent = {}, {}
    for key in (*Format, TF32):
        found = _rate(profile, hardware, key, numbers.sustained)
        if isinstance(found, Rate):
            rates[str(key)] = found
        else:
            absent[str(key)] = found
    doubts = [] if hardware.multiprocessors else [f"the multiprocessors of {profile.name} are not known"]
    low_power = hardware.power_watts is not None and hardware.power_watts <= LOW_POWER_WATTS
    if low_power:
        doubts.append(f"{profile.name} is a board of {hardware.power_watts:g} W: how warm it runs decides its clocks")
    return Card(
        name=profile.name,
        family=family,
        units=hardware.multiprocessors or _SOME_UNITS,
        long_rows=family.long_rows.get(profile.architecture or "", math.inf),
        bandwidth=moved,
        rates=rates,
        attention=family.attention.get(profile.architecture or "", family.attention["other"]),
        absent=absent,
        eager_seconds=profile.launch_us.value * 1e-6 * _OPERATION if profile.launch_us else None,
        low_power=low_power,
        doubts=tuple(doubts),
    )


def check_contradictions(profile: DeviceProfile) -> None:
    """Check that a device's figures can all be true.

    Raises:
        DeviceError: naming the two that cannot.
    """
    peaks = profile.peak_tflops
    for lower, higher in (("fp32", "bf16"), ("fp32", "fp16"), (TF32, "bf16"), ("bf16", "fp8"), ("fp16", "fp8")):
        if lower in peaks and higher in peaks and peaks[lower] > peaks[higher]:
            raise DeviceError(
                f"the figures of {profile.name} contradict each other: its peak in {lower} is {peaks[lower]:g} TFLOP/s "
                f"and in {higher} only {peaks[higher]:g}. Correct the device file, or measure on the card."
            )
    for seen in profile.gemm_rates:
        peak = peaks.get(seen.format)
        if peak is not None and seen.tflops > BOOST * peak:
            raise DeviceError(
                f"the figures of {profile.name} contradict each other: {seen.tflops:g} TFLOP/s measured in "
                f"{seen.format}, and a peak of {peak:g}. Measure again, or correct the device file."
            )


def _missing(profile: DeviceProfile, numbers: Coefficients) -> str:
    if profile.kind == "cpu" or profile.hardware is None or profile.hardware.vendor not in numbers.families:
        return f"the time model knows GPUs of {' and '.join(sorted(numbers.families))}"
    return "its peaks or its memory bandwidth are not known"


def _bandwidth(profile: DeviceProfile, family: Family | None) -> float | None:
    """Return bytes a second as a datasheet would give them; a measured copy is what elementwise kernels get of it."""
    if profile.copy_gb_per_s is not None and family is not None:
        return profile.copy_gb_per_s.value * 1e9 / family.move_bandwidth
    return profile.bandwidth_gb_per_s * 1e9 if profile.bandwidth_gb_per_s else None


def _rate(profile: DeviceProfile, hardware: Hardware, key: str, sustained: Sustained) -> Rate | str:
    """Return the rate in a format, or why there is none."""
    support = profile.tf32 if key == TF32 else profile.formats[Format(key)]
    if support.support is Support.ABSENT:
        return support.reason
    vector = key == Format.FP32 or support.support is Support.EMULATED
    units = Units.VECTOR if vector else Units.MATRIX
    seen = max((r.tflops for r in profile.gemm_rates if r.format == key), default=None)
    if seen is not None:
        return Rate(seen * 1e12, units, True, "best matmul measured by autoprec probe")
    if support.support is Support.EMULATED:
        base = _rate(profile, hardware, Format.FP32, sustained)
        if isinstance(base, str):
            return base
        share = sustained.emulated.get(key, 1.0)
        return Rate(base.flops * share, units, False, f"{share:g} of the rate in fp32, which it widens to")
    peak = profile.peak_tflops.get(key)
    matrix = hardware.fp32_matrix_tflops if key == Format.FP32 else None
    if peak is None:
        return f"no peak in {key} is known of it"
    reached = None if matrix else _reached(hardware, key)
    if reached is not None:
        return Rate(reached * peak * 1e12, units, True, f"{reached:.0%} of the peak, the best matmul on record")
    peak = matrix or peak
    share = sustained_share(profile, key, peak, sustained)
    return Rate(share * peak * 1e12, units, False, f"{share:.0%} of the peak, estimated from the board's power")


def _reached(hardware: Hardware, key: str) -> float | None:
    shares = hardware.achieved_fraction
    return shares.get(key, shares.get(_ALIKE.get(key, ""), None))


def sustained_share(profile: DeviceProfile, key: str, peak: float, sustained: Sustained) -> float:
    """Return what large matmuls are expected to reach of a peak in a format, where nobody measured it."""
    hardware = profile.hardware or Hardware(vendor="")
    generation = _generation(profile)
    vector = key == Format.FP32 and hardware.fp32_matrix_tflops is None and hardware.vendor == "nvidia"
    if vector:
        capability = profile.compute_capability or (0, 0)
        share = sustained.share["vector-shared" if capability >= _SHARED_FP32 else "vector"]
        fed = sustained.vector_per_watt.get(generation)
    else:
        share = sustained.share["matrix-halved" if _is_halved(profile) else f"matrix-{hardware.vendor}"]
        fed = sustained.matrix_per_watt.get(generation)
        fed = fed * _WORK.get(key, 0.25) if fed else None
        if _is_halved(profile):
            return share
    if hardware.power_watts is None or fed is None:
        return share
    return float(share * min(1.0, fed * hardware.power_watts / peak) ** sustained.exponent)


def _is_halved(profile: DeviceProfile) -> bool:
    """Say whether a card multiplies at half rate where it sums in FP32, as GeForce cards do."""
    peaks = profile.peak_tflops
    most = _HALVED.get(profile.architecture or "")
    return most is not None and "fp16" in peaks and "fp32" in peaks and peaks["fp16"] / peaks["fp32"] <= most


def _generation(profile: DeviceProfile) -> str:
    """Return the architecture by which work a watt is known: Ampere was made in two processes."""
    name = (profile.architecture or "").split("-gfx")[0]
    if name == "ampere" and (profile.compute_capability or (0, 0)) >= _SHARED_FP32:
        return "ampere-8nm"
    return name
