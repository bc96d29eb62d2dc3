"""What is known of a device by its name, without torch: a plan for a device elsewhere needs no torch here."""

from __future__ import annotations

from autoprec.catalog import find_device
from autoprec.probe.host import cpu_name, may_have, slug
from autoprec.records import DeviceProfile

__all__ = ["KINDS", "certainly_absent", "named_profile"]

#: torch's device types that are probed
KINDS = ("cpu", "cuda", "mps", "xpu")


def named_profile(device: str) -> DeviceProfile | None:
    """Return what is known of a device by name; None for `auto` and for one of torch's own, such as `cuda:1`.

    Raises:
        DeviceError: as `find_device`.
    """
    kind = device.strip().lower().partition(":")[0]
    return None if kind in ("auto", *KINDS) else find_device(device)


def certainly_absent(known: DeviceProfile) -> bool:
    """Say whether a known device cannot be the one here; False where only torch can tell."""
    return known.name != slug(cpu_name()) if known.kind == "cpu" else not may_have(known.kind)
