"""docs/llamafactory.md is written from the tables."""

from __future__ import annotations

from pathlib import Path

import lowrank
from lowrank.compat.llamafactory_others import known
from lowrank.compat.page import llamafactory_page

PAGE = Path(lowrank.__file__).parent.parent / "docs" / "llamafactory.md"


def test_the_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == llamafactory_page(), "python -m lowrank.compat.page > docs/llamafactory.md"


def test_every_key_stands_on_the_page() -> None:
    page = llamafactory_page()
    assert [key for key in known() if f"`{key}`" not in page] == []
