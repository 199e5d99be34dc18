"""A record as one text: what the examples in the formats' docstrings print."""

from __future__ import annotations

from lowrank.data.formats.turns import pieces
from lowrank.records import Record


def transcript(record: Record) -> str:
    """`pieces` as one text."""
    return "".join(text for text, _ in pieces(record))
