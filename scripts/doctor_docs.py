"""Write docs/doctor.md out of the checks themselves. `python scripts/doctor_docs.py`; a test compares the two."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from autoprec.doctor.case import Check
from autoprec.doctor.diagnosis import all_checks

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"

_TOP = """# The doctor

<!-- written by scripts/doctor_docs.py out of the checks: edit those -->

`autoprec doctor` looks for troubles with number formats. It takes any of three things,
and more where they are of one run:

    autoprec doctor path/to/model                        # a model or checkpoint folder
    autoprec doctor --args train.py --args ds.json       # settings and scripts, read as text and never run
    autoprec doctor --log run.log                        # what the run printed
    autoprec doctor path/to/model --args args.json --device t4   # together, for a card that is not here
    autoprec doctor file.py:workload --trace             # a few steps, watched

Each finding has a code that stays, a severity, what was seen and where, a line to paste, and sources. An *error* is
broken: it fails, or trains to nothing; the exit code is then 1. A *warning* costs quality, time or memory. A *note* is
worth knowing. `--json` prints one document (`autoprec/diagnosis@1`).

- `--args` takes training arguments, DeepSpeed and accelerate files, YAML and TOML of trainers, launch scripts, Python
  scripts and notebooks. Names it does not know harm nothing.
- `--log` takes a log or a traceback with whatever launchers put before its lines. A message that is only mentioned, in
  a changelog or a comment, is no finding. Of a file beyond 32 MB the beginning and the end are read, and it says so.
- without `--device` nothing is assumed about a card that is not here.
- `--trace` runs up to three batches in FP32 and in the format that the settings ask for (else FP16): the first unit
  whose values are not finite, the largest activation of each unit, the gradients that FP16 would round to 0, a loss
  scale, the share of matmuls that ran in the low format, and, where the workload reads a `DataLoader`, the share of
  time spent waiting for data. What the step raises is read like a log. Its times are medians of a few steps on this
  machine.

Not promised: a script is understood as far as its text is plain (literals, names assigned once); what it computes at
run time is not. A checkpoint beyond 3 GB is looked into in blocks of each tensor.

```python
from autoprec.doctor.diagnosis import diagnose

found = diagnose("demo")
assert not found.broken
```
"""

_PARTS = (
    (
        "Range and loss scale",
        ("AP001", "AP002", "AP003", "AP020", "AP032", "AP033", "AP037", "AP040", "AP041", "AP042"),
    ),
    ("Formats that meet", ("AP014", "AP015", "AP016", "AP017", "AP018", "AP019", "AP035")),
    ("Generating", ("AP004", "AP005")),
    ("Devices", ("AP006", "AP007", "AP008", "AP009", "AP011", "AP024", "AP030", "AP036")),
    ("What weights are stored in", ("AP021", "AP022", "AP023", "AP025")),
    ("Memory", ("AP012", "AP013")),
    ("Speed", ("AP010", "AP026", "AP027", "AP028", "AP029")),
    ("Settings and loops", ("AP031", "AP034", "AP038")),
)


def page() -> str:
    """Return the page."""
    checks = {check.code: check for check in all_checks()}
    retired = tuple(code for code in checks if code > "AP100")
    named = [code for _, codes in _PARTS for code in codes]
    assert sorted([*named, *retired]) == sorted(checks), set(checks) ^ {*named, *retired}
    lines = [_TOP]
    for title, codes in _PARTS:
        lines += [f"## {title}", ""]
        for code in codes:
            lines += [*_section(checks[code]), ""]
    lines += ["## Retired settings", "", "With what replaced each in [retired.md](retired.md).", ""]
    lines += ["| code | setting | severity | write |", "|---|---|---|---|"]
    lines += [
        f"| {c.code} | {c.title.removeprefix('Retired: ')} | {c.severity} | `{c.paste.replace('|', chr(92) + '|')}` |"
        for c in map(checks.__getitem__, retired)
    ]
    return "\n".join(lines) + "\n"


def _section(check: Check) -> Iterator[str]:
    yield f"### {check.code}: {check.title}"
    yield ""
    yield textwrap.fill(f"*{check.severity}.* {check.meaning}", 120, break_long_words=False, break_on_hyphens=False)
    yield ""
    yield textwrap.fill(check.advice, 120, break_long_words=False, break_on_hyphens=False)
    if check.paste:
        yield ""
        yield from (f"    {line}" for line in check.paste.splitlines())
    yield ""
    yield "Sources: " + ", ".join(f"[{_short(source)}]({source})" for source in check.sources)


def _short(source: str) -> str:
    """Return `owner/repository#number` of a GitHub address, the host of another."""
    if source.startswith("https://github.com/"):
        owner, repository, _, number = source.removeprefix("https://github.com/").split("/")
        return f"{owner}/{repository}#{number}"
    return source.split("/")[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
