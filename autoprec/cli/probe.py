"""`autoprec probe`: what this device computes in, a model's units, and how sensitive each is to each format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoprec.cli.common import (
    device_option,
    errors_console,
    json_option,
    print_json,
    quiet,
    result_console,
    workload_options,
)
from autoprec.errors import AutoprecError, DataError

if TYPE_CHECKING:
    from autoprec.probe.workload import Workload
    from autoprec.records import DeviceProfile, ModelProfile, SensitivityProfile, SpeedProfile
    from autoprec.report.progress import News

__all__ = ["command"]

#: what timing may take: a quarter of what the probe of times takes by itself
_SPEED_SECONDS = 10.0


@click.command("probe")
@click.argument("model", required=False)
@workload_options
@device_option
@json_option
def command(model: str | None, device: str, trust_remote_code: bool, as_json: bool, **workload: Any) -> None:
    """Measure this device, and each layer's sensitivity and time.

    MODEL is a Hugging Face id or local folder, 'demo', or file.py:function
    returning a Workload or nn.Module. Each of its units is listed with the
    drop that each format would cause there alone, most sensitive first, and
    then with the time it takes in each format, and why one does not pay.
    Results are kept, so that asking again takes seconds; what was measured of
    the device is what recommend takes for its name from then on. With the
    name of a device that is not here, what is known of it is shown and where
    from, and the model's weights are not read: units only.
    """
    from autoprec.files import as_json as plain_data
    from autoprec.probe.device import probe_device
    from autoprec.report.progress import News
    from autoprec.report.terminal import print_device, print_paths, print_sensitivity, print_speed, print_units

    units = found = times = None
    with quiet(), News(errors_console()) as news:
        news.doing("Probing the device")
        profile = probe_device(device)
        here = _is_here(device)
        kept = _keep(profile, news) if here else None
        if model is not None:
            options = {"trust_remote_code": trust_remote_code, **workload}
            units, found, times = _probe_model(model, device, profile, options, news)
    if as_json:
        if kept is not None:
            click.echo(f"Kept the measured profile in {kept}", err=True)
        print_json(
            {
                "schema": "autoprec/probe@1",
                "device": plain_data(profile),
                "model": None if units is None else plain_data(units),
                "sensitivity": None if found is None else plain_data(found),
                "speed": None if times is None else plain_data(times),
            }
        )
        return
    console = result_console()
    print_device(console, profile, here=here)
    if kept is not None:
        print_paths(console, {"kept in": str(kept)})
    if units is not None:
        console.print()
        print_units(console, units)
    if units is not None and found is not None:
        console.print()
        print_sensitivity(console, found, units.units)
    if times is not None:
        console.print()
        print_speed(console, times)
    if found is not None and found.file:
        print_paths(console, {"sensitivity as JSON": found.file})


def _probe_model(
    model: str, device: str, profile: DeviceProfile, options: dict[str, Any], news: News
) -> tuple[ModelProfile, SensitivityProfile | None, SpeedProfile | None]:
    """Return the units, and their sensitivity and times where the model can be run here on the data."""
    from autoprec.probe.units import probe_units
    from autoprec.probe.workload import Workload

    news.doing(f"Reading {model}")
    given = options | {"trust_remote_code": None}
    asked = any(value not in (None, "auto") for value in given.values())
    runnable: Any = None
    if asked or _is_here(device):
        try:
            runnable = _runnable(model, device, options)
        except DataError as error:
            if asked:
                raise
            news.say(f"Units only, without drops: {error}")
    if runnable is None:
        from autoprec.probe.described import described_model

        described, note = described_model(model, trust_remote_code=options["trust_remote_code"])
        if note:
            news.say(note)
        return described, None, None
    if not isinstance(runnable, Workload):  # a module, and nothing to run it on
        return probe_units(runnable, model_id=model), None, None
    for note in runnable.notes:
        news.say(note)
    units = probe_units(runnable.model, model_id=model)
    news.doing(f"Probing the {len(units.units)} units of {model}")
    return units, *_measured(runnable, profile, news, here=_is_here(device))


def _measured(
    workload: Workload, profile: DeviceProfile, news: News, *, here: bool
) -> tuple[SensitivityProfile, SpeedProfile | None]:
    """Probe BF16, FP8, and FP16 where the device has it: drops, and times where the device is here.

    Gradients too, where there is something to train towards.
    """
    from autoprec.formats import Format
    from autoprec.probe.sensitivity import probe_sensitivity
    from autoprec.probe.speed import probe_speed
    from autoprec.records import Mode, Support

    if workload.mode is Mode.TRAIN and not _has_loss(workload):
        news.say("There is nothing to train towards in these batches, so gradients are not probed.")
        workload = workload.with_mode(Mode.INFER)
    half = [Format.FP16] if profile.supports(Format.FP16) is Support.NATIVE else []
    formats = [Format.BF16, *half, Format.FP8]
    found = probe_sensitivity(workload, formats, progress=news)
    if not here:
        return found, None
    news.doing("Timing one unit of each shape")
    return found, probe_speed(workload, formats, seconds=_SPEED_SECONDS, progress=news)


def _keep(profile: DeviceProfile, news: News) -> Path | None:
    """Keep what was measured; where that cannot be done, say why: the result is not lost."""
    from autoprec.kept import keep_profile

    try:
        return keep_profile(profile)
    except AutoprecError as error:
        news.say(f"The measured profile was not kept: {error}")
        return None


def _is_here(device: str) -> bool:
    from autoprec.probe.device import resolve_device

    return resolve_device(device)[0] is not None


def _runnable(model: str, device: str, options: dict[str, Any]) -> Any:
    """Return the workload; of a file.py:function that gives a module without data, the module."""
    from autoprec.cli.running import build_workload
    from autoprec.probe.userfile import is_function, load_function
    from autoprec.probe.workload import Workload

    made = load_function(model)() if is_function(model) else None
    if made is not None and not isinstance(made, Workload):
        return made
    return build_workload(model, device=device, made=made, **options)


def _has_loss(workload: Workload) -> bool:
    import torch

    try:
        with torch.no_grad():
            workload.training_loss(workload.batches[0], workload.forward(workload.batches[0]))
    except DataError:
        return False
    return True
