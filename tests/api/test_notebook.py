"""examples/quickstart.ipynb, as it lies there and executed by a real kernel: a live table, answers, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SHORTER = {"max_steps=15": "max_steps=3", "max_steps=40": "max_steps=4", "eval_steps=20": "eval_steps=2"}
SHORTER |= {"max_steps=50": "max_steps=6", "max_samples=20": "max_samples=4", "max_steps=5,": "max_steps=2,"}
SHORTER |= {'"batch_size": 8}': '"batch_size": 8, "max_samples": 32}'}


def code_cells(notebook: Any) -> list[Any]:
    return [each for each in notebook.cells if each.cell_type == "code"]


def shown(cell: Any, kind: str) -> str:
    """What a cell put out, as text or HTML."""
    return "".join(each.data.get(kind, "") for each in cell.outputs if "data" in each)


def test_the_notebook_was_executed_and_shows_no_error() -> None:
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [each.execution_count for each in cells] == list(range(1, len(cells) + 1))
    assert not [each for cell in cells for each in cell.outputs if each.output_type == "error"]
    texts = "".join(shown(cell, "text/plain") for cell in cells)
    assert "(True, True)" in texts  # the merged model is what was trained


def test_it_imports_nothing_of_ours_but_the_front_door() -> None:
    sources = "\n".join(each.source for each in code_cells(nbformat.read(NOTEBOOK, as_version=4)))
    assert "import lowrank" in sources
    assert "from lowrank" not in sources
    assert "import lowrank." not in sources


@pytest.mark.filterwarnings("default")  # of the kernel's own libraries
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        for was, shorter in SHORTER.items():
            cell.source = cell.source.replace(was, shorter)
    sources = "\n".join(cell.source for cell in code_cells(notebook))
    assert [shorter for shorter in SHORTER.values() if shorter not in sources] == [], "the notebook says it otherwise"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    trained = [cell for cell in code_cells(notebook) if "jobs=[" in cell.source]
    views = [each for each in trained[0].outputs if each.output_type == "display_data"]
    assert len(views) == 1, "one view, written anew, not a page of them"
    assert "loading lowrank/tiny" in views[0].data["text/html"]
    assert "<table" in views[0].data["text/html"]
    assert "<svg" in views[0].data["text/html"]
    assert views[0].data["text/html"].count("<polyline") == 2, "a curve for each job"
    exported = [shown(cell, "text/plain") for cell in code_cells(notebook) if "run.export" in cell.source]
    assert exported[0].endswith("(True, True)")
