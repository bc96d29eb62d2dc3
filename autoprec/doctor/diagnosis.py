"""`diagnose`: everything given is read, every check is asked, and the findings come back worst first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoprec.catalog import find_device
from autoprec.doctor import (
    generation,
    hardware,
    hosts,
    loops,
    memory,
    mismatch,
    retired,
    scaling,
    speed,
    storage,
    traced,
)
from autoprec.doctor.case import CHECKS, Case, Check, Evidence
from autoprec.doctor.checkpoint import Checkpoint, read_checkpoint
from autoprec.doctor.logs import Log, read_log
from autoprec.doctor.run import Run
from autoprec.doctor.settings import Settings, read_settings_file
from autoprec.errors import AutoprecError, UsageError
from autoprec.formats import Format
from autoprec.probe.host import may_have
from autoprec.probe.userfile import is_function, load_function
from autoprec.records import DeviceProfile, Diagnosis, Evidenced, Finding, Severity

if TYPE_CHECKING:
    from autoprec.doctor.trace import Traced

__all__ = ["all_checks", "diagnose"]

#: the files of checks; importing them is what registers theirs
_FILES = (scaling, mismatch, generation, hardware, hosts, storage, memory, speed, loops, traced, retired)
#: pieces of evidence shown of one finding; a log repeats itself on every rank
_EVIDENCE = 5


def all_checks() -> tuple[Check, ...]:
    """Return every check, by code."""
    return tuple(CHECKS[code] for code in sorted(CHECKS))


def diagnose(
    model: str | None = None,
    *,
    settings: Sequence[str] = (),
    logs: Sequence[str] = (),
    trace: bool = False,
    device: str = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Look for troubles with number formats.

    Args:
        model: a model or checkpoint folder, a catalogued name or hub id, or file.py:function (which is run).
        settings: files of training arguments, DeepSpeed or accelerate configurations, launch or Python scripts. Scripts
            are read and never run.
        logs: logs or tracebacks.
        trace: run a few steps of the model and look at its values.
        device: where the run is to be; `auto` takes an accelerator that is here, and else assumes none.
        tell: called with a sentence as each part begins.

    Raises:
        UsageError: nothing was given, or `trace` without a model.
        DataError, ModelError, DeviceError: a file, model or device cannot be used.
    """
    if model is None and not settings and not logs:
        raise UsageError("give the doctor something to look at: MODEL, --args FILE or --log FILE")
    if trace and model is None:
        raise UsageError("--trace runs a model: name one, such as 'autoprec doctor demo --trace'")
    notes: list[str] = []
    files: list[Settings] = []
    texts: list[Log] = []
    for path in settings:
        tell(f"Reading {path}")
        file, left_out = read_settings_file(path)
        files.append(file)
        notes += left_out
    for path in logs:
        tell(f"Reading {path}")
        log, left_out = read_log(path)
        texts.append(log)
        notes += left_out
    case = Case(logs=tuple(texts), run=Run(files), device=_device(device))
    if model is not None:
        case = _with_model(case, model, trace, device, notes, tell)
    tell("Checking")
    findings = sorted((f for c in all_checks() if (f := _finding(c, case))), key=lambda f: (f.severity.rank, f.code))
    seen = {piece.place.rpartition(":")[0] for finding in findings for piece in finding.evidence}
    for log in texts:
        if log.path not in seen:
            log.refuse_other_text()
    looked = [*([model] if model else []), *settings, *logs, *(["a trace"] if case.trace else [])]
    worst = findings[0].severity if findings else None
    return Diagnosis(
        looked_at=tuple(looked), findings=tuple(findings), worst=worst, trace=case.trace, notes=tuple(notes)
    )


def _device(device: str) -> DeviceProfile | None:
    """Return the device that the run is meant for; with `auto`, one that is here and no CPU: settings are often read
    on another machine than the one they are for."""
    if device == "auto":
        if not any(may_have(kind) for kind in ("cuda", "xpu", "mps")):
            return None
        from autoprec.probe.device import resolve_device

        return resolve_device("auto")[1]
    kind = device.partition(":")[0]
    if kind == "cpu":
        return hosts.host_profile()
    if kind in ("cuda", "mps", "xpu"):
        from autoprec.probe.device import resolve_device

        return resolve_device(device)[1]
    return find_device(device)


def _with_model(
    case: Case, model: str, trace: bool, device: str, notes: list[str], tell: Callable[[str], None]
) -> Case:
    made: Any = None
    crash: list[str] = []
    if is_function(model):
        tell(f"Running {model}")
        try:
            made = load_function(model)()
            case = replace(case, checkpoint=_checkpoint_of(made, model))
        except AutoprecError as error:
            crash.append(_told(error))
            if not trace:
                raise
    else:
        tell(f"Reading {model}")
        case = replace(case, checkpoint=read_checkpoint(model))
    if trace and not crash:
        try:
            found = _traced(case, model, made, device, tell)
            case = replace(case, trace=found.report)
            notes += found.notes
        except (AutoprecError, RuntimeError, ValueError, TypeError) as error:
            crash.append(_told(error))
    for text in crash:
        # what the workload raised is a log like any other
        case = replace(case, logs=(*case.logs, Log("the traced workload", text)))
        notes.append(f"the workload could not be traced: {text.strip().splitlines()[-1][:300]}")
    return case


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _checkpoint_of(made: Any, name: str) -> Checkpoint | None:
    from autoprec.doctor.modules import module_checkpoint

    return module_checkpoint(made, name)


def _traced(case: Case, model: str, made: Any, device: str, tell: Callable[[str], None]) -> Traced:
    from autoprec.doctor.trace import traced as run_trace
    from autoprec.probe.device import resolve_device
    from autoprec.probe.workload import workload_from

    here = str(resolve_device(device)[0] or resolve_device("auto")[0] or "cpu")
    asked = [f for f in (Format.FP16, Format.BF16) if f in case.run.amp or f in case.run.stored]
    tell(f"Loading {model}")
    workload = workload_from(model, device=here, made=made)
    waits, workers = getattr(made, "waits_s", None), getattr(made, "loader_workers", 0)
    choice = asked[0] if asked else Format.FP16
    return run_trace(workload, choice, asked=bool(asked), waits_s=waits, workers=workers, tell=tell)


def _finding(check: Check, case: Case) -> Finding | None:
    """Return what a check found, with the worst severity of its evidence; None for nothing."""
    evidence = list(dict.fromkeys(check.find(case)))
    if not evidence:
        return None

    def severity(piece: Evidence) -> Severity:
        return piece.severity or check.severity

    evidence.sort(key=lambda piece: severity(piece).rank)
    return Finding(
        code=check.code,
        title=check.title,
        severity=severity(evidence[0]),
        evidence=tuple(Evidenced(text=piece.text, place=piece.place) for piece in evidence[:_EVIDENCE]),
        advice=check.advice,
        paste=check.paste,
        sources=check.sources,
    )
