"""`autoprec compare`: any plans side by side on one model and data, with FP32 beside them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoprec.cli.common import (
    device_option,
    errors_console,
    json_option,
    mode_option,
    print_json,
    quiet,
    result_console,
    typed_options,
    workload_options,
)
from autoprec.cli.running import build_workload, plan_path
from autoprec.errors import PlanError, StudyError, UsageError, closest
from autoprec.files import as_json as plain_data
from autoprec.files import from_json, read_json
from autoprec.plan import Plan
from autoprec.records import Mode, PlanComparison, SearchResult

if TYPE_CHECKING:
    from autoprec.predict.forecast import Forecast
    from autoprec.probe.workload import Workload

__all__ = ["command"]

#: as `autoprec.comparison.BY_NAME`, which loads torch; a test holds the two equal
NAMES = ("fp32", "bf16", "fp16", "fp8", "tf32", "cast-bf16", "cast-fp16")
_SEEDS = 8


@dataclass(frozen=True, slots=True)
class _Word:
    """A plan as it was asked for: the word, the name it is shown by, and its file's plan (None of one by name)."""

    word: str
    name: str
    plan: Plan | None


@click.command("compare")
@click.argument("plans", nargs=-1, required=True, metavar="PLAN... [MODEL]")
@workload_options
@device_option
@mode_option
@click.option("--emulate", is_flag=True, help="Formats that are not here by their rounding, without their speed.")
@click.option(
    "--train-steps", metavar="N", type=click.IntRange(min=1), show_default="not trained", help="Train them too."
)
@click.option("--seeds", metavar="K", type=click.IntRange(min=2), show_default=str(_SEEDS), help="Runs of each then.")
@click.option("--learning-rate", metavar="X", type=float, default=1e-4, show_default=True, help="Of AdamW, then.")
@click.option(
    "--pairs", metavar="N", type=click.IntRange(min=6), default=20, show_default=True, help="Timed steps, at least."
)
@click.option("--recorded", is_flag=True, help="Figures of run folders as they are; nothing is run.")
@click.option(
    "--html", metavar="FILE", show_default="no page", help="Write a page too: one file, open it in a browser."
)
@json_option
@click.pass_context
def command(ctx: click.Context, /, plans: tuple[str, ...], as_json: bool, html: str | None, **given: Any) -> None:
    """Put plans side by side on your data.

    PLAN is a plan.json, a run folder, or a plan by name: fp32 tf32 bf16
    fp16 fp8 (blanket autocast), cast-bf16 cast-fp16 (model.to). MODEL is as
    for search; without it that of the plan files.

    Each plan is run beside FP32: speedup, memory, quality drop, the task's
    metric where the data has labels, and the share of matmul time on
    low-precision kernels, with intervals and origins, against the usual
    targets. With --train-steps each is trained over K seeds as well.

    With the name of a GPU that is not here its formats are emulated, and
    its times and memory predicted.
    """
    words, model = _split(plans)
    _check(words, given)
    page = None if html is None else _page(html)
    if given["recorded"]:
        if model is not None:
            raise UsageError(f"--recorded reads what runs measured and loads no model; leave out '{model}'")
        found = _read(words)
    else:
        found = _measure(_loaded(words), model, given)
    typed = typed_options(ctx, given | {"html": html, "as_json": as_json})
    found = replace(found, command=shlex.join(["autoprec", "compare", *plans, *typed]))
    if page is not None:
        from autoprec.report.comparedpage import write_comparison

        write_comparison(page, found)
    if as_json:
        print_json(plain_data(found))
        return
    from autoprec.report.compared import print_comparison
    from autoprec.report.terminal import print_paths

    print_comparison(result_console(), found)
    if page is not None:
        print_paths(result_console(), {"page": str(page)})


def _page(given: str) -> Path:
    """Return the page's file, which can be written: that is told before anything is measured."""
    path = Path(given)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html takes the page's file, such as compare.html, and got '{given}'")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"is to lie in {path.parent}, which is no folder"
        raise UsageError(f"--html cannot write {path}: it {wrong}. Name another file.")
    return path


