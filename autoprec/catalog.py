"""The catalogue: devices and search spaces that ship with the package as TOML files, one small file a thing.

In an installed wheel the files are the packages `autoprec.profiles` and `autoprec.search_spaces`; in a checkout
they stand beside the package. A file is checked strictly: an unknown, missing or ill-typed field is an error.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

from autoprec.errors import AutoprecError, DeviceError, closest
from autoprec.files import from_json, read_limited
from autoprec.formats import Format, Fp8Family, Fp8Recipe
from autoprec.kept import BOOST, kept_names, kept_profile
from autoprec.records import DeviceProfile, FormatSupport, Hardware, Origin, Support

__all__ = [
    "CatalogueEntry",
    "catalogue_match",
    "data_files",
    "device_names",
    "find_device",
    "find_entry",
    "read_toml",
    "search_space_file",
    "search_space_names",
]

#: written by hand, one thing a file
_LARGEST_TOML = 1 << 20
_PEAKS = ("fp32", "tf32", "bf16", "fp16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A device of the catalogue: its profile, and what finds and corrects it."""

    profile: DeviceProfile
    aliases: tuple[str, ...]
    #: regular expressions for the name torch gives the device
    torch_names: tuple[str, ...]
    vendor: str
    #: share of the peak that the best measured matmul reaches, by format
    achieved_fraction: Mapping[str, float]
    #: every figure was checked against a published table
    verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fp8:
    """The FP8 table of a device file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    family: Fp8Family
    recipes: tuple[Fp8Recipe, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeviceFile:
    """A device file as it is written."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: str
    kind: str
    vendor: str
    architecture: str
    verified: bool
    formats: Mapping[str, FormatSupport]
    aliases: tuple[str, ...] = ()
    torch_names: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    instructions: tuple[str, ...] = ()
    memory_gb: float | None = None
    bandwidth_gb_per_s: float | None = None
    multiprocessors: int | None = None
    power_watts: float | None = None
    fp32_matrix_tflops: float | None = None
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    achieved_fraction: Mapping[str, float] = field(default_factory=dict)
    fp8: _Fp8 | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def device_names() -> tuple[str, ...]:
    """Return the names of all devices of the catalogue, sorted."""
    return tuple(sorted(_entries()))


def find_device(name: str) -> DeviceProfile:
    """Return the profile of a device by name, alias or unique prefix; case does not matter.

    A profile measured by `autoprec probe` (`kept`) beats the datasheet; a device without a file here is found by its.

    Raises:
        DeviceError: no device is called so (with the closest names), several begin so (with all of them), or the
            measured profile has a missing or impossible figure.
    """
    kept = kept_names()
    found = _resolve(name, {**{device: device for device in kept}, **_spellings()})
    entry = _entries().get(found)
    known = entry.profile if entry else None
    profile = (kept_profile(found, known) if found in kept else None) or known
    assert profile is not None  # a name is from the catalogue or from what is kept
    return profile


def find_entry(name: str) -> CatalogueEntry:
    """Return the whole catalogue entry of a device, as its file is; names and errors as in `find_device`."""
    return _entries()[_resolve(name, _spellings())]


def _resolve(name: str, known: Mapping[str, str]) -> str:
    """Return the device that a spelling means: a whole one beats the beginning of one."""
    wanted = name.strip().lower()
    if wanted in known:
        return known[wanted]
    begun = sorted({device for spelling, device in known.items() if wanted and spelling.startswith(wanted)})
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise DeviceError(f"'{name}' could be any of {', '.join(begun)}; write more of the name")
    raise DeviceError(
        f"there is no device '{name}' here or in the catalogue{closest(wanted, known)}. "
        f"Choose auto, cpu, cuda, mps, xpu, or a name: {', '.join(sorted(set(known.values())))}."
    )


def catalogue_match(torch_name: str) -> CatalogueEntry | None:
    """Return the entry of the device that torch calls `torch_name`, or None where the catalogue has none."""
    for entry in _entries().values():
        if any(re.search(pattern, torch_name) for pattern in entry.torch_names):
            return entry
    return None


def search_space_names() -> tuple[str, ...]:
    """Return the names of the search spaces that ship with the package, sorted."""
    return tuple(sorted(data_files("search_spaces")))


def search_space_file(name: str | Path) -> dict[str, Any]:
    """Return the TOML table of a shipped search space by name, or of a `.toml` file by its path.

    Raises:
        AutoprecError: no such name or file, or the file is no TOML, with the line.
    """
    shipped = data_files("search_spaces")
    text = str(name)
    if text.lower() in shipped:
        return read_toml(shipped[text.lower()], f"search space {text.lower()}")
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        raise AutoprecError(
            f"there is no search space '{text}'{closest(text.lower(), shipped)}. "
            f"Choose one of {', '.join(sorted(shipped))}, or give the path of a .toml file."
        )
    return read_toml(path, f"search space {path}")


