"""A log or traceback as lines without their decoration, and what in it was said as an error.

The same message comes bare, in a traceback, after `[rank3]:`, a date, a level or a pod's name, in JSON, or in a box
that `rich` draws. A message that is only mentioned (a changelog, a comment, a handler that says what it guards
against) is no error: what decides is what stands around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from autoprec.doctor.reading import read_text
from autoprec.doctor.series import Series, read_series
from autoprec.errors import DataError

__all__ = ["Log", "Said", "read_log"]

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-_])")
_LEVEL = r"(?:TRACE|DEBUG|INFO|NOTICE|WARN(?:ING)?|ERROR|CRITICAL|FATAL|SEVERE|EXCEPTION)"
#: what launchers and loggers put before a line, one alternative at a time
_PREFIX = re.compile(
    rf"""\s*(?:
      \[?(?:default|local_rank|rank|proc(?:ess)?|worker|gpu|node|trainer|host)[ _:=-]?\d+\]?\s*[:|>]?\s
    | \[(?:rank|RANK)[ _:]?\d+\]:?
    | \[?\d+,\d+\]?<std(?:err|out)>:? | \[\d+\]<std(?:err|out)>:? | \d{{1,3}}:\s
    | \((?:[\w.]+\s+)?(?:[\w]+=[^,)]*[,\s]*)*pid=\d+[^)]*\)
    | std(?:err|out)\s*[:|]
    | \[?\d{{4}}[-/]\d\d[-/]\d\d[T\ _]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|\s?[+-]\d\d:?\d\d)?\]?\s*[:,|-]?
    | \[?\d\d-\d\d\s\d\d:\d\d:\d\d(?:[.,]\d+)?\]? | \[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]?\s*[|:-]?
    | [A-Z][a-z]{{2}}\s+\d+\s\d\d:\d\d:\d\d\s[\w.-]+(?:\s[\w.-]+\[\d+\]:)?
    | \[?(?P<level>{_LEVEL})\b\]?\s*[:|>-]* | \[(?P<level2>{_LEVEL})\|[^\]]*\]
    | (?P<glog>[IWEF])\d{{4}}\s+\d\d:\d\d:\d\d\.\d+\s+\d+\s+[^\]]*\]
    | \[[\w./-]+(?:\.py)?:\d+(?::\w+)?\]:? | [\w/-]+\.py:\d+\]?:?\s(?=\S) | \[[\w.-]+\](?=\s\S)
    | (?:root|py\.warnings|__main__|[a-z_][\w]*(?:\.[\w]+)+)\s*[:-]\s?(?=\S)
    | >>+ | [|│]\s | E\s{{2,}} | [-–]\s | \#\d+\s\d+\.\d+\s | [\w.-]+-\d+\s*\|\s
    )""",
    re.VERBOSE,
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Exit|Failure|Failed)\b")
#: what may stand right before a message that is an error: an exception's name, a word of failure, a JSON key
_ANNOUNCES = re.compile(
    r"(?:\w(?:Error|Exception|Warning)\b(?:\([\"']?)?|\b(?:error|exception|failed|failure|raised|raises|fatal|assertion"
    r"|warning|abort(?:ed|ing)?|reason|what\(\)|got|gets?|getting|hit|hits|hitting|see|seeing|encounter(?:ed|ing)?|throws?|threw|gives?|gave|says?|said|with)|!!!|[\"'](?:message|msg|log|text|error|exception|exc_info|stderr|detail|traceback)[\"']"
    r"|^)\s*[\"'`:=(>\]\s-]*$",
    re.IGNORECASE,
)
#: words that make a message a mention: of a remedy, of a guard, of what is not so
_MENTION = re.compile(
    r"\b(?:fix(?:ed|es|ing)?|avoid(?:s|ed|ing)?|prevent(?:s|ed|ing)?|work(?:s|ed|ing)?[ -]?around|no longer|if "
    r"you|in case"
    r"|resolv(?:e|es|ed|ing)|guard(?:s|ed|ing)?|silenc(?:e|es|ed|ing)|suppress(?:es|ed|ing)?|changelog|release notes"
    r"|see (?:also|issue|the|docs)|known issue|would (?:raise|fail|give|be)|used to|instead of|rather than|against"
    r"|without (?:a |an |any )?(?:error|fail|rais|hitting|seeing)|never (?:rais|fail|see)|regression test"
    r"|closes?|docs?:|tip:|hint:|faq)\b",
    re.IGNORECASE,
)
_HANDLED = re.compile(
    r"\b(?:was|were|is|are|has been|now|got) (?:fixed|resolved|handled|avoided|gone|covered)\b|\(see |\?\s*(?:\(|$)"
    r"|^[\s\w]{0,20}\b(?:avoided|prevented|handled|recovered|resolved|fixed) (?:by|with|in|via|through)\b",
    re.IGNORECASE,
)
_FRAME = re.compile(r'^\s*(?:File "[^"]+", line \d+|[\w./-]+\.py:\d+:? in |at ::|frame #\d+)')
_DIGITS = re.compile(r"\d+")
#: lines that differ in digits only of which one may be said elsewhere (on another rank, at another frame)
_REPEATS = 3
#: lines above an error that belong to its traceback
_CONTEXT = 160
#: what a log, a traceback or an issue has somewhere; a poem has none
_KNOWN = re.compile(
    r"\b(?:error|exception|warn|info|debug|traceback|loss|epoch|step|iter|train|eval|model|token|torch|cuda|gpu|cpu|batch|"
    r"lr|learning|accuracy|ppl|load|memory|fp16|bf16|fp8|seconds|it/s|samples|throughput|ms|output|text|content|answer|assert|abort|fatal|fail)\w*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Said:
    """An error message in a log, with the lines of the traceback above it."""

    text: str
    line: int
    context: tuple[str, ...]

    def frames(self, count: int = 8) -> str:
        """Return the innermost lines of the traceback, newest last, as one text."""
        return "\n".join(self.context[-count:])


class Log:
    """A log's lines without decoration; `levels` are the loggers' own words, where given."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines, self.levels = _cleaned(text)

    def refuse_other_text(self) -> None:
        """Raise a DataError where no line reads like one of a log or a traceback."""
        if not any(_KNOWN.search(line) or "Error" in line for line in self.lines):
            raise DataError(
                f"--log {self.path} does not read like a log or a traceback: no line names an error, a step, a loss or "
                "a model. Give what the training program printed; settings and scripts go to --args."
            )

    def place(self, line: int) -> str:
        """Return a place in the log for people."""
        return f"{self.path}:{line + 1}"

    @cached_property
    def series(self) -> Series:
        """The losses, norms and loss scales of the log."""
        return read_series(enumerate(self.lines))

    @cached_property
    def folded(self) -> str:
        """All lines as one lower-case text, for words that may stand anywhere."""
        return "\n".join(self.lines).lower()

    def said(self, *patterns: re.Pattern[str]) -> Iterator[Said]:
        """Yield every message that matches a pattern and was said as an error, in the order of the log."""
        for number, text in self.distinct:
            for pattern in patterns:
                match = pattern.search(text)
                if match and match.start() <= len(self.lines[number]) and self._is_said(number, text, match):
                    yield Said(text, number, self._context(number))
                    break

    @cached_property
    def distinct(self) -> list[tuple[int, str]]:
        """Lines, with what a terminal folded, that differ in more than their digits; of equals the first few.

        A long log is the same line a hundred thousand times, and says nothing new in it.
        """
        seen: dict[str, int] = {}
        kept = []
        for number, line in enumerate(self.lines):
            shape = _DIGITS.sub("", line)
            count = seen.get(shape, 0)
            if line and count < _REPEATS:
                seen[shape] = count + 1
                kept.append((number, self._with_continuation(number)))
        return kept

    def _with_continuation(self, number: int) -> str:
        """Return an exception's line with the next two, into which a terminal may have folded it."""
        line = self.lines[number]
        if not _EXCEPTION.match(line) and "rror: " not in line:
            return line
        rest = []
        for other in self.lines[number + 1 : number + 3]:
            if not other.strip() or _EXCEPTION.match(other) or _FRAME.match(other) or other.startswith("Traceback"):
                break
            rest.append(other.strip())
        return " ".join([line, *rest])

    def _is_said(self, number: int, text: str, match: re.Match[str]) -> bool:
        before, after = text[: match.start()], text[match.end() :]
        if before.lstrip().startswith(("#", "//", "* ", "+ ", "commit ", "diff ")) or _MENTION.search(before):
            return False
        if _HANDLED.search(after[:80]):
            return False
        if _ANNOUNCES.search(before) or _EXCEPTION.match(text):
            return True
        if self.levels[number] in ("ERROR", "CRITICAL", "FATAL", "SEVERE", "WARNING", "WARN", "EXCEPTION"):
            return True
        # in the middle of a sentence: quoted it is talked about, bare it is the message's own beginning
        quoted = before.rstrip(" (").endswith(("'", '"', "`", "“", "‘"))
        return self.levels[number] is None and not quoted

    def _context(self, number: int) -> tuple[str, ...]:
        """Return the lines of the traceback that ends in a line."""
        start = max(0, number - _CONTEXT)
        above = self.lines[start:number]
        for index in range(len(above) - 1, -1, -1):
            if "Traceback (most recent call last)" in above[index]:
                return tuple(above[index + 1 :])
        return tuple(line for line in above[-40:] if _FRAME.match(line) or line.startswith(("    ", "│", "❱")))


