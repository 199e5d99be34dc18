"""Calls of tools, read out of answers in the formats of the chat templates that people use.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>                      Qwen 2.5 and 3, Hermes, many others
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>         Qwen 3.5 and Qwen3-Coder
    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>                    GLM-4.5 and later
    {"name": ..., "parameters": {...}}                                                            Llama 3.1 and later
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]           Mistral up to Small 3.1 (the marker is a special token)
    [TOOL_CALLS]NAME[ARGS]{...}                                        Mistral since (both markers are special tokens)
    NAME and a line with {...}                                                                                   GLM-4

What cannot be read as calls of the tools that were offered stays plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPENING = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(?P<call>.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=(?P<name>[^>\n]+)>(?P<rest>.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL)
_UNMARKED = ("[TOOL_CALLS]", '"parameters"', "<|observation|>")
"""What a template has whose calls are the whole answer: Mistral's, Llama's, GLM-4's."""

Call = dict[str, str]
"""OpenAI's `function`: a name, and arguments as JSON in a text."""


class ToolCallReader:
    """Takes an answer in pieces; gives back what is surely text, and in the end the calls."""

    def __init__(self, chat_template: str, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools`: those that were offered, as OpenAI's clients send them."""
        offered: list[Mapping[str, Any]] = [tool.get("function", tool) for tool in tools]
        self._parameters = {str(tool.get("name")): _types_of(tool.get("parameters")) for tool in offered}
        self._marked = _OPENING in chat_template
        self._unmarked = not self._marked and any(sign in chat_template for sign in _UNMARKED)
        self._held = ""
        self._shown = False

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        if not (self._marked or self._unmarked):
            return text
        self._held += text
        place = self._sure() if self._marked else (len(self._held) if self._shown or not self._may_call() else 0)
        shown, self._held = self._held[:place], self._held[place:]
        self._shown = self._shown or bool(shown)
        return shown

    def end(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        held, self._held = self._held, ""
        calls: list[Call] = []
        for text in [match["call"] for match in _CALL.finditer(held)] if self._marked else [held.strip()]:
            found = (self._in_tags(text) if self._marked else None) or self._in_json(text)
            if not found:
                return held, []
            calls += found
        if not calls:
            return held, []
        return _CALL.sub("", held).strip() if self._marked else "", calls

    def _sure(self) -> int:
        """Up to where there is no marker, no beginning of one, and no white space that may stand before one."""
        place = self._held.find(_OPENING)
        if place < 0:
            place = len(self._held) - _overlap(self._held, _OPENING)
        return len(self._held[:place].rstrip())

    def _may_call(self) -> bool:
        """Whether the answer, so far, may be a call."""
        begun = self._held.lstrip()
        if not begun or begun[0] in "[{":
            return True
        return any(
            name.startswith(begun) or (begun.startswith(name) and begun[len(name) :].lstrip()[:1] in ("", "{"))
            for name in self._parameters
        )

    def _in_json(self, text: str) -> list[Call]:
        """Objects or lists of them, or a tool's name before each object; empty if anything else stands there."""
        calls, decoder = [], json.JSONDecoder()
        while text := text.lstrip(" \n\r\t;"):
            name = max((name for name in self._parameters if text.startswith(name)), key=len, default="")
            try:
                written, end = decoder.raw_decode(text := text.removeprefix(name).lstrip())
            except ValueError:
                return []
            text = text[end:]
            if name:
                written = {"name": name, "arguments": written}
            for call in written if isinstance(written, list) else [written]:
                if not isinstance(call, dict) or call.get("name") not in self._parameters:
                    return []
                arguments = call.get("arguments", call.get("parameters", {}))
                calls.append(_call(call["name"], arguments))
        return calls

    def _in_tags(self, text: str) -> list[Call]:
        """Arguments between tags: as text where the tool declares one, else as JSON where it is some."""
        function = _FUNCTION.fullmatch(text)
        if function is not None:
            name, arguments = function["name"].strip(), _PARAMETER.finditer(function["rest"])
        else:
            name, arguments = text.partition("<arg_key>")[0].strip(), _ARGUMENT.finditer(text)
        if name not in self._parameters:
            return []
        types = self._parameters[name]
        return [_call(name, {each["key"]: _value(each["value"], types.get(each["key"])) for each in arguments})]


def _types_of(schema: Any) -> dict[str, Any]:
    """The declared JSON type of each parameter."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {key: each.get("type") for key, each in properties.items() if isinstance(each, Mapping)}


def _value(text: str, kind: Any) -> Any:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _call(name: str, arguments: Any) -> Call:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": text}


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    return next((size for size in range(len(marker) - 1, 0, -1) if text.endswith(marker[:size])), 0)
