"""The plans every search measures beside its own: what one would use without it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.quantities import number
from autoprec.records import DeviceProfile, Mode, ModelProfile, Role, Support
from autoprec.study.space import fp8_fault

__all__ = ["RECOMMENDED", "Baseline", "baselines"]

#: name of the recommender's plan among the measured: a trial where it lies in the space, else measured beside it
RECOMMENDED = "recommended"


#: of FP32's rate: so slow a format makes a step three times as long where matmuls are a tenth of it, and of
#: transformers they are more. Its first step alone would take minutes of the budget
_FAR_SLOWER = 1 / 20
#: drop and gradient of one step do not see it: on a spam classifier, AdamW at 2e-5, such a plan's training loss came to
#: 0.12 where FP32's was 0.0003 (benchmarks/results/training-minilm.json)
_LOSES_UPDATES = (
    "measured to compare with, never chosen for training: its bf16 weights have no fp32 copies, so that updates under "
    "1/512 of a weight are lost"
)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A named plan; `plan` is None where the device cannot run it, and `reason` says why, or why it is barred.

    A barred one is measured, because people use it, but is never chosen.
    """

    name: str
    plan: Plan | None
    reason: str | None = None

    @property
    def barred(self) -> bool:
        """Say whether the plan is measured only to compare with."""
        return self.plan is not None and self.reason is not None


def baselines(profile: ModelProfile, device: DeviceProfile, mode: Mode) -> list[Baseline]:
    """Return the uniform plans, the BF16 cast, and FP8 with its edges high, those the device lacks with the reason."""
    options = {"device": device, "mode": mode}
    found = [
        Baseline("uniform fp32", Plan.uniform(profile, Format.FP32, **options)),
        _tf32(profile, device, mode),
        *(_uniform(choice, profile, device, mode) for choice in (Format.BF16, Format.FP16, Format.FP8)),
    ]
    if device.supports(Format.BF16) is not Support.ABSENT:
        cast, slower = Plan.cast(profile, Format.BF16, **options), _far_slower(Format.BF16, device)
        barred = _LOSES_UPDATES if mode is Mode.TRAIN else None
        found.append(Baseline("cast bf16", None if slower else cast, slower or barred))
    if device.supports(Format.FP8) is Support.NATIVE:
        low = Plan.uniform(profile, Format.FP8, **options)
        high = low.replace({name: low.ambient for name in _edges(profile)})
        found.append(_runnable("fp8 with high edges", high, profile))
    return found


def _uniform(choice: Format, profile: ModelProfile, device: DeviceProfile, mode: Mode) -> Baseline:
    name = f"uniform {choice}"
    known = device.formats.get(choice)
    if device.supports(choice) is Support.ABSENT:
        return Baseline(name, None, f"{device.name} cannot run {choice}" + (f": {known.reason}" if known else ""))
    if slower := _far_slower(choice, device):
        return Baseline(name, None, slower)
    return _runnable(name, Plan.uniform(profile, choice, device=device, mode=mode), profile)


def _far_slower(choice: Format, device: DeviceProfile) -> str | None:
    """Return why a format is not worth a step, by matmuls that were measured; None where it may be."""
    rates = {(rate.format, rate.size): rate for rate in device.gemm_rates}
    size = max((s for f, s in rates if f is choice and (Format.FP32, s) in rates), default=None)
    if size is None:
        return None
    own, wide = rates[choice, size], rates[Format.FP32, size]
    most = own.tflops_high / wide.tflops_low
    if most > _FAR_SLOWER:
        return None
    ratio = f"{number(own.tflops / wide.tflops)}x fp32's rate at {size} (at most {number(most)}x), measured"
    return f"not run: {device.name} multiplies in {choice} at {ratio}"


def _runnable(name: str, plan: Plan, profile: ModelProfile) -> Baseline:
    """Return the baseline, without its plan where a leaf's shape has no FP8 kernel."""
    low = (u for u in profile.units if plan.unit(u.name).format is Format.FP8)
    fault = next(filter(None, (fp8_fault(unit, profile) for unit in low)), None)
    return Baseline(name, None if fault else plan, fault)


def _tf32(profile: ModelProfile, device: DeviceProfile, mode: Mode) -> Baseline:
    if device.tf32.support is not Support.NATIVE:
        return Baseline("uniform tf32", None, f"{device.name} cannot run tf32: {device.tf32.reason}")
    return Baseline("uniform tf32", Plan.uniform(profile, Format.FP32, device=device, mode=mode, tf32=True))


def _edges(profile: ModelProfile) -> list[str]:
    """Return the units of the first and last block and the head, which FP8 recipes keep high."""
    blocks = [name for u in profile.units if (name := _block(u.name))]
    ends = {blocks[0], blocks[-1]} if blocks else set()
    heads = (Role.LM_HEAD, Role.OTHER)
    return [u.name for u in profile.units if (_block(u.name) in ends or u.role in heads) and Format.FP8 in u.formats]


def _block(unit: str) -> str:
    """Return the part of a unit's name that names its block, such as `decoder.blocks.3`; '' outside blocks."""
    found = re.match(r"(?:.*\.)?blocks\.\d+(?=\.)", unit)
    return found[0] if found else ""
