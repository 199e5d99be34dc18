"""Finds the keys of a row that no reader used, by recording which keys are read.

A format gets its row as a `KeyTrackingDict`. Reading a key (`row["x"]`, `row.get("x")`) takes it; the doctor names what
was never taken. A mapping inside that nobody opened but somebody took (tool schemas, arguments of a call) was
handed on whole, and counts as read with all that is in it. So a reader has nothing to register: it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank.data.formats.columns import RowProblem
from lowrank.foreign_files import DEEPEST_JSON

_DEEPEST_LIST = 3
"""Lists of lists beyond this depth are handed on as they are."""
_LONGEST_NAME = 80
_PROVENANCE = re.compile(
    r"(.*[_.-])?(id|ids|idx|index|uid|uuid|guid|hash|md5|sha1|sha256)|.*Id|__index_level_\d+__|Unnamed: \d+|"
    r"source|sources|src|dataset|data_source|origin|url|license|lang|language|split|date|timestamp|created_at|updated_at",
    re.IGNORECASE,
)


class KeyTrackingDict(dict[str, Any]):
    """A mapping that knows which of its keys were read. Mappings in it, also those in lists, are watched as well.

    Asking what keys there are (`in`, `keys()`, iteration) reads nothing; `items()`, `values()`, `dict(...)` and
    `json.dumps` read all. Otherwise it is the dict it was made from.
    """

    __slots__ = ("taken",)

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = watched = super().__getitem__(key)
        if isinstance(value, (dict, list)) and key not in self.taken:
            watched = _watched(value)
            super().__setitem__(key, watched)
        self.taken.add(key)
        return watched

    def get(self, key: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[key] if key in self else default  # noqa: SIM401 (it would call itself)

    def pop(self, key: str, *default: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if key in self:
            self[key]
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:  # that it is overridden sends dict(...) and ** through keys and __getitem__
        return super().__iter__()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


def _watched(value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict):
        return value if isinstance(value, KeyTrackingDict) else KeyTrackingDict(value)
    if isinstance(value, list) and depth < _DEEPEST_LIST:
        return [_watched(item, depth + 1) for item in value]
    return value


def whole(value: Any, depth: int = 0) -> Any:
    """The same as plain dicts and lists, all of it read: for what is handed on as it stands. RowProblem for what is
    nested too deep for anybody to write it down again."""
    if depth > DEEPEST_JSON:
        raise RowProblem(f"nested too deep: more than {DEEPEST_JSON} lists and objects within one another")
    if isinstance(value, dict):
        plain = {key: whole(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, KeyTrackingDict):
            value.taken.update(value)
            for key, item in plain.items():
                dict.__setitem__(value, key, item)
        return plain
    return [whole(item, depth + 1) for item in value] if isinstance(value, list) else value


def peek(row: Mapping[str, Any], key: str) -> Any:
    """The value, None if there is none, without reading it."""
    return dict.get(row, key) if isinstance(row, dict) else row.get(key)


def unread(row: KeyTrackingDict) -> list[str]:
    """The keys nobody read, each once: `score`, and for turns `messages[].loss`. Empty values are not missed."""
    return list(dict.fromkeys(_unread(row, "")))


def _unread(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _unread(item, f"{path}[]")
    elif isinstance(value, KeyTrackingDict) and value.taken:
        for key, item in dict.items(value):
            name = f"{path}.{_shown(key)}" if path else _shown(key)
            if key in value.taken:
                yield from _unread(item, name)
            elif item is not None and item not in ("", [], {}):
                yield name


def _shown(key: Any) -> str:
    """A key as it can be printed."""
    name = key if isinstance(key, str) else repr(key)
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."


def is_provenance(name: str) -> bool:
    """Whether a column by its name says where a row is from (`id`, `source`, `url`), not what is to be learned."""
    return _PROVENANCE.fullmatch(name) is not None
