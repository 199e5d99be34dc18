"""The founding notebook in examples/: every cell runs, and those under `if False` reach a stand-in of the hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.hub_stand_in import hub_stand_in

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples/unsloth_alpaca.ipynb"


def test_the_notebook_was_executed_and_holds_no_error() -> None:
    cells = [each for each in nbformat.read(NOTEBOOK, as_version=4).cells if each.cell_type == "code"]
    assert len(cells) > 12
    counts = [each.execution_count for each in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [each for cell in cells for each in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error"]
    text = "".join(str(each.get("text", "") or each.get("data", "")) for each in outputs)
    assert "tokenizer is processing_class in this release" in text
    assert "model-Q4_K_M.gguf" in text


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands under `if False` too, with a token of the stand-in."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("if False:", "if True:").replace('token=""', 'token="hf_secret"')
            cell.source = cell.source.replace("max_steps=30", "max_steps=3")
    shutil.copytree(ROOT / "examples/data", tmp_path / "data")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with hub_stand_in() as (kind, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        nbclient.NotebookClient(
            book, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        assert {"your_name/lora_model", "your_name/model"} == kind.repositories.keys()
        uploaded = set(kind.repositories["your_name/model"])
    assert {"model.safetensors", "adapter_model.safetensors", "model-Q8_0.gguf", "model-F16.gguf"} <= uploaded
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "model-Q8_0.gguf", "model-F16.gguf", "model-Q4_K_M.gguf"} <= written
    assert "HF_TOKEN" not in os.environ
