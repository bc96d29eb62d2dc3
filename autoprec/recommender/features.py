"""What the recommender knows of a unit and a device, as figures: shapes, work, rates, and what FP8 would save.

The time of a linear layer in FP8 follows torchao's roofline (testing/training/roofline_utils.py): each matmul takes the
larger of its arithmetic and its memory traffic, and each operand is read twice and written in FP8 before it (once for
the scale, once for the cast). Measured H100 ratios it was checked against are in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autoprec.catalog import device_names, find_entry
from autoprec.formats import Format, Fp8Recipe
from autoprec.records import DeviceProfile, Estimate, Leaf, LeafKind, Mode, ModelProfile, Origin, Unit

__all__ = ["UnitFacts", "bandwidth", "fp8_seconds", "gemm_seconds", "rate_tflops", "step_seconds", "unit_facts"]

_GEMMS = (LeafKind.LINEAR, LeafKind.CONV1D)
_BLOCK = re.compile(r"(?:^|(.*?)\.)(\d+)(?:\.|$)")
#: share of the peak a large matmul reaches where no figure of the device is known (torchao, H100)
_GEMM_SHARE = 0.78
_BANDWIDTH_SHARE = 0.92
_LAUNCH_SECONDS = 2e-6
#: bytes moved per element to scale and cast (input, output gradient, weight), in training and in inference
_CAST_BYTES = {
    Fp8Recipe.TENSORWISE: {Mode.TRAIN: (6, 6, 8), Mode.INFER: (6, 0, 5)},
    Fp8Recipe.ROWWISE: {Mode.TRAIN: (8, 8, 10), Mode.INFER: (5, 0, 5)},
}


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """A unit with its matmul leaves and its place in the model."""

    unit: Unit
    gemms: tuple[Leaf, ...]
    #: (name of the stack of blocks, index of the block); None outside the blocks
    block: tuple[str, int] | None
    #: the block is the first or the last of its stack
    edge: bool
    #: blocks of its stack; 0 outside the blocks
    blocks: int = 0
    #: largest |weight| of a matrix over its root mean square (`weight_outliers`); None where weights were not seen
    outlier: float | None = None

    @property
    def depth(self) -> float:
        """Place in the stack, from 0 to 1; 1 outside the blocks, where the head is."""
        return 1.0 if self.block is None or self.blocks < 2 else self.block[1] / (self.blocks - 1)

    @property
    def stack_end(self) -> str:
        """Which stack its block is in, as far as models share a word for it."""
        name = self.block[0] if self.block else ""
        return next((word for word in ("encoder", "decoder") if word in name), "")

    @property
    def parameters(self) -> int:
        """Weights of all matmul leaves."""
        return sum(leaf.inputs * leaf.outputs for leaf in self.gemms)


def unit_facts(profile: ModelProfile, outliers: Mapping[str, float] | None = None) -> dict[str, UnitFacts]:
    """Return the facts of each unit by name; `outliers` by unit, of those whose weights were seen."""
    leaves = {leaf.module: leaf for leaf in profile.leaves}
    places = {unit.name: _block(unit) for unit in profile.units}
    ends: dict[str, tuple[int, int]] = {}
    for place in places.values():
        if place is not None:
            low, high = ends.get(place[0], (place[1], place[1]))
            ends[place[0]] = (min(low, place[1]), max(high, place[1]))
    facts = {}
    for unit in profile.units:
        own = tuple(leaves[m] for m in unit.modules if m in leaves and leaves[m].kind in _GEMMS)
        place = places[unit.name]
        count = 0 if place is None else ends[place[0]][1] + 1
        edge = place is not None and place[1] in ends[place[0]]
        facts[unit.name] = UnitFacts(unit, own, place, edge, count, (outliers or {}).get(unit.name))
    return facts


def rate_tflops(device: DeviceProfile, name: str) -> Estimate | None:
    """Return the matmul rate of a format (or 'tf32') in TFLOP/s: measured, else from the datasheet, else None.

    A datasheet peak is lowered to the share that large matmuls reach.
    """
    measured = [r for r in device.gemm_rates if r.format == name]
    if measured:
        best = max(measured, key=lambda r: r.size)
        return Estimate(best.tflops, best.tflops_low, best.tflops_high, Origin.MEASURED)
    if name in device.peak_tflops:
        value = _achieved(device, name) * device.peak_tflops[name]
        return Estimate(value, value, value, Origin.DATASHEET)
    return None


def bandwidth(device: DeviceProfile) -> float | None:
    """Return the usable memory bandwidth in bytes per second, measured or from the datasheet."""
    if device.copy_gb_per_s is not None:
        return device.copy_gb_per_s.value * 1e9
    return _BANDWIDTH_SHARE * device.bandwidth_gb_per_s * 1e9 if device.bandwidth_gb_per_s else None


def gemm_seconds(leaf: Leaf, tokens: int, mode: Mode, rate: float, bytes_per_s: float | None, width: int) -> float:
    """Return the seconds of a leaf's matmuls in one step; `rate` in TFLOP/s, `width` in bytes an operand's element."""
    m, k, n = tokens, leaf.inputs, leaf.outputs
    arithmetic = 2 * m * k * n / (rate * 1e12)
    traffic = (width * (m * k + k * n) + max(width, 2) * m * n) / bytes_per_s if bytes_per_s else 0.0
    return _matmuls(mode) * max(arithmetic, traffic, _LAUNCH_SECONDS)


def fp8_seconds(
    leaf: Leaf, tokens: int, mode: Mode, rate: float, bytes_per_s: float, recipe: Fp8Recipe
) -> tuple[float, float]:
    """Return the seconds of a leaf's FP8 matmuls, and those of finding scales and casting."""
    m, k, n = tokens, leaf.inputs, leaf.outputs
    casts = 0.0
    for elements, moved, kernels in zip((m * k, m * n, k * n), _CAST_BYTES[recipe][mode], (2, 2, 3), strict=True):
        if moved:
            casts += max(elements * moved / bytes_per_s, kernels * _LAUNCH_SECONDS)
    return gemm_seconds(leaf, tokens, mode, rate, bytes_per_s, 1), casts


