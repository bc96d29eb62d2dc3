"""Tables of a page: titles with units, and rows of text; each figure beside its interval and origin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoprec.quantities import duration_text
from autoprec.records import Measurement, SearchResult
from autoprec.report.figures import bytes_text, drop_unit, format_counts, interval, megabytes, number, origin_note
from autoprec.report.grouping import few
from autoprec.report.run import Run

__all__ = [
    "Fact",
    "PlainTable",
    "baseline_notes",
    "batches",
    "facts",
    "front_table",
    "origin_table",
    "reasons",
    "unmade",
]


@dataclass(frozen=True, slots=True)
class PlainTable:
    """Titles and rows; columns from `numbers` on, up to `words`, are figures; `marked` is set off."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: range
    marked: int | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """A name with what is to be said under it."""

    name: str
    text: str


def front_table(found: Sequence[Measurement], unit: str, marked: int | None) -> PlainTable:
    """Return measurements with all their figures."""
    titles = ("plan", f"drop, {unit}", "drop, %", "step, ms", "times as fast as FP32", "peak, MB", "formats")
    rows = tuple(
        (
            m.name,
            interval(m.drop, m.drop_ci95) + origin_note(m.origin.drop),
            "-" if m.drop_percent is None else number(m.drop_percent),
            interval(m.step_ms, m.step_ms_ci95) + origin_note(m.origin.step_ms),
            interval(m.speedup, m.speedup_ci95),
            megabytes(m.peak_bytes) + origin_note(m.origin.peak_bytes),
            format_counts(m.assignment),
        )
        for m in found
    )
    return PlainTable(titles, rows, range(1, 6), marked)


def baseline_notes(found: Iterable[Measurement]) -> list[Fact]:
    """Return why baselines were stopped, or could not run."""
    return [Fact(m.name, m.reason) for m in found if m.reason]


def reasons(result: SearchResult) -> PlainTable | None:
    """Return what each unit of the chosen plan drops and takes, and why it has its format."""
    if not result.explained:
        return None
    unit = drop_unit((*result.baselines, *result.front))
    titles = (
        "unit",
        "format",
        f"probed drop, {unit}",
        f"drop, {unit}",
        "of the drop",
        "time over FP32, ms",
        "of the saving",
    )
    rows = tuple(
        (
            e.unit,
            str(e.format),
            "-" if e.probed is None else number(e.probed.value),
            interval(e.drop.value, (e.drop.low, e.drop.high)),
            f"{100 * e.drop_share:.1f} %",
            interval(e.time_ms.value, (e.time_ms.low, e.time_ms.high)),
            f"{100 * abs(e.time_share):.1f} %",
            e.reason,
        )
        for e in result.explained
    )
    return PlainTable((*titles, "why"), rows, range(2, 7))


def batches(result: SearchResult) -> PlainTable | None:
    """Return the largest batch that fits with each plan."""
    titles = ("plan", "largest batch, examples", "peak there", "tokens/s")
    rows = tuple(
        (b.name, str(b.batch_size), bytes_text(b.total_bytes), number(b.tokens_per_s.value))
        for b in result.largest_batches
    )
    return PlainTable(titles, rows, range(1, 4)) if rows else None


def unmade(result: SearchResult) -> list[Fact]:
    """Return formats that were not tried, by reason, then how confirmations and training ended, then notes."""
    counts: dict[tuple[str, str], list[str]] = {}
    for removal in result.removed:
        counts.setdefault((str(removal.format), removal.reason), []).append(removal.unit)
    found = [Fact(f"{choice} not tried", f"{few(units, 2)}: {reason}") for (choice, reason), units in counts.items()]
    unit = drop_unit((*result.baselines, *result.front))
    for one in result.confirmed:
        text = f"{one.answer}, on {one.batches} unseen batches"
        if one.drop is not None and one.low is not None and one.high is not None:
            text += f": drop {number(one.drop)} {unit}, between {number(one.low)} and {number(one.high)}"
        found.append(Fact(f"confirmation of {one.name}", text + (f" ({one.reason})" if one.reason else "")))
    for arm in (arm for trained in result.trained for arm in trained.arms):
        gap = f"held-out loss {interval(arm.gap, arm.gap_ci95)} over FP32's: " if arm.gap is not None else ""
        found.append(Fact(f"training of {arm.name}", f"{arm.verdict}, {gap}{arm.reason}"))
    return [*found, *(Fact("note", note) for note in result.notes)]


