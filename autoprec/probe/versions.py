"""Which releases figures were taken with: of the libraries that compute, and of a device's own software."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from autoprec import __version__
from autoprec.probe.host import driver_version

__all__ = ["all_versions", "device_versions"]

#: what figures depend on beside the device's own versions
_LIBRARIES = ("torch", "transformers", "optuna", "torchao")


def device_versions(here: torch.device) -> dict[str, str]:
    """Return the releases that a device's rates depend on."""
    found = {"torch": str(torch.__version__), "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["rocm"] = torch.version.hip
    if here.type != "cpu" and (driver := driver_version()):
        found["driver"] = driver
    return found


def all_versions() -> dict[str, str]:
    """Return the releases of this package, of Python, and of the libraries that are installed of those that compute."""
    found = {"autoprec": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
