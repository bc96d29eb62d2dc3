"""What each unit adds to a step in each format, so that many assignments are priced without predicting each anew.

Kernels add up phase by phase, on the device and on the host; which of the two a step waits for depends on all of them
(`Pricer.step_seconds`). That time is convex in the sums, so its tangent at one assignment adds up over units and lies
below the time of every other: what no assignment can beat by the tangent, none can beat at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import Plan
from autoprec.predict.card import card_of
from autoprec.predict.coefficients import coefficients
from autoprec.predict.kernels import Phase
from autoprec.predict.pricing import OVERLAP, Priced, Pricer
from autoprec.predict.setup import Setup
from autoprec.predict.shape import Shape
from autoprec.predict.steptime import priced_units
from autoprec.predict.work import rest_kernels
from autoprec.predict.workparts import Work
from autoprec.records import DeviceProfile, ModelFacts, ModelProfile, Role

__all__ = ["StepPrices", "Tangent", "step_prices"]

#: by phase: what a second of the device, and what one launch of the host, adds to the step in seconds
Tangent = Mapping[Phase, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrices:
    """Prices of each unit by format, with what no format changes; one mode, batch, ambient format and TF32 switch."""

    pricer: Pricer
    units: Mapping[str, Mapping[Format, Priced]]
    rest: Priced

    def seconds(self, assignment: Mapping[str, Format]) -> float:
        """Return the predicted seconds of a step, as `predict_step` would."""
        return sum(self.pricer.step_seconds(self._total(assignment)).values())

    def tangent(self, assignment: Mapping[str, Format]) -> Tangent:
        """Return what little more of device and host adds to the step of an assignment."""
        total = self._total(assignment)
        each = self.pricer.launch_seconds
        found = {}
        for phase, whole in self.pricer.step_seconds(total).items():
            if whole > 0:
                busy, host = total.device[phase] / whole, each * total.launches[phase] / whole
                found[phase] = busy ** (OVERLAP - 1), each * host ** (OVERLAP - 1)
        return found

    def unit_seconds(self, name: str, choice: Format, tangent: Tangent) -> float:
        """Return what a unit in a format adds to the step, by a tangent."""
        return _along(self.units[name][choice], tangent)

    def rest_seconds(self, tangent: Tangent) -> float:
        """Return what no format changes, by a tangent."""
        return _along(self.rest, tangent)

    def _total(self, assignment: Mapping[str, Format]) -> Priced:
        total = Priced()
        total.add(self.rest)
        for name, prices in self.units.items():
            total.add(prices[assignment[name]])
        return total


def step_prices(
    profile: ModelProfile,
    device: DeviceProfile,
    setup: Setup,
    facts: ModelFacts | None = None,
    *,
    tf32: bool = False,
    compiled: bool = False,
    recipe: Fp8Recipe | None = None,
) -> StepPrices:
    """Return the prices of all units in every format that the unit takes and the device's card multiplies in.

    Args:
        tf32: units in FP32 run in TF32.
        compiled: kernels between matmuls are fused.
        recipe: of FP8 units; None: tensorwise.

    Raises:
        DeviceError: nothing can be predicted for the device.
    """
    pricer = Pricer(card_of(device, coefficients()), compiled=compiled)
    units: dict[str, dict[Format, Priced]] = {unit.name: {} for unit in profile.units}
    rest = Priced()
    for choice in Format:
        # a lookup needs no rate
        takes = {
            u.name
            for u in profile.units
            if choice in u.formats and (choice in pricer.card.rates or u.role is Role.EMBEDDING)
        }
        formats = {u.name: choice if u.name in takes else device.ambient for u in profile.units}
        plan = Plan.assign(
            profile,
            formats,
            ambient=device.ambient,
            device=device,
            mode=setup.mode,
            tf32=tf32,
            fp8_recipe=recipe or Fp8Recipe.TENSORWISE,
        )
        work = Work(shape=Shape(profile, plan, setup, facts), recipe=recipe or Fp8Recipe.TENSORWISE)
        for name, priced in priced_units(work, pricer):
            if name in takes:
                units[name][choice] = priced
        if choice is device.ambient:
            rest = pricer.price(rest_kernels(work))
    return StepPrices(pricer=pricer, units=units, rest=rest)


def _along(priced: Priced, tangent: Tangent) -> float:
    return sum(
        priced.device.get(phase, 0.0) * busy + priced.launches.get(phase, 0.0) * launch
        for phase, (busy, launch) in tangent.items()
    )
