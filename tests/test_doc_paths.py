"""Files that pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent.parent
PAGES = [*(ROOT / "docs" / "decisions").glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
OF_OTHERS = {"llamafactory.md", "comparison.md", "unsloth.md", "log.md"}
"""Pages that name files of other programs, and the log, whose entries are of their day."""
NAMED = re.compile(r"(was )?`?(?<![\w./-])([\w-]+(?:/[\w.-]+)+\.(?:py|md|c|jinja|ipynb))(?![\w/])")
"""A path with a folder in it; `was x/y.py` is one of the past."""


FOLDERS = ("benchmarks", "docs", "examples", "lowrank", "tests")
ENDS = {
    "/".join(path.relative_to(ROOT).parts[first:])
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.*")
    for first in range(len(path.relative_to(ROOT).parts) - 1)
}
"""`tests/models/test_x.py`, `models/test_x.py`: each file from each of the folders above it."""


def missing(text: str) -> list[str]:
    """Paths that no file of the repository ends in."""
    return [path for was, path in NAMED.findall(text) if not was and path.removeprefix("../") not in ENDS]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OF_OTHERS], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert missing(page.read_text("utf-8")) == []


def test_only_paths_of_today_are_looked_for() -> None:
    assert missing("`models/lean.py`, train/loop.py") == ["models/lean.py"]
    assert missing("models/checkpointing/memory_efficient_modules.py (was `models/lean.py`)") == []
