"""A device that is not here: which one is meant, and the predictions of a workload's steps on it."""

from __future__ import annotations

import dataclasses

import torch

from autoprec.errors import DeviceError
from autoprec.formats import Format
from autoprec.plan import Plan, PlanDevice
from autoprec.predict.card import TF32, card_of
from autoprec.predict.coefficients import coefficients
from autoprec.predict.forecast import Forecast
from autoprec.probe.described import module_facts
from autoprec.probe.device import device_name
from autoprec.probe.known import named_profile
from autoprec.probe.steps import device_of
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import DeviceProfile, FormatSupport, ModelProfile, Support

__all__ = ["absent_device", "away", "forecast_of", "predictable"]


def away(workload: Workload, plan: Plan, device: str) -> tuple[Plan, Forecast | None]:
    """Return a plan as one for a named device that is not here, and the predictions there; both as they are otherwise.

    Raises:
        DeviceError: no device is called so, or nothing can be predicted for it.
    """
    known = absent_device(device_of(workload.model), device)
    if known is None:
        return plan, None
    plan = dataclasses.replace(plan, device=PlanDevice(name=known.name, kind=known.kind, origin=known.origin))
    return plan, forecast_of(workload, probe_units(workload.model, model_id=workload.model_id), known)


def absent_device(here: torch.device, device: str) -> DeviceProfile | None:
    """Return the profile of a named device that is not `here`, the workload's; None where that is the one meant.

    Raises:
        DeviceError: one of torch's own devices that the workload is not on, or no device is called so.
    """
    wanted, _, index = device.partition(":")
    if device == "auto" or (wanted == here.type and index in ("", str(here.index or 0))):
        return None
    known = named_profile(device)
    if known is not None:
        return None if known.name == device_name(here) else known
    raise DeviceError(
        f"a search measures where the model is, and this one is on {here}, not on '{device}'. Load it there, or name a "
        "GPU of the catalogue, such as h100-sxm, to have it emulated and predicted."
    )


def predictable(device: DeviceProfile) -> DeviceProfile:
    """Return a device without the formats in which no time can be predicted for it, since no peak is known.

    FP32 stays: without it there is no reference, as `forecast_of` says.

    Raises:
        DeviceError: nothing can be predicted for the device.
    """
    rates = card_of(device, coefficients()).rates

    def kept(key: str, known: FormatSupport) -> FormatSupport:
        if known.support is not Support.NATIVE or key in (*rates, str(Format.FP32)):
            return known
        return FormatSupport(support=Support.ABSENT, reason=f"no peak in {key} is known of it to predict a time from")

    formats = {choice: kept(str(choice), known) for choice, known in device.formats.items()}
    return dataclasses.replace(device, formats=formats, tf32=kept(TF32, device.tf32))


def forecast_of(workload: Workload, profile: ModelProfile, device: DeviceProfile) -> Forecast:
    """Return the predictions of a workload's steps; asked once, so that what cannot be predicted is said at once.

    Raises:
        DeviceError: nothing can be predicted for the device.
    """
    rows, length = workload.batch_shape
    forecast = Forecast(
        device=device,
        profile=profile,
        facts=module_facts(workload.model),
        mode=workload.mode,
        batch_size=rows,
        seq_len=length,
    )
    forecast.reference  # noqa: B018
    return forecast
