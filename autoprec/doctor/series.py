"""Figures that training programs print as they go: losses, gradient norms and loss scales, in the order of the log."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["Point", "Series", "read_series"]

_VALUE = (
    r"(?P<value>[-+]?(?:nan|inf(?:inity)?|\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?))(?![\w.]*[A-Za-z])"
    r"(?!\s+(?:ratio|count|check|filter|batch|values?|free))"
)
#: between a name and its figure: {'loss': '0.1'}, loss=0.1, loss 0.1, loss: tensor(0.1, …), loss is nan
_JOINT = r"[\"']?\s*(?:\s+is\s+(?:now\s+)?|\s+became\s+|\s*[:=|]\s*|\s*->\s*|\s+)[\"'\[(]?\s*(?:tensor\()?[\"']?\s*"
#: 'loss', 'train_loss', 'lm loss', 'loss/train', 'eval_loss', 'Loss'; not 'loss scale', 'loss_fn', 'loss_nan_check'
_LOSS = re.compile(
    r"(?<![A-Za-z0-9])(?P<name>(?:[A-Za-z0-9]+[ _/.-]){0,3}loss(?:es)?(?:[/_](?:train|val|valid|eval|test|step"
    r"|epoch|ce|lm|mlm"
    r"|mean|avg|total|iter|batch|[a-z]\b|\d+)\w*)?)" + _JOINT + _VALUE,
    re.IGNORECASE,
)
_NORM = re.compile(r"(?<![A-Za-z])(?P<name>grad(?:ient)?[ _]?norm)" + _JOINT + _VALUE, re.IGNORECASE)
_SCALES = (
    re.compile(r"reducing (?:loss scale )?to " + _VALUE, re.IGNORECASE),
    re.compile(r"attempted loss scale: " + _VALUE, re.IGNORECASE),
    re.compile(r"\b(?:loss|grad)[ _-]?scaler?(?:[ _]?value)?[\"']?\s*[:=|]\s*[\"']?" + _VALUE, re.IGNORECASE),
)
#: sentences about what would be done, not figures; a log of settings is full of them
_TALK = re.compile(
    r"(?<![a-z])(?:if|when(?:ever)?|whether|unless|until|filter|callback|check(?:s|ing)?|skip|ignore|detect|patience"
    r"|best|min|prev|minimum|lowest|initial(?:ised|ized)?|default)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Point:
    """A figure and the line it stands in."""

    value: float
    line: int
    name: str


@dataclass(frozen=True, slots=True)
class Series:
    """All figures of a log, in its order."""

    losses: list[Point] = field(default_factory=list)
    norms: list[Point] = field(default_factory=list)
    scales: list[Point] = field(default_factory=list)

    def training(self) -> list[Point]:
        """Return the losses that are not of an evaluation."""
        return [p for p in self.losses if not re.search(r"eval|valid|val[ _/]|val_|test", p.name, re.IGNORECASE)]

    def norms_by_line(self) -> dict[int, float]:
        """Return the gradient norms by the line they stand in."""
        return {p.line: p.value for p in self.norms}


def read_series(lines: Iterable[tuple[int, str]]) -> Series:
    """Read losses, gradient norms and loss scales out of numbered lines."""
    series = Series()
    for number, line in lines:
        lower = line.lower()
        if "loss" in lower:
            series.losses.extend(_points(_LOSS, line, number))
        if "norm" in lower:
            series.norms.extend(_points(_NORM, line, number))
        if "scale" in lower:
            found = next((list(_points(p, line, number)) for p in _SCALES if p.search(line)), [])
            series.scales.extend(found[:1])
    return series


def _points(pattern: re.Pattern[str], line: str, number: int) -> Iterator[Point]:
    for match in pattern.finditer(line):
        value = float(match["value"])
        name = match.groupdict().get("name") or ""
        if not math.isfinite(value) and _TALK.search(line[: match.start("value")]):
            continue
        yield Point(value, number, name)
