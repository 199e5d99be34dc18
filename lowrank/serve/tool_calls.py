"""Calls of tools, read out of answers in the formats of the chat templates that people use.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Qwen 2.5 and 3, Hermes, many others
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]             Mistral (the marker is a special token)
    {"name": ..., "parameters": {...}}                           Llama 3.1 and later

What cannot be read as calls of the tools that were offered stays plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_OPENING = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(?P<call>.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class ToolCallReader:
    """Takes an answer in pieces; gives back what is surely text, and in the end the calls."""

    def __init__(self, chat_template: str, names: Collection[str]) -> None:
        """`names`: of the tools that were offered."""
        self._names = set(names)
        self._marked = _OPENING in chat_template
        self._bare = not self._marked and ("[TOOL_CALLS]" in chat_template or '"parameters"' in chat_template)
        self._held = ""
        self._shown = False

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        if not (self._marked or self._bare):
            return text
        self._held += text
        if self._marked:
            place = self._held.find(_OPENING)
            if place < 0:
                place = len(self._held) - _overlap(self._held, _OPENING)
        else:  # calls are the whole answer, or there are none
            begun = self._held.lstrip()
            place = 0 if not self._shown and (not begun or begun[0] in "[{") else len(self._held)
        shown, self._held = self._held[:place], self._held[place:]
        self._shown = self._shown or bool(shown)
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls (OpenAI's `function` objects: arguments are JSON in a text)."""
        held, self._held = self._held, ""
        texts = [match["call"] for match in _CALL.finditer(held)] if self._marked else [held.strip()]
        calls: list[dict[str, Any]] = []
        for text in texts:
            found = self._read(text)
            if found is None:
                return held, []
            calls += found
        rest = _CALL.sub("", held).strip() if self._marked and calls else ("" if calls else held)
        return rest, calls

    def _read(self, text: str) -> list[dict[str, Any]] | None:
        try:
            written = json.loads(text)
        except ValueError:
            return None
        calls = []
        for call in written if isinstance(written, list) else [written]:
            if not isinstance(call, dict) or call.get("name") not in self._names:
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append({"name": call["name"], "arguments": text})
        return calls


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    return next((size for size in range(len(marker) - 1, 0, -1) if text.endswith(marker[:size])), 0)
