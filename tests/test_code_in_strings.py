"""Programs that tests and benchmarks hold as text, for processes of their own: what they import is there.

Most of them are run by `make test-slow` or by hand, where a renamed class goes unnoticed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_IMPORT = re.compile(r"^[ \t]*from (lowrank[\w.]*|tests[\w.]*|benchmarks[\w.]*) import ([\w, ]+)$", re.MULTILINE)
_STARTS = re.compile(r"[\"']-c[\"']|\bexec\(")
FILES = [
    path
    for folder in ("tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if _STARTS.search(path.read_text("utf-8")) and path.name != "test_page.py"  # it tests such a test
]


def imports_in_strings(text: str) -> list[tuple[str, str]]:
    """(module, name) of each import of ours within a string."""
    strings = [each.value for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Constant)]
    return [
        (module, name.split(" as ")[0].strip())
        for string in strings
        if isinstance(string, str)
        for module, names in _IMPORT.findall(string)
        for name in names.split(",")
    ]


def is_there(module: str, name: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    found = importlib.import_module(module)
    if hasattr(found, name):
        return True
    return hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None


def test_they_are_found() -> None:
    assert imports_in_strings('CODE = """\nfrom lowrank.x import A as B, C\n"""') == [
        ("lowrank.x", "A"),
        ("lowrank.x", "C"),
    ]
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_they_import_is_there(path: Path) -> None:
    found = imports_in_strings(path.read_text("utf-8"))
    assert [f"from {module} import {name}" for module, name in found if not is_there(module, name)] == []
