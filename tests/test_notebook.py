"""The example notebook runs from its first cell to its last, and its records show themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

nbclient = pytest.importorskip("nbclient", reason="pip install 'autoprec[nightly]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'autoprec[nightly]'")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "search_demo.ipynb"


def test_the_example_notebook_runs(tmp_path: Path) -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs are not kept in the repository"
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    shown = {
        cell.source.splitlines()[-1]: output.data
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    }
    assert all("ap piece" in shown[name]["text/html"] for name in ("advice", "result", "plan"))
    assert shown["report.disagreements"]["text/plain"] == "()"
    assert list(tmp_path.glob("autoprec-runs/*/report.html"))
