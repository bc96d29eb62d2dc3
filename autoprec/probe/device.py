"""What a device can compute in, and how fast: by trying it where it is here, else from the catalogue.

A format is *native* where a matmul in it runs and beats FP32 by more than the noise, *emulated* where it runs without
beating it, *absent* where it does not run. Asking the driver is not enough: `torch.cuda.is_bf16_supported()` says True
on cards that only widen to FP32 (pytorch/pytorch#148322), and most CPUs run FP16 many times slower than FP32.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping

import torch

from autoprec.catalog import CatalogueEntry, catalogue_match
from autoprec.errors import DeviceError
from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.probe.host import cpu_memory_bytes, cpu_name, slug
from autoprec.probe.known import KINDS, named_profile
from autoprec.probe.rates import Trial, copy_rate, fault_text, gemm_trials, launch_time, matmuls, strict_fp32
from autoprec.probe.versions import device_versions
from autoprec.records import DeviceProfile, FormatSupport, GemmRate, Origin, Support
from autoprec.runtime.cpu import UNITS, cpu_instructions

__all__ = ["device_name", "probe_device", "resolve_device"]

_SIZES = {"cpu": (256, 512, 1024), "cuda": (1024, 4096, 8192), "xpu": (1024, 2048, 4096), "mps": (512, 1024, 2048)}


def probe_device(device: str = "auto", *, seconds: float = 8.0) -> DeviceProfile:
    """Return what a device can compute in, and how fast.

    A device that is here (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, or the catalogued name of the GPU that is
    here) is measured for about `seconds`; any other name gives what is known of it (`find_device`): origin `measured`
    where a profile of it is kept, else `datasheet`. Rates are those of square matmuls alone. The process's random
    state, switches and threads stay as they are.

    Raises:
        DeviceError: the device is not here, or no device is called so.
    """
    here, known = resolve_device(device)
    if here is None:
        assert known is not None
        return known
    with torch.no_grad(), strict_fp32():
        return _measured(here, seconds)


def resolve_device(device: str = "auto") -> tuple[torch.device | None, DeviceProfile | None]:
    """Return (the torch device that is meant, if it is here; its catalogue profile, if it has one).

    Raises:
        DeviceError: the device is not here, or no device is called so.
    """
    wanted = device.strip().lower()
    if wanted == "auto":
        kind = next((k for k in ("cuda", "xpu", "mps") if _count(k)), "cpu")
        wanted = kind
    kind, _, index = wanted.partition(":")
    if kind in KINDS:
        here = _present(kind, index, device)
        entry = catalogue_match(_torch_name(here)) if kind != "cpu" else None
        return here, entry.profile if entry else None
    known = named_profile(wanted)
    assert known is not None  # none of torch's own is left
    return _named_here(known), known


def _named_here(known: DeviceProfile) -> torch.device | None:
    """Return the device here that is called as a known one, if there is one."""
    kind = known.kind
    here = (torch.device(kind) if kind == "cpu" else torch.device(kind, index) for index in range(_count(kind)))
    return next((device for device in here if device_name(device) == known.name), None)


def _count(kind: str) -> int:
    """Return how many devices of a kind are here."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def _present(kind: str, index: str, asked: str) -> torch.device:
    """Return the torch device, or say why it cannot be had."""
    count = _count(kind)
    if not count:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        build = f"ROCm {torch.version.hip}" if torch.version.hip else build
        raise DeviceError(
            f"there is no device '{asked}' here: torch {torch.__version__} (built with {build}) sees no {kind} device. "
            "Use --device cpu, install a torch built for your device, or name a catalogued device such as "
            "h100-sxm-80gb to have it emulated and predicted."
        )
    if index and (not index.isdigit() or int(index) >= count):
        raise DeviceError(f"there is no device '{asked}' here: {kind} has {count}, counted from 0. Try {kind}:0.")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(index or 0))


