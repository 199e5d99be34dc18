"""How a table of text is written: what stands between its cells, found out from its first rows."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from lowrank.data.formats.columns import COLUMNS

SAMPLE = 64 << 10
"""Characters that are looked at."""
_MARKS = (",", ";", "\t", "|")
_NAMED = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
"""Excel's first line, which names the mark."""


@dataclass(frozen=True)
class Dialect:
    """`mark` stands between cells; `skipped` characters come before the header line."""

    mark: str
    skipped: int = 0


def dialect_of(sample: str, whole: bool, usual: str = ",") -> Dialect:
    """The dialect of a table that begins with `sample`; `whole` says that this is all of it; `usual` is for
    tables of one column.

    The mark is the one that cuts most of the first rows into as many cells as the header has, at least two, with
    quotes understood; among equals, the one that gives names we know, then the one that gives more cells.
    """
    named = _NAMED.match(sample)
    if named:
        return Dialect(named.group(1), named.end())
    scores = {mark: _score(sample, mark, whole) for mark in _MARKS}
    best = max(_MARKS, key=lambda mark: scores[mark])
    return Dialect(best if scores[best][0] else usual)


def _score(sample: str, mark: str, whole: bool) -> tuple[float, bool, int]:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=mark, strict=True):
            rows.append(row)
    except csv.Error:
        whole = True  # what came before the mistake counts
    if not whole and len(rows) > 1:
        rows.pop()  # it may be cut
    rows = [row for row in rows if row]
    if not rows or len(rows[0]) < 2:
        return 0.0, False, 0
    header = len(rows[0])
    known = {name for names in COLUMNS.values() for name in names}
    even = sum(len(row) == header for row in rows) / len(rows)
    return round(even, 1), any(name.strip() in known for name in rows[0]), header
