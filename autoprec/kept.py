"""Measured device profiles, kept in the user's data folder: what was measured on a device beats its datasheet.

One file a device, torch and driver: rates change with all three. A figure that cannot be is an error, never used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from autoprec.errors import AutoprecError, DeviceError
from autoprec.files import as_json, from_json, read_limited, write_json
from autoprec.formats import Format
from autoprec.records import DeviceProfile, Origin, Support

__all__ = ["BOOST", "check_figures", "keep_profile", "kept_names", "kept_profile", "profile_folder"]

#: how far a measured rate may stand above the vendor's peak, which is counted at the nominal boost clock: published
#: matmuls reach 1.15 times it (zzc0721/torch-performance-test-data, RTX 3080 Ti: 78.3 of 68.2 TFLOP/s in bf16)
BOOST = 1.15
_AGAIN = "Measure again where the device is (`autoprec probe`), or delete the file."
_SCHEMA = "autoprec/device@1"


def profile_folder() -> Path:
    """Return the folder of measured profiles: $XDG_DATA_HOME/autoprec/devices, else below ~/.local/share."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "autoprec" / "devices"


def keep_profile(profile: DeviceProfile) -> Path:
    """Write a measured profile where `find_device` looks for it, and return its file.

    Raises:
        DeviceError: the profile was not measured, or has a missing or impossible figure.
        AutoprecError: the folder cannot be written.
    """
    if profile.origin is not Origin.MEASURED:
        raise DeviceError(f"the profile of {profile.name} is from a {profile.origin}; only measured ones are kept")
    check_figures(profile, f"the profile of {profile.name}", "Measure again.")
    path = profile_folder() / f"{profile.name}_{_key(profile)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise AutoprecError(f"cannot make the folder {path.parent}: {fault.strerror}") from None
    write_json(path, {"schema": _SCHEMA, "profile": as_json(profile)})
    return path


def kept_names() -> tuple[str, ...]:
    """Return the names of all devices with a measured profile, sorted."""
    return tuple(sorted({path.name.partition("_")[0] for path in _files("*")}))


def kept_profile(name: str, known: DeviceProfile | None = None) -> DeviceProfile | None:
    """Return the measured profile of a device, or None: that of the torch installed here, else the newest.

    Args:
        name: the device's whole name.
        known: its profile from the catalogue, which gives peaks, bandwidth and their sources.

    Raises:
        DeviceError: the file is damaged, or a figure is missing or impossible; the message names both.
    """
    files = list(_files(name))
    if not files:
        return None
    here = f"_torch-{_plain(_installed_torch())}"
    path = max(files, key=lambda p: (here in p.name, p.stat().st_mtime))
    what = f"measured profile {path}"
    profile = _read(path, what)
    if profile.name != name or profile.origin is not Origin.MEASURED:
        raise DeviceError(f"{what} holds a {profile.origin} profile of '{profile.name}'. {_AGAIN}")
    if known is not None:
        profile = dataclasses.replace(
            profile,
            peak_tflops=known.peak_tflops,
            bandwidth_gb_per_s=known.bandwidth_gb_per_s,
            hardware=known.hardware,
            sources=known.sources,
            notes=known.notes,
        )
    check_figures(profile, what, _AGAIN)
    return dataclasses.replace(profile, notes=(*profile.notes, _origin_note(path, profile)))


def check_figures(profile: DeviceProfile, what: str, remedy: str) -> None:
    """Check the figures of a measured profile: all there, finite, above zero, and no rate above what can be.

    Raises:
        DeviceError: naming `what`, the figure and the `remedy`.
    """
    for place, value, most in _figures(profile):
        if value is None:
            raise DeviceError(f"{what} lacks a figure: {place}. {remedy}")
        if not math.isfinite(value) or value <= 0:
            raise DeviceError(f"{what} has an impossible figure: {place} is {value:g}. {remedy}")
        if most is not None and value > BOOST * most:
            raise DeviceError(
                f"{what} has an impossible figure: {place} is {value:g}, and the vendor's peak is {most:g} (clocks "
                f"above the nominal explain {BOOST - 1:.0%} at most). {remedy}"
            )


def _figures(profile: DeviceProfile) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield (name, value, vendor's peak) of each figure a measured profile must have."""
    seen = {rate.format for rate in profile.gemm_rates}
    for choice in Format:
        if profile.supports(choice) is Support.NATIVE and choice not in seen:
            yield f"a matmul rate in {choice}, which it computes in natively", None, None
    for rate in profile.gemm_rates:
        place = f"the matmul rate in {rate.format} at {rate.size} (TFLOP/s)"
        for value in (rate.tflops_low, rate.tflops, rate.tflops_high):
            yield place, value, None
        yield place, rate.tflops, profile.peak_tflops.get(rate.format)
    copy = profile.copy_gb_per_s
    yield "the copy bandwidth (GB/s)", copy.value if copy else None, profile.bandwidth_gb_per_s


def _read(path: Path, what: str) -> DeviceProfile:
    """Read a kept file strictly."""
    try:
        document = json.loads(read_limited(path))
    except (OSError, ValueError, RecursionError) as fault:
        raise DeviceError(f"{what} is damaged or cannot be read: {fault}. {_AGAIN}") from None
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise DeviceError(f"{what} is not of schema {_SCHEMA}. {_AGAIN}")
    try:
        return from_json(DeviceProfile, document.get("profile"), what=what, error=DeviceError)
    except DeviceError as fault:
        raise DeviceError(f"{fault}. {_AGAIN}") from None


def _files(name: str) -> Iterator[Path]:
    folder = profile_folder()
    return (path for path in folder.glob(f"{name}_*.json") if not path.name.startswith("."))


def _key(profile: DeviceProfile) -> str:
    """Return what a profile is kept by beside the device's name: the versions of torch and of the driver."""
    driver = profile.versions.get("driver")
    torch = f"torch-{_plain(profile.versions.get('torch', 'unknown'))}"
    return torch + (f"_driver-{_plain(driver)}" if driver else "")


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def _installed_torch() -> str:
    """Return the version of the torch installed here, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"


def _origin_note(path: Path, profile: DeviceProfile) -> str:
    day = date.fromtimestamp(path.stat().st_mtime).isoformat()
    made = ", ".join(f"{name} {profile.versions[name]}" for name in ("torch", "driver") if name in profile.versions)
    other = profile.versions.get("torch") != _installed_torch()
    again = f"; the torch here is {_installed_torch()}, so its rates may differ" if other else ""
    return f"measured on {day} with {made or 'versions unknown'}{again}; kept in {path}"
