"""Which format the first rows of a dataset have, by their columns; and which column is only called otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowrank.data.formats.built_in import built_in_formats, record_type
from lowrank.data.formats.columns import COLUMNS, column_for
from lowrank.data.sources.places import shown
from lowrank.errors import DataError, near
from lowrank.records import Conversation, Preference, Prompted, Rated, Text

Row = Mapping[str, Any]
Names = Mapping[str, str]

_OTHERS_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "problem", "user"),
    "response": ("answer", "response", "reply", "target", "solution", "assistant"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "chosen": ("chosen_response", "preferred", "winner", "accepted"),
    "rejected": ("rejected_response", "dispreferred", "loser"),
    "kto_tag": ("desirable", "is_good", "thumbs_up"),
    "text": ("content", "document", "body"),
}
"""What others call the columns: not read unasked, but recognized where a part is missing."""
_PARTS = {name: part for names in (_OTHERS_NAMES, COLUMNS) for part, each in names.items() for name in each}
_NEEDS: dict[type, tuple[str, ...]] = {
    Conversation: ("prompt", "response"),
    Preference: ("chosen", "rejected"),
    Rated: ("kto_tag",),
    Text: ("text",),
}
"""What makes a row one of its kind of record, where there is no list of turns."""


def recognize(rows: Sequence[Row], columns: Names | None = None, record: type | None = None) -> str:
    """The name of the format of the first rows; `record` is the kind that is wanted, where that is known.

    Raises DataError if a mapped column is in none of them, if none fits, with the column that was probably meant, or
    if rows differ in format.
    """
    columns = columns or {}
    _check_mapped(rows, columns)
    where: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        name = _shape(row, columns, record)
        if name is not None:
            where.setdefault(name, number)
    if len(where) > 1:
        where.pop("prompted", None)  # among answered rows, one without an answer is a row that lacks it
    if len(where) > 1:
        found = ", ".join(f"{name} (first in row {number})" for name, number in where.items())
        raise DataError(f"mixed schemas: {found}; keep one format per dataset, or set `format`")
    name = next(iter(where), None)
    if rows:
        _check_slips(rows[0], columns, name, record)
    if name is None:
        raise DataError(
            f"format not recognized from the columns {_there(rows[0]) if rows else 'no rows'}; set `format` (known: "
            f"{', '.join(built_in_formats())}) and `columns`, e.g. {{prompt: question, response: answer}}"
        )
    return name


def _there(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(repr(shown(name)) for name in every[:20]) + (", ..." if len(every) > 20 else "")


def _check_mapped(rows: Sequence[Row], columns: Names) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for part, column in columns.items():
        if rows and column and column not in names:
            close = near(column, names)
            hint = f"; did you mean {close!r}?" if close else ""
            raise DataError(f"columns.{part}: there is no column {column!r}, the rows have {_there(names)}{hint}")


def _check_slips(row: Row, columns: Names, found: str | None, record: type | None) -> None:
    """DataError if other names for columns that play no part would make the row what is wanted, and it is not now."""
    made = None if found is None else _record_of(found)
    if made is not None and (made is record or (record is None and made is not Prompted)):
        return
    if record is Prompted and made is not None:
        return
    free = {name: _meant(name) for name in row if name not in columns.values() and not _is_known(name)}
    meant = {name: part for name, part in free.items() if part and column_for(part, row, columns) is None}
    if record is None and made is Prompted:  # the answer under its usual name may be what a reward function looks at
        meant = {name: part for name, part in meant.items() if name not in _PARTS}
    renamed = {name: value for name, value in row.items() if name not in meant}
    for name, part in meant.items():
        renamed.setdefault(COLUMNS[part][0], row[name])
    then = _shape(renamed, columns, record) if meant else None
    if then is not None and then != found and (record is None or _record_of(then) is record):
        described = " and ".join(f"{name!r} for {COLUMNS[part][0]!r}" for name, part in meant.items())
        mapping = ", ".join(f"{part}: {name!r}" for name, part in meant.items())
        raise DataError(
            f"format not recognized from the columns {_there(row)}; set `format`, or map what plays no part yet: "
            f"`columns: {{{mapping}}}`; did you mean {described}?"
        )
    missing = [part for part in _NEEDS.get(record or Prompted, ()) if column_for(part, row, columns) is None]
    if missing and (made is None or made is Prompted or record is Rated):
        parts = " and ".join(f"{part} ({' or '.join(COLUMNS[part])})" for part in missing)
        raise DataError(f"no column plays the part {parts}: the rows have {_there(row)}; map yours with `columns`")


def _meant(name: str) -> str | None:
    """The part that a column of this name was probably to play."""
    if name in _PARTS:
        return _PARTS[name]
    close = near(name, _PARTS)
    return _PARTS[close] if close else None


def _is_known(name: str) -> bool:
    return any(name in names for names in COLUMNS.values())


def _record_of(name: str) -> type:
    return record_type(built_in_formats()[name])


def _shape(row: Row, columns: Names, record: type | None) -> str | None:
    """The format one row has, or None."""

    def has(part: str) -> bool:
        return column_for(part, row, columns) is not None

    if has("chosen") and has("rejected"):
        return "preference"
    turns = has("messages") and ("messages" in columns or not columns.get("response"))  # what is mapped is meant
    answered = turns or (has("prompt") and (has("completion") or has("response")))
    if answered and has("kto_tag") and ("kto_tag" in columns or record is Rated or _is_rating(row)):
        return "rated"
    if turns:
        written = row[column_for("messages", row, columns) or ""]
        first = written[0] if isinstance(written, (list, tuple)) and written else {}
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if has("prompt") and has("completion") and "response" not in columns:
        return "prompt_completion"
    if has("prompt") and has("response"):
        return "alpaca"
    if has("text") or ("prompt" in columns and has("prompt") and record in (None, Text)):
        return "text"
    return "prompted" if has("prompt") else None


def _is_rating(row: Row) -> bool:
    """Whether the row is rated: `kto_tag` says so by its name; `label` may be anything, so its value decides."""
    value = row.get("label")
    return (
        "kto_tag" in row or isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))
    )
