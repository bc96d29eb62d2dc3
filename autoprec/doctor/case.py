"""A case, as the checks see it, and the register of checks: one function each, under a stable code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoprec.doctor.checkpoint import Checkpoint
from autoprec.doctor.logs import Log, Said
from autoprec.doctor.run import Run
from autoprec.records import DeviceProfile, Severity, TraceReport

__all__ = ["CHECKS", "Case", "Check", "Evidence", "address", "check", "patterns", "said"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing seen, and where; a severity of its own where it is worse or milder than the check's."""

    text: str
    place: str
    severity: Severity | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that was given; what was not is empty or None."""

    logs: tuple[Log, ...] = ()
    run: Run
    checkpoint: Checkpoint | None = None
    device: DeviceProfile | None = None
    trace: TraceReport | None = None
    #: what the trace found that is no figure: an error of the run
    crash: str | None = None

    @cached_property
    def family(self) -> str:
        """Words that tell the model's family, from the checkpoint and from names in the settings."""
        names = [placed.text.lower() for placed in self.run.names]
        imported = {
            name.removeprefix("transformers.").lower()
            for file in self.run.files
            for name in (file.script.imports if file.script is not None else ())
            if name.startswith("transformers.") and not re.search(r"Token|Config|Auto|Process|Train", name)
        }
        return " ".join([self.checkpoint.family if self.checkpoint else "", *names, *sorted(imported)])


Find = Callable[[Case], Iterator[Evidence]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A trouble: how it is called, what to do, and the function that looks for it."""

    code: str
    title: str
    severity: Severity
    advice: str
    paste: str
    sources: tuple[str, ...]
    find: Find

    @property
    def meaning(self) -> str:
        """What it is and how it is told, from the function's docstring."""
        return " ".join((self.find.__doc__ or "").split())


CHECKS: dict[str, Check] = {}


def check(
    code: str, title: str, severity: Severity, *, advice: str, paste: str = "", sources: str = ""
) -> Callable[[Find], Find]:
    """Register a check. `sources` are addresses, or `owner/repository#number` of GitHub, parted by spaces."""

    def register(find: Find) -> Find:
        assert code not in CHECKS, f"{code} is taken"
        CHECKS[code] = Check(
            code=code,
            title=title,
            severity=severity,
            advice=" ".join(advice.split()),
            paste=paste,
            sources=tuple(map(address, sources.split())),
            find=find,
        )
        return find

    return register


def address(source: str) -> str:
    """Return the address of `owner/repository#number`; an address is itself."""
    repository, _, number = source.partition("#")
    return source if source.startswith("http") else f"https://github.com/{repository}/issues/{number}"


def patterns(*texts: str) -> tuple[re.Pattern[str], ...]:
    """Return regular expressions that take capital and small letters for the same."""
    return tuple(re.compile(text, re.IGNORECASE) for text in texts)


def said(
    case: Case, wanted: Sequence[re.Pattern[str]], *, only: Callable[[Said], bool] = lambda _: True, most: int = 3
) -> Iterator[Evidence]:
    """Yield what was said in the logs as an error and matches; the same text once, and no more than `most`."""
    for log in case.logs:
        texts: set[str] = set()
        for message in log.said(*wanted):
            text = " ".join(message.text.split())[:240]
            key = re.sub(r"\d+", "0", text)
            if key in texts or not only(message):
                continue
            texts.add(key)
            yield Evidence(text, log.place(message.line))
            if len(texts) >= most:
                break
