"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowrank
from lowrank.api.page import api_page


def test_the_page_is_current_and_names_everything() -> None:
    page = api_page()
    file = Path(__file__).parents[2] / "docs" / "api.md"
    assert file.read_text(encoding="utf-8") == page, "python -m lowrank.api.page > docs/api.md"
    assert all(f"### lowrank.{name}" in page for name in lowrank.__all__ if name != "__version__")


@pytest.mark.slow  # twelve seconds: two runs, two exports
def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, own = re.findall(r"^```python\n(.*?)^```", api_page(), re.MULTILINE | re.DOTALL)
    for number, code in enumerate((first.replace("=20", "=1").replace("=40", "=2"), own)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(compile(code, f"docs/api.md, block {number}", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "0/runs/first/default/last").is_dir()
    assert (tmp_path / "1/merged-model").is_dir()
    losses = lowrank.TrainedRun(tmp_path / "1/runs/own").metrics()
    assert set(losses.job) == {"focal", "grpo"}
