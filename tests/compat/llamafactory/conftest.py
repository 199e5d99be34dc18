"""The folder in which LLaMA-Factory files are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compat.llamafactory.files import INFO


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as LLaMA-Factory's repository, which is the current directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("identity.json", "alpaca_en_demo.json", "c4_demo.jsonl"):
        (tmp_path / "data" / name).write_text("[]")
    (tmp_path / "examples" / "train_lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
