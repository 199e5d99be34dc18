"""Taking the parts of a record out of a row's columns, and saying what is wrong with a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowrank.errors import DataError, did_you_mean, near, raise_all

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "prompt"),
    "query": ("input",),
    "response": ("output",),
    "history": ("history",),
    "messages": ("conversations", "messages"),
    "system": ("system",),
    "tools": ("tools", "functions", "tool_defs"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("kto_tag", "label"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
    "text": ("text",),
    "completion": ("completion",),
}
"""Each part a column can play (names as in LLaMA-Factory's dataset_info.json; `text` and `completion` are ours)
and the columns that play it when the settings say nothing."""

TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
"""The tags that can be renamed, as in dataset_info.json."""


class RowProblem(ValueError):
    """A row that cannot be used. Written `kind: detail`; rows are counted by kind."""


def kind_of(problem: str) -> str:
    """`"wrong role order"` of `"wrong role order: turn 2 is ..."`."""
    return problem.split(":", 1)[0]


def check_mapping(dataset: str, columns: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Raise DataError for parts and tags that do not exist."""
    problems = [f"columns.{part}: no such part{did_you_mean(part, COLUMNS)}" for part in columns if part not in COLUMNS]
    problems += [f"tags.{tag}: no such tag{did_you_mean(tag, TAGS)}" for tag in tags if tag not in TAGS]
    raise_all(DataError, f"{dataset}: the mapping of its columns is wrong", problems)


def column_for(part: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The row's column that plays `part`: the mapped one, else the first usual one that is there."""
    if part in columns:
        return columns[part] if columns[part] in row else None
    return next((name for name in COLUMNS[part] if name in row), None)


def optional(part: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """What stands in the column for `part`; None if there is no such column and none was mapped.

    Raises RowProblem if a mapped column is missing.
    """
    name = column_for(part, row, columns)
    if name is None and columns.get(part):
        raise missing(part, row, columns)
    return None if name is None else row[name]


def required(part: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Like `optional`, but a missing column or a null is a RowProblem."""
    name = column_for(part, row, columns)
    if name is None:
        raise missing(part, row, columns)
    if row[name] is None:
        raise RowProblem(f"empty {part}: column {name!r} is null")
    return row[name]


def missing(part: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> RowProblem:
    """The RowProblem for a column that is not there, with those that are."""
    wanted = columns.get(part) or " or ".join(repr(name) for name in COLUMNS[part])
    there = ", ".join(repr(name) for name in row) or "none"
    close = near(columns.get(part) or COLUMNS[part][0], row)
    hint = f"; did you mean {close!r}?" if close else "; map yours with `columns`"
    return RowProblem(f"missing column {wanted} (for {part}): the row has {there}{hint}")


def text_at(part: str, row: Mapping[str, Any], columns: Mapping[str, str], *, needed: bool = True) -> str:
    """The text in the column for `part`; "" for none where it is not `needed`. RowProblem for anything else."""
    value = (required if needed else optional)(part, row, columns)
    if value is None or isinstance(value, str):
        return value or ""
    ways_out: dict[type, str] = {
        list: "make a row of each, or join them to one text",
        dict: "write it as text, or map another column with `columns`",
    }
    usual = "put quotation marks around it in the file"
    way_out = next((hint for kind, hint in ways_out.items() if isinstance(value, kind)), usual)
    name = column_for(part, row, columns)
    raise RowProblem(f"wrong type for {part}: expected text, got {describe(value)} in column {name!r}; {way_out}")


def text_of(value: Any, part: str) -> str:
    """A text, or nothing for null; anything else is a RowProblem."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowProblem(f"wrong type for {part}: expected text, got {describe(value)}")
    return value


def list_of(value: Any, part: str) -> list[Any]:
    """A list, written as such or as JSON in a text; null and empty text are the empty list."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowProblem(f"wrong type for {part}: expected a list, got text that is not JSON ({error})") from error
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise RowProblem(f"wrong type for {part}: expected a list, got {describe(value)}")
    return list(value)


def describe(value: Any) -> str:
    """A value for an error message: its JSON type and its beginning."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = next((noun for kind, noun in names.items() if isinstance(value, kind)), type(value).__name__)
    return "null" if value is None else f"{name} ({beginning(value)})"


def beginning(value: Any, most: int = 40) -> str:
    """Of a value as Python writes it, however deep it is."""
    try:
        shown = repr(value)
    except RecursionError:
        return "nested too deep to be shown"
    return f"{shown[:most]}{'...' if len(shown) > most else ''}"
