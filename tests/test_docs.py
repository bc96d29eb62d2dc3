"""The Python in docs/ runs as it stands; recipes for clusters are whole, and their commands take their options."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoprec.cli import search
from autoprec.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    pytest.param(code, id=f"{path.name}-{index}")
    for path in sorted(DOCS.glob("*.md"))
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_in_docs_runs(code: str) -> None:
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


# recipes

MACHINES = (DOCS / "machines.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", MACHINES, re.DOTALL)
OBJECTS = [one for text in re.findall(r"```yaml\n(.*?)```", MACHINES, re.DOTALL) for one in yaml.safe_load_all(text)]


def assert_searches(words: list[str]) -> None:
    """Assert that `autoprec search` takes these options, and that each search has a place of its own to join from."""
    assert words[:2] == ["autoprec", "search"]
    parent = main.make_context("autoprec", words[1:])  # without it the command would keep other names of its --help
    given = search.command.make_context("search", words[2:], parent=parent).params
    assert given["storage"].startswith("postgresql://") and given["resume"] and given["out"] and given["model"]


def test_scripts_for_machines_can_be_read_by_a_shell() -> None:
    searches = 0
    for script in SCRIPTS:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for line in script.replace("\\\n", " ").splitlines():
            found = re.search(r"autoprec search [^&]*", line)
            if found:
                searches += 1
                assert_searches(shlex.split(found[0]))
    assert searches == 3


def test_objects_of_kubernetes_fit_each_other() -> None:
    by_kind: dict[str, Any] = {one["kind"]: one for one in OBJECTS}
    assert by_kind.keys() == {"Job", "Service", "StatefulSet"} and len(OBJECTS) == 3
    (container,) = by_kind["Job"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert_searches(words)
    assert {"INDEX", "PGPASSWORD"} == {one["name"] for one in container["env"]} and "/runs/$(INDEX)" in words
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    service, database = by_kind["Service"], by_kind["StatefulSet"]
    assert f"@{service['metadata']['name']}/" in words[-1]
    assert service["spec"]["selector"] == database["spec"]["template"]["metadata"]["labels"]
    (port,) = database["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert port["containerPort"] == service["spec"]["ports"][0]["port"]
