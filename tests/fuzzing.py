"""Values and bytes that go wrong: what is valid, with a part exchanged, left out, doubled, nested or cut off.

Deterministic by their seed, so that what was found can be looked at again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, -(1 << 70), 0.0, -0.5, 1e308, float("inf"), float("nan"),
    "", " ", "a", "0", "nan", "[]", "{}", "null", "../..", "/dev/zero", "a:b", "my:Thing",
    "\0", "\ud83d", "\u202e", "\x1b[2J", "<|im_end|>",
    "é" * 300, "a" * 5000, [], [[]], [None], [1, "a", None], {}, {"": ""}, {"a": {"a": {"a": []}}}, {"type": None},
    [{"role": "user"}], [{"role": "assistant", "content": None}], [{"from": "human", "value": 3}],
)  # fmt: skip


def deep(levels: int) -> Any:
    value: Any = []
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


def mutated(value: Any, draw: random.Random, times: int = 2) -> Any:
    """A copy of `value` (of JSON's types) that differs in some places."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, times)):
        value = _changed(value, draw)
    return value


def _changed(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(STRANGE)
    holder, key = draw.choice(places)
    how = draw.randrange(7)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(("a", "", "type", "role", "content", "path", "\0", "é" * 300))] = holder.pop(key)
    elif how == 2 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * draw.choice((1, 3, 50))
    elif how == 3:
        holder[key] = [holder[key]]
    elif how == 4:
        holder[key] = {"a": holder[key]}
    elif how == 5 and draw.random() < 0.1:
        holder[key] = deep(draw.choice((20, 200, 3000)))
    else:
        holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return value


def _places(value: Any) -> Any:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            for key, inner in each.items() if isinstance(each, Mapping) else enumerate(each):
                yield each, key
                waiting.append(inner)


def mutated_bytes(raw: bytes, draw: random.Random, times: int = 4) -> bytes:
    """A copy with bits turned, parts cut out, doubled, or replaced by large numbers."""
    content = bytearray(raw)
    for _ in range(draw.randint(1, times)):
        at = draw.randrange(len(content) + 1)
        how = draw.randrange(6)
        if how == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif how == 1:
            del content[at : at + draw.choice((1, 4, 8, 100))]
        elif how == 2:
            content[at:at] = content[max(0, at - 40) : at]
        elif how == 3:
            content[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")))
        elif how == 4:
            del content[at:]
        else:
            content[at:at] = draw.choice(
                (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{" * 300, b"- " * 300, b"&a [*a]", b"\n", b"\t")
            )
    return bytes(content)