def _split(given: Sequence[str]) -> tuple[list[str], str | None]:
    """Divide what stands on the line into plans and a model, which comes last."""
    last = given[-1]
    plans, model = (list(given), None) if _is_plan(last) else (list(given[:-1]), last)
    for word in plans:
        if not _is_plan(word):
            raise UsageError(
                f"'{word}' is no plan file, no run folder and no plan by name ({', '.join(NAMES)})"
                f"{closest(word, NAMES)}"
            )
    if len(plans) < 2:
        taken = f"; '{model}' was taken as the model{closest(model, NAMES)}" if model else ""
        one = plans[0] if plans else "PLAN"
        raise UsageError(
            f"compare takes two plans or more, and got {len(plans)}{taken}. Name another, such as bf16; one plan file "
            f"beside FP32 is: autoprec verify {one}"
        )
    twice = next((word for word in plans if plans.count(word) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' stands twice among the plans")
    return plans, model


def _is_plan(word: str) -> bool:
    path = Path(word)
    if path.is_dir():
        return any((path / name).exists() for name in ("plan.json", "result.json", "units.json"))
    return word in NAMES or word.endswith(".json")


def _check(words: Sequence[str], given: dict[str, Any]) -> None:
    if given["seeds"] is not None and given["train_steps"] is None:
        raise UsageError("--seeds says how often each plan is trained; give --train-steps too")
    if given["recorded"] and given["train_steps"] is not None:
        raise UsageError("--recorded runs nothing, so there is nothing to train; leave out --train-steps or --recorded")
    if given["recorded"]:
        files = [word for word in words if word not in NAMES and not Path(word).is_dir()]
        if files:
            raise UsageError(
                f"--recorded reads run folders and plans by name; '{files[0]}' is a file. Name its folder."
            )


def _names(words: Sequence[str]) -> list[str]:
    """Return what each plan is called: its own name, or its file's or folder's; the whole path where two are alike."""
    short = []
    for word in words:
        path = Path(word)
        named_by_folder = path.name == "plan.json" and path.parent.name
        short.append(
            word if word in NAMES else path.parent.name if named_by_folder else path.name.removesuffix(".json")
        )
    return [word if short.count(name) > 1 else name for word, name in zip(words, short, strict=True)]


def _loaded(words: Sequence[str]) -> list[_Word]:
    """Read the plan files; all must be of one model."""
    found = [
        _Word(word, name, None if word in NAMES else Plan.load(plan_path(word)))
        for word, name in zip(words, _names(words), strict=True)
    ]
    files = [entry for entry in found if entry.plan is not None]
    for entry in files[1:]:
        first = files[0].plan
        assert entry.plan is not None and first is not None
        if entry.plan.model.fingerprint != first.model.fingerprint:
            raise PlanError(
                f"{files[0].word} is a plan for {first.model.id} and {entry.word} for {entry.plan.model.id}: they are "
                "different models, so there is nothing to compare them on"
            )
    return found


def _measure(words: Sequence[_Word], model: str | None, given: dict[str, Any]) -> PlanComparison:
    plans = [entry.plan for entry in words if entry.plan is not None]
    name = model or (plans[0].model.id if plans else None)
    if name is None:
        asked = " ".join(entry.word for entry in words)
        raise UsageError(f"plans by name say no model; name it: autoprec compare {asked} MODEL (demo is one)")
    mode = _mode(words, given["mode"])
    from autoprec.report.progress import News

    options = {key: given[key] for key in _WORKLOAD}
    with quiet(), News(errors_console()) as news:
        news.doing(f"Loading {name}")
        workload = build_workload(name, mode=mode, absent=True, **options)
        for note in workload.notes:
            news.say(note)
        from autoprec.comparison import Candidate, compare_plans, plan_by_name

        forecast = _forecast(workload, given["device"])
        device = forecast.device if forecast else None
        candidates = [
            Candidate(
                name=entry.name,
                source=entry.word if entry.plan else "by name",
                plan=entry.plan or plan_by_name(entry.word, workload.model, mode=workload.mode, device=device),
            )
            for entry in words
        ]
        return compare_plans(
            workload,
            candidates,
            emulate=given["emulate"],
            forecast=forecast,
            train_steps=given["train_steps"] or 0,
            seeds=given["seeds"] or _SEEDS,
            learning_rate=given["learning_rate"],
            pairs=given["pairs"],
            tell=news.doing,
        )


_WORKLOAD = (
    "data", "task", "batch_size", "seq_len", "batches", "metric", "trust_remote_code", "device",
)  # fmt: skip


def _mode(words: Sequence[_Word], asked: str | None) -> str | None:
    """Return the mode: as asked, else that of the plan files, else what the workload has."""
    if asked is not None:
        return asked
    modes = {entry.plan.mode: entry.word for entry in words if entry.plan is not None}
    if len(modes) > 1:
        raise UsageError(
            f"{modes[Mode.TRAIN]} is a plan for training and {modes[Mode.INFER]} one for inference; say what a step is "
            "with --mode train or --mode infer"
        )
    return next((str(mode) for mode in modes), None)


def _forecast(workload: Workload, device: str) -> Forecast | None:
    from autoprec.probe.steps import device_of
    from autoprec.probe.units import probe_units
    from autoprec.study.away import absent_device, forecast_of

    known = absent_device(device_of(workload.model), device)
    if known is None:
        return None
    return forecast_of(workload, probe_units(workload.model, model_id=workload.model_id), known)


def _read(words: Sequence[str]) -> PlanComparison:
    from autoprec.comparison import Recorded, recorded_plans

    asked = []
    for word, name in zip(words, _names(words), strict=True):
        if word in NAMES:
            asked.append(Recorded(name=name, result=None))
            continue
        path = Path(word) / "result.json"
        data = read_json(path, what="result", error=StudyError)
        asked.append(Recorded(name=name, result=from_json(SearchResult, data, what=f"result {path}", error=StudyError)))
    return recorded_plans(asked)
