"""The distribution is called lowrank-llm (`lowrank` on the package index is a stranger's), and has one version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent.parent
WRONG = re.compile(r"""pip install (?:-U |--upgrade )?['"]?lowrank(?![\w-])""")


def test_no_sentence_installs_a_strangers_package() -> None:
    pages = [
        path
        for pattern in ("*.md", "docs/*.md", "lowrank/**/*.py", "examples/**/*.py", "tests/**/*.py", "pyproject.toml")
        for path in ROOT.glob(pattern)
        if path.name not in ("log.md", Path(__file__).name)
    ]
    assert len(pages) > 100
    assert [str(path.relative_to(ROOT)) for path in pages if WRONG.search(path.read_text("utf-8"))] == []


def test_the_version_is_written_once() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert not re.search(r"^version\s*=\s*\"", text, re.MULTILINE)
    assert 'version = { attr = "lowrank.__version__" }' in text


@pytest.mark.parametrize("line", ["graft tests", "graft docs", "graft examples"])
def test_the_source_archive_holds_what_one_needs_to_go_on(line: str) -> None:
    assert line in (ROOT / "MANIFEST.in").read_text("utf-8").splitlines()
    assert (ROOT / "lowrank" / "py.typed").exists()


def test_the_workflow_installs_what_the_browser_tests_need() -> None:
    """They fail under CI=true, which GitHub sets, where there is no Chromium; `.ci/run` installs one as well."""
    text = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    before, _, _ = text.partition("- run: make test")
    assert "playwright install --with-deps chromium" in before
    assert "/usr/local/bin/chromium" in before
    assert "fonts-wqy-microhei" in before
