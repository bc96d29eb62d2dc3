"""Pages of what was probed: a device, and a model as units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from autoprec.formats import Format
from autoprec.records import DeviceProfile, GemmRate, ModelProfile, Origin, Unit
from autoprec.report.figures import bytes_text, count_text, interval, layout_text, number, origin_note
from autoprec.report.grouping import Run, few, runs, short_modules, span
from autoprec.report.layout import Column, print_heading, print_line, print_table

__all__ = ["print_device", "print_units"]


def print_device(console: Console, profile: DeviceProfile, *, here: bool = True) -> None:
    """Print what a device computes in: layout, support with its reason, measured rates, bandwidth, instructions."""
    print_heading(console, f"Device {profile.name}", _device_facts(profile, here))
    sizes = sorted({r.size for r in profile.gemm_rates})
    rates = {(r.format, r.size): r for r in profile.gemm_rates}
    columns: list[Column] = [("format", "left"), ("bits", "left"), ("support", "left")]
    columns += [(f"TFLOP/s at {size}", "right") for size in sizes]
    columns += [(f"x fp32 at {sizes[-1]}", "right")] if sizes else []
    columns += [(f"peak TFLOP/s ({Origin.DATASHEET})", "right")] if profile.peak_tflops else []
    rows = []
    for choice in Format:
        row = [choice.value, layout_text(choice, profile.fp8_family), profile.supports(choice).value]
        row += [_rate(rates.get((choice, size))) for size in sizes]
        row += [_against_fp32(rates, choice, sizes)] if sizes else []
        if profile.peak_tflops:
            row.append(number(profile.peak_tflops[choice]) if choice in profile.peak_tflops else "-")
        rows.append(row)
    print_table(console, columns, rows)
    why = [(str(choice), known.support.value, known.reason) for choice, known in profile.formats.items()]
    why.append(("tf32", profile.tf32.support.value, profile.tf32.reason))
    print_table(console, [("", "left")] * 3, why)
    for line in _device_lines(profile):
        print_line(console, line)


def _device_facts(profile: DeviceProfile, here: bool) -> str:
    source = f"measured{' here' if here else ' before, not here'}"
    if profile.origin is not Origin.MEASURED:
        source = f"not here: {profile.origin}"
    facts = [profile.kind, source, profile.architecture or ""]
    if profile.compute_capability:
        facts.append("capability {}.{}".format(*profile.compute_capability))
    facts.append(f"{profile.threads} threads" if profile.threads else "")
    facts.append(f"{bytes_text(profile.memory_bytes)} memory" if profile.memory_bytes else "")
    return ", ".join(f for f in facts if f)


def _rate(rate: GemmRate | None) -> str:
    return interval(rate.tflops, (rate.tflops_low, rate.tflops_high)) if rate else "-"


def _against_fp32(rates: Mapping[tuple[Format, int], GemmRate], choice: Format, sizes: Sequence[int]) -> str:
    """Return the rate as a multiple of FP32's at the largest size both were measured at."""
    for size in reversed(sizes):
        mine, base = rates.get((choice, size)), rates.get((Format.FP32, size))
        if mine and base and base.tflops > 0:
            return f"{number(mine.tflops / base.tflops)}x{'' if size == sizes[-1] else f' at {size}'}"
    return "-"


def _device_lines(profile: DeviceProfile) -> list[str]:
    lines = []
    if profile.copy_gb_per_s:
        copy = profile.copy_gb_per_s
        figure = interval(copy.value, (copy.low, copy.high))
        lines.append(f"copy bandwidth: {figure} GB/s{origin_note(copy.origin)}")
    if (launch := profile.launch_us) is not None:
        figure = interval(launch.value, (launch.low, launch.high))
        lines.append(f"a launch by its host: {figure} µs{origin_note(launch.origin)}")
    if profile.bandwidth_gb_per_s:
        lines.append(f"memory bandwidth: {number(profile.bandwidth_gb_per_s)} GB/s ({Origin.DATASHEET})")
    if (hardware := profile.hardware) is not None:
        counts = [f"{hardware.multiprocessors} multiprocessors"] if hardware.multiprocessors else []
        counts += [f"{number(hardware.power_watts)} W"] if hardware.power_watts else []
        matrix = hardware.fp32_matrix_tflops
        counts += [f"{number(matrix)} TFLOP/s in fp32 on matrix units"] if matrix else []
        lines += [f"hardware: {', '.join(counts)} ({Origin.DATASHEET})"] if counts else []
    if profile.instructions:
        lines.append(f"instruction sets: {' '.join(profile.instructions)}")
    if profile.fp8_recipes:
        lines.append(f"fp8 recipes: {' '.join(profile.fp8_recipes)}")
    lines += [f"note: {note}" for note in profile.notes]
    lines += [f"source of {name}: {source}" for name, source in profile.sources.items()]
    if profile.versions:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in profile.versions.items()))
    return lines


def print_units(console: Console, profile: ModelProfile) -> None:
    """Print the units of a model, equal neighbouring blocks on one line, then what is pinned and tied."""
    total = f"{profile.class_name}, {count_text(profile.parameters)} parameters, {len(profile.units)} units"
    print_heading(console, f"Model {profile.model_id}", total)
    size = {leaf.module: leaf.parameters for leaf in profile.leaves}

    def parameters(unit: Unit) -> int:
        return sum(size.get(module, 0) for module in unit.modules)

    rows = []
    for run in runs(profile.units, lambda u: u.name, lambda u: (u.role, u.formats, parameters(u), len(u.modules))):
        unit, count = run.items[0], len(run.items)
        each = count_text(parameters(unit))
        amount = each if count == 1 else f"{count} x {each}"
        rows.append([run.name, unit.role.value, amount, " ".join(unit.formats), _modules(run)])
    columns: list[Column] = [("unit", "left"), ("role", "left"), ("parameters", "right")]
    print_table(console, [*columns, ("can take", "left"), ("modules", "left")], rows)
    for pinned in profile.pinned:
        print_line(console, f"no choice: {few(pinned.modules)}: {pinned.reason}")
    for group in profile.tied:
        print_line(console, f"one storage: {' = '.join(group)}")
    if profile.unassigned:
        print_line(console, f"not placed: {few(profile.unassigned)}")


def _modules(run: Run[Unit]) -> str:
    return span(short_modules(run.items[0].modules), short_modules(run.items[-1].modules))
