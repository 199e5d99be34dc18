"""What commands and runs say, in Chinese: English sentences of ours are recognized by their wording.

A reply to a command, a problem of a setting, a row the data doctor left out: they come out of files and of processes
as English text, perhaps of another version. `translations/sentences.zh.json` has the usual ones with their places, as
`"{name} is paused already"`; what is not recognized stays as the command said it, and the page says that it is that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

_FILE = Path(__file__).parent / "translations" / "sentences.zh.json"
_PLACE = re.compile(r"\{(\w+)\}")
_NUMBERS = ("number", "all", "step", "tokens", "line", "column", "other")
_DEEPEST = 6
_MOST_LINES, _LONGEST = 100, 1000
"""Beyond these it is no sentence of ours but the output of something."""
_ROW = re.compile(r"\brow (\d+)")
_NO_SENTENCE = re.compile(r"[^\s:]{1,200}|.{1,200}\.\w{1,8}")
"""A setting, a file: what stands before a colon and is the same in every language."""


@dataclass(frozen=True)
class _Pattern:
    expression: re.Pattern[str]
    chinese: str


def in_chinese(english: str) -> str | None:
    """The text in Chinese, line by line; None if a line of it is not known."""
    parts = english.split("\n", _MOST_LINES)
    if len(parts) > _MOST_LINES:
        return None
    lines = [_line(line) for line in parts]
    return None if None in lines else "\n".join(line for line in lines if line is not None)


def known() -> dict[str, str]:
    """`{English: Chinese}`, with `{name}` for what differs. What is named `sentence...` is a sentence itself, `any...`
    may be one, `rows...` names rows, and those in `_NUMBERS` are numbers."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def _line(line: str) -> str | None:
    text = line.strip().removeprefix("- ")
    if not text:
        return line
    found = _sentence(text) if len(text) <= _LONGEST else None
    return None if found is None else line.replace(text, found)


@lru_cache(maxsize=2000)
def _sentence(text: str, depth: int = 0) -> str | None:
    if depth > _DEEPEST:
        return None
    whole, tails = _patterns()
    for found in _matches(whole, text, depth):
        return found
    behind = _behind_a_colon(text, depth)
    if behind is not None:
        return behind
    for pattern in tails:
        match = pattern.expression.search(text)
        if match is not None and (head := _head(text[: match.start()], depth)) is not None:
            return head + _filled(pattern.chinese, match.groupdict())
    return None


def _matches(patterns: list[_Pattern], text: str, depth: int) -> Iterator[str]:
    for pattern in patterns:
        match = pattern.expression.fullmatch(text)
        if match is None:
            continue
        values = {name: _value(name, value, depth) for name, value in match.groupdict().items()}
        if None not in values.values():
            yield _filled(pattern.chinese, values)


def _value(name: str, value: str, depth: int) -> str | None:
    if name.startswith("sentence"):
        return _sentence(value, depth + 1)
    if name.startswith("any"):
        return _sentence(value, depth + 1) or value
    return _ROW.sub(r"第 \1 行", value) if name.startswith("rows") else value


def _filled(chinese: str, values: Mapping[str, str | None]) -> str:
    """Not by `format`: sentences have braces of their own, as `{rank: 32}`."""
    return _PLACE.sub(lambda place: values[place[1]] or "", chinese)


def _behind_a_colon(text: str, depth: int) -> str | None:
    """`adapter.rank: expected a whole number` and `rows.json: 1 row left out`."""
    head, colon, rest = text.partition(": ")
    if not colon:
        return None
    before = _head(head, depth)
    behind = _sentence(rest, depth + 1)
    return None if before is None or behind is None else f"{before}：{behind}"


def _head(text: str, depth: int) -> str | None:
    """A name as it is, a sentence in Chinese."""
    return text if _NO_SENTENCE.fullmatch(text) else _sentence(text, depth + 1)


@cache
def _patterns() -> tuple[list[_Pattern], list[_Pattern]]:
    """Whole sentences, and what may stand behind one; those with the most wording first, as they say more."""
    whole, tails = [], []
    for english in sorted(known(), key=lambda text: -len(_PLACE.sub("", text))):
        parts = _PLACE.split(english)
        expression = "".join(
            _group(part, first=place == 1 and not parts[0]) if place % 2 else re.escape(part)
            for place, part in enumerate(parts)
        )
        tail = english.startswith(";")
        compiled = re.compile(expression + ("$" if tail else ""))
        (tails if tail else whole).append(_Pattern(compiled, known()[english]))
    return whole, tails


def _group(name: str, *, first: bool) -> str:
    """At the beginning nothing with a colon: what stands before one is not of the sentence."""
    if name in _NUMBERS:
        return rf"(?P<{name}>[\d.,]+)"
    if name == "job":
        return r"(?P<job>[^\s:]+)"
    return rf"(?P<{name}>(?:(?!: ).)+?)" if first else f"(?P<{name}>.+?)"