def _torch_name(device: torch.device) -> str:
    """Return what torch calls the device."""
    if device.type in ("cuda", "xpu"):
        return str(getattr(torch, device.type).get_device_name(device))
    return "Apple MPS" if device.type == "mps" else cpu_name()


def device_name(here: torch.device) -> str:
    """Return the name of a device that is here: the catalogue's, else a slug of what torch or the system calls it."""
    entry = catalogue_match(_torch_name(here)) if here.type != "cpu" else None
    return entry.profile.name if entry else slug(_torch_name(here))


def _measured(here: torch.device, seconds: float) -> DeviceProfile:
    """Measure a device that is here; what only a datasheet knows comes from its catalogue entry."""
    capability = torch.cuda.get_device_capability(here) if here.type == "cuda" and not torch.version.hip else None
    entry = catalogue_match(_torch_name(here)) if here.type != "cpu" else None
    family = _fp8_family(here, entry)
    failed, trials = gemm_trials(matmuls(here, family), _SIZES[here.type], here, 0.8 * seconds)
    last = {t.way: t for t in trials}  # the largest size timed of each way
    recipes = tuple(r for r in Fp8Recipe if f"fp8-{r}" in last)
    formats = {f: _support(f.value, here, failed, last) for f in (Format.FP32, Format.BF16, Format.FP16)}
    formats[Format.FP8] = _fp8_support(here, family, recipes, failed, last)
    has_fp8 = formats[Format.FP8].support is not Support.ABSENT
    profile = DeviceProfile(
        name=device_name(here),
        kind=here.type,
        origin=Origin.MEASURED,
        formats=formats,
        tf32=_support("tf32", here, failed, last) if here.type == "cuda" else _no_tf32(here),
        fp8_family=family if has_fp8 else None,
        fp8_recipes=recipes if has_fp8 else (),
        architecture=_architecture(here, entry),
        compute_capability=capability,
        memory_bytes=_memory_bytes(here),
        instructions=cpu_instructions() if here.type == "cpu" else (),
        threads=torch.get_num_threads() if here.type == "cpu" else None,
        gemm_rates=_rates(trials),
        copy_gb_per_s=copy_rate(here, 0.1 * seconds),
        launch_us=launch_time(here) if here.type != "cpu" else None,
        versions=device_versions(here),
    )
    if entry is None:
        return profile
    known = entry.profile
    return dataclasses.replace(
        profile,
        peak_tflops=known.peak_tflops,
        bandwidth_gb_per_s=known.bandwidth_gb_per_s,
        hardware=known.hardware,
        sources=known.sources,
        notes=known.notes,
    )


def _support(way: str, here: torch.device, failed: Mapping[str, str], last: Mapping[str, Trial]) -> FormatSupport:
    """Judge one way to multiply by what was seen."""
    if way in failed:
        return FormatSupport(Support.ABSENT, f"torch.mm does not run: {failed[way]}")
    if way not in last:
        return FormatSupport(Support.EMULATED, "one matmul took too long to be timed")
    if way == "fp32":
        return FormatSupport(Support.NATIVE, f"the reference: {last[way].tflops[0]:.3g} TFLOP/s measured")
    middle, low, high = last[way].gain
    seen = f"{middle:.3g}x fp32's matmul rate at {last[way].size} (95 % {low:.3g}-{high:.3g}), measured"
    units = _units(way, here)
    # where the hardware's own word is yes, a noisy minute shall not say no
    if units is not False and (low > 1 or (units and middle > 1)):
        return FormatSupport(Support.NATIVE, seen)
    if units is False:
        return FormatSupport(Support.EMULATED, f"{seen}; torch says it has no {way} units")
    return FormatSupport(Support.EMULATED, f"{seen}: it runs, and gains nothing beyond the noise")


