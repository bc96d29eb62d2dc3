"""`autoprec probe`: what this device computes in, and the units of a model."""

from __future__ import annotations

from typing import Any

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

__all__ = ["command"]


@click.command("probe")
@click.argument("model", required=False)
@workload_options
@device_option
@json_option
def command(model: str | None, device: str, trust_remote_code: bool, as_json: bool, **workload: Any) -> None:
    """Measure what this device does, and list a model's units.

    MODEL is a Hugging Face id or local folder, 'demo', or file.py:function
    returning a Workload or nn.Module; its weights are not read, unless an
    option says what to run it on: then the data are checked against it too.
    """
    from autoprec.files import as_json as plain_data
    from autoprec.probe.device import probe_device
    from autoprec.report.progress import News
    from autoprec.report.terminal import print_device, print_units

    with quiet(), News(errors_console()) as news:
        news.doing("Probing the device")
        profile = probe_device(device)
        units = None
        if model is not None:
            news.doing(f"Reading {model}")
            module, notes = _module(model, device, trust_remote_code, workload)
            for note in notes:
                news.say(note)
            from autoprec.probe.units import probe_units

            units = probe_units(module, model_id=model)
    if as_json:
        model_data = None if units is None else plain_data(units)
        print_json({"schema": "autoprec/probe@1", "device": plain_data(profile), "model": model_data})
        return
    console = result_console()
    print_device(console, profile)
    if units is not None:
        console.print()
        print_units(console, units)


def _module(model: str, device: str, trust_remote_code: bool, options: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Return the model without weights; or, where data or batches were named, as it will be run."""
    if any(value not in (None, "auto") for value in options.values()):
        from autoprec.cli.running import build_workload

        built = build_workload(model, device=device, mode="infer", trust_remote_code=trust_remote_code, **options)
        return built.model, built.notes
    from autoprec.probe.loading import load_skeleton

    return load_skeleton(model, trust_remote_code=trust_remote_code), ()
