"""Whoever searches for a term of this field finds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowrank
from lowrank.renamed import RENAMED, RENAMED_OPTIONS

ROOT = Path(lowrank.__file__).parent.parent
GLOSSARY = (ROOT / "docs/glossary.md").read_text("utf-8")
ROWS = re.findall(r"^\| \*\*(.+?)\*\* \| (.*?) \| .* \|$", GLOSSARY, re.MULTILINE)
TERMS = sorted({term.strip(" `") for name, others in ROWS for term in [name, *others.split(",")]} - {""})


def _text() -> str:
    pages = [
        *ROOT.glob("lowrank/**/*.py"),
        *(path for path in ROOT.glob("docs/*.md") if path.name not in ("log.md", "glossary.md")),
        ROOT / "README.md",
    ]
    return " ".join(re.sub(r"\s+", " ", path.read_text("utf-8")).lower() for path in pages)


TEXT = _text()


def test_there_are_terms() -> None:
    assert len(ROWS) > 30
    assert len(TERMS) > 60


@pytest.mark.parametrize("term", TERMS)
def test_the_term_is_found(term: str) -> None:
    assert term.lower() in TEXT


@pytest.mark.parametrize(
    "term",
    [
        "KV cache", "prefix caching", "gradient accumulation", "activation checkpointing", "loss mask", "dataloader",
        "continuous batching", "preempt", "micro-batch", "cross-entropy", "LoRA backward", "paged attention",
    ],
)  # fmt: skip
def test_the_term_is_found_in_the_code_itself(term: str) -> None:
    code = " ".join(path.read_text("utf-8").lower() for path in ROOT.glob("lowrank/**/*.py"))
    assert re.sub(r"\s+", " ", term.lower()) in code


def test_settings_with_other_names_are_all_there() -> None:
    options = {
        f"{command} --{old.replace('_', '-')}": f"{command} --{new.replace('_', '-')}"
        for command, own in RENAMED_OPTIONS.items()
        for old, new in own.items()
    }
    assert dict(re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", GLOSSARY, re.MULTILINE)) == RENAMED | options