@cache
def _entries() -> Mapping[str, CatalogueEntry]:
    """Read every device file, once."""
    entries: dict[str, CatalogueEntry] = {}
    for stem, file in sorted(data_files("profiles", "devices").items()):
        entry = _device_entry(read_toml(file, f"device file {file}"), f"device file {file}")
        if entry.profile.name != stem:
            raise AutoprecError(f"device file {file}: name is '{entry.profile.name}', but the file is called '{stem}'")
        entries[stem] = entry
    if not entries:
        raise AutoprecError(f"no device files in {_data_folder('profiles')}/devices; install autoprec again")
    return entries


@cache
def _spellings() -> Mapping[str, str]:
    """Return every name and alias with the device it means."""
    known = {name: name for name in _entries()}
    for name, entry in _entries().items():
        for alias in entry.aliases:
            if known.setdefault(alias, name) != name:
                raise AutoprecError(f"device file {name}: alias '{alias}' already means {known[alias]}")
    return known


def _device_entry(data: dict[str, Any], what: str) -> CatalogueEntry:
    """Build an entry from a device file's table, checking what types cannot."""
    file = from_json(_DeviceFile, data, what=what)
    for place, given in (("peak_tflops", file.peak_tflops), ("achieved_fraction", file.achieved_fraction)):
        for key, value in given.items():
            if key not in _PEAKS or value <= 0:
                raise AutoprecError(f"{what} is not valid at {place}.{key}: use one of {', '.join(_PEAKS)}, above zero")
    for key, share in file.achieved_fraction.items():
        if key not in file.peak_tflops or share > BOOST:
            raise AutoprecError(
                f"{what} is not valid at achieved_fraction.{key}: give the peak too; clocks above the nominal explain "
                f"{BOOST} of it at most (got {share:g})"
            )
    wanted = {*Format, "tf32"}
    if wrong := sorted(wanted ^ set(file.formats)):
        raise AutoprecError(
            f"{what} is not valid at formats.{wrong[0]}: the table has exactly {', '.join(sorted(wanted))}"
        )
    fp8 = file.formats[Format.FP8].support is Support.NATIVE
    if fp8 != (file.fp8 is not None):
        raise AutoprecError(f"{what} is not valid at fp8: a table [fp8] goes with native fp8 and with nothing else")
    profile = DeviceProfile(
        name=file.name,
        kind=file.kind,
        origin=Origin.DATASHEET,
        formats={f: file.formats[f] for f in Format},
        tf32=file.formats["tf32"],
        fp8_family=file.fp8.family if file.fp8 else None,
        fp8_recipes=file.fp8.recipes if file.fp8 else (),
        architecture=file.architecture,
        compute_capability=file.compute_capability,
        memory_bytes=round(file.memory_gb * 1e9) if file.memory_gb else None,
        instructions=file.instructions,
        peak_tflops=file.peak_tflops,
        bandwidth_gb_per_s=file.bandwidth_gb_per_s,
        hardware=Hardware(
            vendor=file.vendor,
            multiprocessors=file.multiprocessors,
            power_watts=file.power_watts,
            fp32_matrix_tflops=file.fp32_matrix_tflops,
            achieved_fraction=file.achieved_fraction,
        ),
        sources=file.sources,
        notes=(*file.notes, *_reached(file.achieved_fraction)),
    )
    return CatalogueEntry(
        profile=profile,
        aliases=file.aliases,
        torch_names=file.torch_names,
        vendor=file.vendor,
        achieved_fraction=file.achieved_fraction,
        verified=file.verified,
    )


def _reached(shares: Mapping[str, float]) -> tuple[str, ...]:
    """Return what the best measured matmuls reach, as a note; nothing where none is known."""
    said = ", ".join(f"{share:.0%} in {key}" for key, share in shares.items())
    return (f"of the peak, the best measured matmul reaches {said}",) if said else ()


def _data_folder(package: str) -> Traversable:
    """Return the folder of shipped data: inside the installed package, else beside it in a checkout."""
    root = resources.files("autoprec")
    inside = root.joinpath(package)
    if inside.is_dir():
        return inside
    return Path(str(root)).parent / package


def data_files(package: str, *below: str, ending: str = ".toml") -> dict[str, Traversable]:
    """Return the files of a folder of shipped data that have an ending, by their names without it."""
    folder = _data_folder(package)
    for part in below:
        folder = folder.joinpath(part)
    if not folder.is_dir():
        raise AutoprecError(f"the data folder {folder} is missing; install autoprec again")
    return {f.name.removesuffix(ending): f for f in folder.iterdir() if f.name.endswith(ending)}


def read_toml(file: Traversable | Path, what: str) -> dict[str, Any]:
    """Read a TOML file whole.

    Raises:
        AutoprecError: it is missing, unreadable, or no TOML.
    """
    try:
        text = read_limited(file, _LARGEST_TOML)
    except FileNotFoundError:
        raise AutoprecError(f"{what} does not exist") from None
    except (OSError, ValueError) as fault:
        raise AutoprecError(f"{what} cannot be read: {fault}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # a number of too many digits is a ValueError
        raise AutoprecError(f"{what} is no valid TOML: {fault}") from None