def read_log(path: str) -> tuple[Log, tuple[str, ...]]:
    """Read a log; and what was left out of a huge one.

    Raises:
        DataError: it is missing, empty or binary.
    """
    read = read_text(path, what="--log")
    return Log(read.path, read.text), (read.cut,) if read.cut else ()


def _cleaned(text: str) -> tuple[list[str], list[str | None]]:
    lines: list[str] = []
    levels: list[str | None] = []
    text = _ESCAPES.sub("", text)
    for raw in re.split(r"\r\n|\n|\r", text):  # progress bars write over themselves
        parts = raw.split("\\n") if "\\n" in raw and ("Error" in raw or "Traceback" in raw) else [raw]
        for part in parts:
            line, level = _bare(part.rstrip())
            lines.append(line)
            levels.append(level)
    return lines, levels


def _bare(line: str) -> tuple[str, str | None]:
    """Return a line without what launchers and loggers put before it, and the level if it was among that."""
    level = None
    if line.startswith(("    ", "  File ")):
        return line, None
    for _ in range(8):
        match = _PREFIX.match(line)
        if match is None or not match.end():
            break
        found = (
            match["level"] or match["level2"] or {"E": "ERROR", "W": "WARNING", "F": "FATAL"}.get(match["glog"] or "")
        )
        level = found or level or ("INFO" if match["glog"] else None)
        line = line[match.end() :]
        if line.startswith(("    ", "  File ")):
            break
    return line if line.startswith("  ") else line.lstrip(), level