def _units(way: str, here: torch.device) -> bool | None:
    """Return whether the hardware says that it has units for a format; None where it says nothing."""
    if here.type == "cpu":
        return True if set(cpu_instructions()) & UNITS.get(way, set()) else None
    if here.type != "cuda" or way not in ("bf16", "tf32"):
        return None
    if way == "bf16":
        with torch.cuda.device(here):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return None if torch.version.hip else torch.cuda.get_device_capability(here) >= (8, 0)


def _fp8_support(
    here: torch.device,
    family: Fp8Family | None,
    recipes: tuple[Fp8Recipe, ...],
    failed: Mapping[str, str],
    last: Mapping[str, Trial],
) -> FormatSupport:
    """Judge FP8: on a CPU torch widens FP8 operands, which autoprec does not count as computing in FP8."""
    if here.type == "cpu":
        return FormatSupport(Support.ABSENT, f"no FP8 matmul unit on this CPU: {_cpu_fp8()}")
    if family is None:
        return FormatSupport(Support.ABSENT, f"torch has no FP8 matmul on {here.type}")
    if not recipes:
        return FormatSupport(Support.ABSENT, f"torch._scaled_mm does not run: {failed[f'fp8-{Fp8Recipe.TENSORWISE}']}")
    best = last[f"fp8-{recipes[0]}"]
    middle, low, high = best.gain
    seen = f"{middle:.3g}x fp32's matmul rate at {best.size} (95 % {low:.3g}-{high:.3g}), casts left out, measured"
    refused = "; ".join(f"{r} refused: {failed[f'fp8-{r}']}" for r in Fp8Recipe if f"fp8-{r}" in failed)
    reason = f"{recipes[0]} {seen}" + (f"; {refused}" if refused else "")
    return FormatSupport(Support.NATIVE if low > 1 else Support.EMULATED, reason)


def _cpu_fp8() -> str:
    """Return what torch's FP8 matmul does on this CPU, by trying it."""
    try:
        matmuls(torch.device("cpu"), Fp8Family.OCP)[f"fp8-{Fp8Recipe.TENSORWISE}"](64)()
    except Exception as fault:  # whatever a backend raises is the answer we look for
        return f"torch._scaled_mm refuses ({fault_text(fault)})"
    return "torch._scaled_mm runs by widening its operands first"


def _fp8_family(here: torch.device, entry: CatalogueEntry | None) -> Fp8Family | None:
    """Return the FP8 layouts to try on a device; None where torch has no FP8 matmul for it."""
    if here.type != "cuda":
        return None
    if torch.version.hip:
        # gfx942 computes in FNUZ, its successors in OCP (ROCm/pytorch#2229)
        return Fp8Family.FNUZ if "gfx94" in (_architecture(here, entry) or "") else Fp8Family.OCP
    return Fp8Family.OCP


def _no_tf32(here: torch.device) -> FormatSupport:
    return FormatSupport(Support.ABSENT, f"TF32 is a format of CUDA devices, and this is {here.type}")


def _architecture(here: torch.device, entry: CatalogueEntry | None) -> str | None:
    if here.type == "cuda" and torch.version.hip:
        return str(torch.cuda.get_device_properties(here).gcnArchName)
    if entry is not None:
        return entry.profile.architecture
    return platform.machine() if here.type == "cpu" else None


def _memory_bytes(here: torch.device) -> int | None:
    if here.type in ("cuda", "xpu"):
        return int(getattr(torch, here.type).get_device_properties(here).total_memory)
    if here.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return cpu_memory_bytes()


def _rates(trials: list[Trial]) -> tuple[GemmRate, ...]:
    """Return the rates by format; of several FP8 recipes, the first that runs."""
    rates: dict[tuple[Format, int], GemmRate] = {}
    for trial in trials:
        name = trial.way.partition("-")[0]
        if name == "tf32":
            continue
        middle, low, high = trial.tflops
        key = (Format(name), trial.size)
        rates.setdefault(key, GemmRate(format=key[0], size=trial.size, tflops=middle, tflops_low=low, tflops_high=high))
    return tuple(rates.values())
