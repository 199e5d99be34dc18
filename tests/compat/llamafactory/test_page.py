"""docs/llamafactory.md is written from the tables."""

from __future__ import annotations

from pathlib import Path

import lowrank
from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.other_keys import NO_EFFECT, REFUSED, known
from lowrank.compat.llamafactory.page import llamafactory_page

PAGE = Path(lowrank.__file__).parent.parent / "docs" / "llamafactory.md"


def test_the_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == llamafactory_page(), "python -m lowrank.compat.llamafactory.page > docs/llamafactory.md"


def test_every_key_stands_on_the_page() -> None:
    page = llamafactory_page()
    assert [key for key in known() if f"`{key}`" not in page] == []


def test_every_field_of_their_arguments_is_honored_warned_of_or_refused_with_a_sentence() -> None:
    """The fields of LLaMA-Factory 0.9.6 (2026-08-18), with the transformers arguments that it inherits."""
    fields = (Path(__file__).parent / "fields.txt").read_text("utf-8").split()
    assert len(fields) == 386
    descriptions = {name: field.description or "" for name, field in Keys.model_fields.items()}
    descriptions |= {key: group.why for group in (*NO_EFFECT, *REFUSED) for key in group.keys}
    assert [name for name in fields if len(descriptions.get(name, "").strip()) < 4] == []
