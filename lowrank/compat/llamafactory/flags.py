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


def has_flags(arguments: Sequence[str]) -> bool:
    """Whether these words are its flags rather than ours."""
    return any(_name(argument) == MARK for argument in arguments)


def split_flags(arguments: Sequence[str], keys: Collection[str]) -> tuple[list[str], list[str]]:
    """`(key=value words, what is none of its flags)`, for flags whose names are among `keys`."""
    found: list[str] = []
    others: list[str] = []
    place = 0
    while place < len(arguments):
        argument, place = arguments[place], place + 1
        name = _name(argument)
        key = name if name in keys else name.removeprefix("no_")
        if not name or key not in keys:
            others.append(argument)
            continue
        if "=" in argument:
            found.append(f"{key}={argument.partition('=')[2]}")
            continue
        values = []
        while place < len(arguments) and _is_value(arguments[place]):
            values.append(arguments[place])
            place += 1
        if key != name:
            values = ["false"]
        found.append(f"{key}={','.join(values) if values else 'true'}")
    return found, others


def _name(argument: str) -> str:
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else ""


def _is_value(argument: str) -> bool:
    return not argument.startswith("-") or bool(_NUMBER.match(argument)) or argument == "-"