def origin_table(run: Run) -> PlainTable:
    """Return where each kind of figure on the page comes from."""
    rows: list[tuple[str, str]] = []

    def add(name: str, known: Iterable[str | None], how: str) -> None:
        said = ", ".join(dict.fromkeys(k for k in known if k))
        if said:
            rows.append((name, f"{said}: {how}"))

    done = run.measured
    add("drop", (m.origin.drop for m in done), "against the FP32 run on the same batches")
    add("step time, speedup", (m.origin.step_ms for m in done), "against the FP32 step, as a ratio")
    add("peak memory", (m.origin.peak_bytes for m in done), "of one step")
    add("metric", (m.origin.metric for m in done), "the workload's own")
    if run.sensitivity:
        add("drop of a unit alone", (d.drop.origin for d in run.sensitivity.drops), "before any trial")
    if run.speed:
        add("time of a unit alone", ("measured",), "before any trial, one unit of each shape")
    if run.result:
        result = run.result
        add("time of a unit", ("predicted",) if result.unit_ms else (), "by the time model")
        add("bound", ("predicted",) if result.predicted_bound else (), "from all trials")
        add("why each format", ("predicted",) if result.explained else (), "learnt from all trials")
        add("memory by part", ("predicted",) if result.memory else (), "by the memory model")
        add(
            "largest batch", ("predicted",) if result.largest_batches else (), "by the memory model; time in proportion"
        )
        add("training", (run.numerics,) if result.trained else (), "beside FP32, same batches and seeds")
    return PlainTable(("figure", "origin"), tuple(rows), range(0))


def facts(run: Run) -> list[Fact]:
    """Return what the run ran on and how it was asked for."""
    found = []
    device, setting, result = run.device, run.setting, run.result
    if device is not None:
        parts = [f"{device.name} ({device.origin})", device.kind]
        parts += [bytes_text(device.memory_bytes)] if device.memory_bytes else []
        parts += [f"{device.threads} thread{'s' * (device.threads > 1)}"] if device.threads else []
        parts += [", ".join(device.instructions)] if device.instructions else []
        found.append(Fact("device", ", ".join(parts)))
    if run.model is not None:
        model = run.model
        found.append(Fact("model", f"{model.model_id}, {model.class_name}, {model.parameters:,} parameters"))
        found.append(Fact("fingerprint", model.fingerprint[:16]))
    if setting is not None:
        shape = f"{setting.batches} of {setting.batch_size} x {setting.seq_len} tokens"
        found.append(Fact("batches", f"{shape}, {setting.unseen_batches} of them kept for confirmation"))
        found += [Fact("workload", " ".join(setting.data))] if setting.data else []
        found.append(Fact("command", setting.command or "from Python: autoprec.search(…)"))
        found.append(Fact("started", setting.started))
        found.append(Fact("budget", duration_text(setting.budget_seconds)))
    seed = setting.seed if setting else result.seed if result else None
    seeds = [] if seed is None else [f"search {seed}"]
    seeds += [f"sensitivity {run.sensitivity.seed}"] if run.sensitivity else []
    found += [Fact("seeds", ", ".join(seeds))] if seeds else []
    versions = dict(setting.versions) if setting else {}
    for record in (run.sensitivity, run.speed, run.device):
        versions = {**(record.versions if record else {}), **versions}
    found.append(Fact("versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) or "not recorded"))
    return found