def step_seconds(
    facts: Mapping[str, UnitFacts],
    formats: Mapping[str, Format],
    rates: Mapping[str, float],
    *,
    tokens: int,
    mode: Mode,
    bytes_per_s: float | None,
    tf32: bool = False,
    recipe: Fp8Recipe | None = None,
) -> float:
    """Return the seconds that all matmuls of an assignment take in one step; `rates` in TFLOP/s by format."""
    total = 0.0
    for name, fact in facts.items():
        choice = formats[name]
        for leaf in fact.gemms:
            if choice is Format.FP8 and recipe is not None and bytes_per_s is not None:
                total += sum(fp8_seconds(leaf, tokens, mode, rates[choice], bytes_per_s, recipe))
            else:
                rate = rates["tf32" if tf32 and choice is Format.FP32 else choice]
                width = 4 if choice is Format.FP32 else 2
                total += gemm_seconds(leaf, tokens, mode, rate, bytes_per_s, width)
    return total


def _achieved(device: DeviceProfile, name: str) -> float:
    """Return the share of the peak that large matmuls reach, from the catalogue where it has one."""
    if device.name not in device_names():
        return _GEMM_SHARE
    return find_entry(device.name).achieved_fraction.get(name, _GEMM_SHARE)


def _matmuls(mode: Mode) -> int:
    """A linear layer has one matmul forward, and two more backward."""
    return 3 if mode is Mode.TRAIN else 1


def _block(unit: Unit) -> tuple[str, int] | None:
    """Return the stack and index of the block a unit lies in, from the first number in its modules' names."""
    places = set()
    for module in unit.modules:
        match = _BLOCK.match(module)
        places.add((match[1] or "", int(match[2])) if match else None)
    return places.pop() if len(places) == 1 else None
