"""The plans every search measures beside its own: what one would use without it."""

from __future__ import annotations

from dataclasses import dataclass

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.records import DeviceProfile, Mode, ModelProfile, Role, Support

__all__ = ["Baseline", "baselines", "role_seeds"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A named plan; `plan` is None where the device cannot run it, and `reason` says why."""

    name: str
    plan: Plan | None
    reason: str | None = None


def baselines(profile: ModelProfile, device: DeviceProfile, mode: Mode) -> list[Baseline]:
    """Return the uniform plans, the BF16 cast, and FP8 with its edges high, those the device lacks with the reason."""
    options = {"device": device, "mode": mode}
    found = [
        Baseline("uniform fp32", Plan.uniform(profile, Format.FP32, **options)),
        _tf32(profile, device, mode),
        *(_uniform(choice, profile, device, mode) for choice in (Format.BF16, Format.FP16, Format.FP8)),
    ]
    if device.supports(Format.BF16) is not Support.ABSENT:
        found.append(Baseline("cast bf16", Plan.cast(profile, Format.BF16, **options)))
    if device.supports(Format.FP8) is Support.NATIVE:
        low = Plan.uniform(profile, Format.FP8, **options)
        high = {name: low.ambient for name in _edges(profile)}
        found.append(Baseline("fp8 with high edges", low.replace(high)))
    return found


def _uniform(choice: Format, profile: ModelProfile, device: DeviceProfile, mode: Mode) -> Baseline:
    name = f"uniform {choice}"
    known = device.formats.get(choice)
    if device.supports(choice) is Support.ABSENT:
        return Baseline(name, None, f"{device.name} cannot run {choice}" + (f": {known.reason}" if known else ""))
    return Baseline(name, Plan.uniform(profile, choice, device=device, mode=mode))


def _tf32(profile: ModelProfile, device: DeviceProfile, mode: Mode) -> Baseline:
    if device.tf32.support is not Support.NATIVE:
        return Baseline("uniform tf32", None, f"{device.name} cannot run tf32: {device.tf32.reason}")
    return Baseline("uniform tf32", Plan.uniform(profile, Format.FP32, device=device, mode=mode, tf32=True))


def _edges(profile: ModelProfile) -> list[str]:
    """Return the units of the first and last block and the head, which FP8 recipes keep high."""
    inner = [u for u in profile.units if u.role in (Role.ATTENTION, Role.FFN)]
    heads = [u.name for u in profile.units if u.role in (Role.LM_HEAD, Role.OTHER)]
    return [u.name for u in (*inner[:2], *inner[-2:])] + heads


def role_seeds(profile: ModelProfile, ambient: Format) -> list[dict[str, Format]]:
    """Return assignments that set one role apart: it alone in FP32, and it alone in the ambient format."""
    roles = list(dict.fromkeys(u.role for u in profile.units if u.role is not Role.EMBEDDING))
    plain = {u.name: Format.FP32 if u.role is Role.EMBEDDING else ambient for u in profile.units}
    seeds = []
    for role in roles:
        members = {u.name for u in profile.units if u.role is role}
        seeds.append({n: Format.FP32 if n in members else f for n, f in plain.items()})
        seeds.append({n: f if n in members else Format.FP32 for n, f in plain.items()})
    return seeds
