"""LLaMA-Factory's flags as `key=value` words: `--stage sft --do_train` -> `stage=sft do_train=true`.

They are read as `transformers.HfArgumentParser` reads them there: `--key value`, `--key=value`, several values, a
switch alone is true, `--no_key` is false, and `-` may stand for `_`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

MARK = "model_name_or_path"
"""The flag that all of its command lines have."""

_NUMBER = re.compile(r"-\.?\d")


def has_flags(words: Sequence[str]) -> bool:
    """Whether these words are its flags rather than ours."""
    return any(_name(word) == MARK for word in words)


def split_flags(words: Sequence[str], keys: Collection[str]) -> tuple[list[str], list[str]]:
    """`(key=value words, what is none of its flags)`, for flags whose names are among `keys`."""
    found: list[str] = []
    others: list[str] = []
    place = 0
    while place < len(words):
        word, place = words[place], place + 1
        name = _name(word)
        key = name if name in keys else name.removeprefix("no_")
        if not name or key not in keys:
            others.append(word)
            continue
        if "=" in word:
            found.append(f"{key}={word.partition('=')[2]}")
            continue
        values = []
        while place < len(words) and _is_value(words[place]):
            values.append(words[place])
            place += 1
        if key != name:
            values = ["false"]
        found.append(f"{key}={','.join(values) if values else 'true'}")
    return found, others


def _name(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _is_value(word: str) -> bool:
    return not word.startswith("-") or bool(_NUMBER.match(word)) or word == "-"
