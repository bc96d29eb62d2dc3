"""`autoprec show`: a plan or the result of a search, read from its file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoprec.cli.common import json_option, print_json, result_console
from autoprec.cli.running import model_of_run
from autoprec.errors import AutoprecError, PlanError, StudyError, UsageError
from autoprec.files import as_json as plain_data
from autoprec.files import from_json, read_json
from autoprec.plan import Plan
from autoprec.records import SearchResult

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command"]


@click.command("show")
@click.argument("what", metavar="PLAN|RUN")
@click.option("--html", "as_html", is_flag=True, help="Write the report of RUN anew, and print its path.")
@json_option
def command(what: str, as_html: bool, as_json: bool) -> None:
    """Show a plan, unit by unit, or what a search found.

    PLAN is a plan.json; RUN is a run folder or its result.json. With --html
    the search of a run folder need not have ended.
    """
    if as_html:
        _write_page(Path(what), as_json=as_json)
        return
    from autoprec.report.terminal import print_explained, print_paths, print_plan, print_result

    path = _file_of(Path(what))
    schema, record = _read(path)
    if isinstance(record, Plan):
        if as_json:
            print_json(record.to_json())
        else:
            console = result_console()
            print_plan(console, record, modules=True)
            if schema.startswith("autoprec/plan@"):
                _next(console, path)
        return
    if as_json:
        print_json(plain_data(record))
        return
    console = result_console()
    print_result(console, record)
    print_explained(console, record)
    beside = path.with_name("plan.json")
    if record.chosen is not None and beside.exists():
        console.print()
        print_plan(console, Plan.load(beside))
        print_paths(console, {"plan": str(beside)})


def _write_page(path: Path, *, as_json: bool) -> None:
    """Write the report of a run folder, whatever state its search is in, and print where it is."""
    if as_json:
        raise UsageError("--html writes a file and --json prints; give one of them")
    folder = path.parent if path.name == "result.json" else path
    if not folder.is_dir():
        raise UsageError(f"--html makes the report of a run folder, and {path} is none. Give the folder of a search.")
    if not any((folder / name).exists() for name in ("result.json", "study.journal", "trials.csv")):
        raise StudyError(f"{folder} holds no measurements, so there is nothing to report. Give the folder of a search.")
    from autoprec.report.html import write_report
    from autoprec.report.terminal import print_paths
    from autoprec.study.reading import read_run

    run, page = read_run(folder), folder / "report.html"
    if not run.rows:
        raise StudyError(f"{folder} holds no measurement that can be read: {'; '.join(run.faults) or 'none was made'}")
    write_report(page, run)
    print_paths(result_console(), {"report": str(page)})


def _next(console: Console, path: Path) -> None:
    """Print how to put a plan in force, and how to see that it does what it says."""
    from autoprec.report.terminal import print_paths

    words = shlex.quote(str(path))
    steps = {"apply": f"autoprec.apply(model, autoprec.Plan.load({str(path)!r}))", "verify": f"autoprec verify {words}"}
    print_paths(console, steps)


def _file_of(path: Path) -> Path:
    """Return the file to read: a run folder's result, or its plan where there is no result yet."""
    if not path.is_dir():
        return path
    for name in ("result.json", "plan.json"):
        if (path / name).exists():
            return path / name
    raise StudyError(
        f"{path} holds no result.json and no plan.json: it is no run folder, or its search is still running or was "
        f"killed. Go on with a killed one: autoprec search {model_of_run(path) or 'MODEL'} --resume --out {path}"
    )


def _read(path: Path) -> tuple[str, Plan | SearchResult]:
    """Read a plan or a result by its schema, and return that too; a recommendation is shown by its plan."""
    data: Any = read_json(path, what="file", error=AutoprecError)
    schema = str(data.get("schema", "")) if isinstance(data, dict) else ""
    if schema.startswith("autoprec/plan@"):
        return schema, Plan.from_json(data, what=f"plan {path}")
    if schema.startswith("autoprec/recommendation@"):
        return schema, Plan.from_json(data.get("plan"), what=f"the plan of {path}")
    if schema == "autoprec/search@1":
        return schema, from_json(SearchResult, data, what=f"result {path}", error=StudyError)
    raise PlanError(
        f"{path} is neither a plan nor a result: its schema is {schema or 'missing'!r}. Give a plan.json "
        "(schema 'autoprec/plan@1'), a result.json ('autoprec/search@1'), or a run folder."
    )
