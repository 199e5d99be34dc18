"""Keys of nested settings in one text, as the command line takes them: `adapter.rank=8`, and in quotes a key that has
dots of its own, `adapter.rank_pattern."layers.0.self_attn.q_proj"=4`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


def flat_settings(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `(key, value)` of the words that `override` reads: `("adapter.rank", 8)`."""
    for key, value in settings.items():
        own = str(key)
        path = f"{above}{own if _PLAIN_KEY.fullmatch(own) else json.dumps(own, ensure_ascii=False)}"
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{path}.")
        else:
            yield path, value


_PLAIN_KEY = re.compile(r"""[^\s."'=][^.=]*""")


def split_override(entry: str) -> tuple[list[str], str | None]:
    """`a."b.c"=value` as `["a", "b.c"]` and `value`; None for the value where there is none."""
    keys, rest = [], entry
    while True:
        key, after = _first_key(rest)
        keys.append(key)
        if after.startswith("."):
            rest = after[1:]
            continue
        return keys, after[1:] if after else None


def _first_key(text: str) -> tuple[str, str]:
    """The first key of `text`, and what follows it: nothing, or a text that begins with a dot or an equals sign."""
    if text.startswith('"'):
        try:
            key, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            key, end = "", 0
        if end and text[end : end + 1] in ("", ".", "="):
            return str(key), text[end:]
    end = next((place for place, letter in enumerate(text) if letter in ".="), len(text))
    return text[:end], text[end:]
