"""Chat templates that read a turn's content as a list of parts, and lose one that is plain text.

Those of models that see pictures are often written so (`{% for part in message['content'] %}`), and Jinja passes over
the characters of a text without an error. Which kind a template is, it is tried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from lowrank.errors import LowrankError
from lowrank.records import Message

_PROBE = "Pq7zprobe"
Turns = list[dict[str, Any]]


def in_parts(messages: Sequence[dict[str, Any]]) -> Turns:
    """The same turns, their texts as lists of one part."""
    return [{**each, "content": _parts(each["content"])} if "content" in each else each for each in messages]


def parts_of(message: Message) -> list[dict[str, Any]]:
    """The content of a turn with media, as the chat templates of models that take them read it."""
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(message.texts):
        parts += [{"type": message.media[number - 1][1].kind}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def takes_parts(render: Callable[[Turns], str]) -> bool:
    """Whether a template shows a question in parts, and not the same as plain text."""
    question = {"role": "user", "content": _PROBE}
    for turns in ([question], [{"role": "system", "content": "-"}, question]):  # some insist on a system prompt
        if _shows(render, turns):
            return False
        if _shows(render, in_parts(turns)):
            return True
    return False


def _shows(render: Callable[[Turns], str], turns: Turns) -> bool:
    try:
        return _PROBE in render(turns)
    except (TemplateError, ValueError, LookupError, AttributeError, TypeError, LowrankError):
        return False
