"""The CPU's instruction sets, as far as they decide which number formats it multiplies at speed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autoprec.formats import Format

__all__ = ["INSTRUCTIONS", "UNITS", "cpu_instructions", "cpuinfo"]

#: flags of /proc/cpuinfo that matter for matmuls, narrowest first
INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
    "i8mm",
)
#: instructions of x86 that multiply in a format: having one of them, a CPU has units for it
UNITS: Mapping[str, set[str]] = {Format.BF16: {"avx512_bf16", "amx_bf16"}, Format.FP16: {"avx512_fp16", "amx_fp16"}}


def cpu_instructions() -> tuple[str, ...]:
    """Return which of `INSTRUCTIONS` the CPU has; empty where there is no /proc/cpuinfo."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(name for name in INSTRUCTIONS if name in flags)


def cpuinfo() -> str:
    """Return the text of /proc/cpuinfo; empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
