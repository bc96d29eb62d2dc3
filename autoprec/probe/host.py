"""What the operating system says of this machine: the CPU's name, memory, drivers, and what could be here."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from autoprec.runtime.cpu import cpuinfo

__all__ = ["cpu_memory_bytes", "cpu_name", "driver_version", "may_have", "slug"]

#: what a driver puts under /dev: NVIDIA's (also on Jetson), AMD's, the GPU of Windows seen from Linux, Intel's
_NODES = {"cuda": ("nvidiactl", "nvidia0", "nvmap", "kfd", "dxg"), "xpu": ("dri", "dxg")}
_DRIVERS = ("nvidia", "amdgpu", "xe", "i915")


def slug(text: str) -> str:
    """Return a lower-case name of letters, digits and dashes, such as 'amd-epyc-9654'."""
    plain = re.sub(r"\((?:r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def cpu_name() -> str:
    """Return the CPU's model name as a slug."""
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    return slug(match[1] if match else platform.processor() or platform.machine() or "cpu")


def cpu_memory_bytes() -> int | None:
    """Return the memory this process may use: that of the machine, or of its control group where that is less."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not POSIX
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(machine, int(limit))
    return machine


def may_have(kind: str) -> bool:
    """Say whether a device of a torch kind could be here; False is certain, and takes neither torch nor a driver."""
    if kind == "mps" or sys.platform == "darwin":
        return kind == "cpu" or (kind == "mps" and sys.platform == "darwin")
    if kind not in _NODES or not sys.platform.startswith("linux"):
        return True
    return any((Path("/dev") / node).exists() for node in _NODES[kind])


def driver_version() -> str | None:
    """Return the version of the GPU's kernel driver, where the system tells it."""
    for name in _DRIVERS:
        try:
            return Path(f"/sys/module/{name}/version").read_text().strip()
        except OSError:
            continue
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else None
