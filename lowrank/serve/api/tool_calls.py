"""Calls of tools, read out of answers in the formats of the chat templates that people use.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>                      Qwen 2.5 and 3, Hermes, many others
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>         Qwen 3.5 and Qwen3-Coder
    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>                    GLM-4.5 and later
    {"name": ..., "parameters": {...}}                                                            Llama 3.1 and later
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]           Mistral up to Small 3.1 (the marker is a special token)
    [TOOL_CALLS]NAME[ARGS]{...}                                        Mistral since (both markers are special tokens)
    NAME and a line with {...}                                                                                   GLM-4
    to=functions.NAME<|channel|>commentary json<|message|>{...}         gpt-oss (read by channels.py, which makes tags)

What cannot be read as calls of the tools that were offered stays plain text. Whatever a model wrote is read in time
that grows with its length and no faster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.chat import channels
from lowrank.data.chat.overlap import overlap

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[^\s{\[]{1,256}")
_SPACE = re.compile(r"[ \n\r\t;]*")
_LONGEST_SPACE = 64
"""Characters of white space that are held back, since a call may follow."""

Call = dict[str, str]
"""OpenAI's `function`: a name, and arguments as JSON in a text."""


@dataclass(frozen=True)
class CallFormat:
    """How a template teaches calls to be written. NAME and KEY stand for a function's and a parameter's."""

    around: tuple[str, str, str]
    """Before all calls, between two, after all."""
    call: tuple[str, str]
    """Before and after the arguments of one."""
    argument: tuple[str, str] | None = None
    """Before and after a value, where each has tags; else arguments are JSON."""
    several: bool = True
    sign: str = ""
    """What templates of this format have in them."""


_JSON = CallFormat(("", "", ""), ('{"name": "NAME", "parameters": ', "}"), several=False, sign='"parameters"')
_IN_TAGS = (
    CallFormat(
        ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ("<function=NAME>\n", "</function>"),
        ("<parameter=KEY>\n", "\n</parameter>\n"),
        sign="<function=",
    ),
    CallFormat(
        ("<tool_call>", "</tool_call><tool_call>", "</tool_call>"),
        ("NAME\n", ""),
        ("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
        sign="<arg_key>",
    ),
    CallFormat(
        ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ('{"name": "NAME", "arguments": ', "}"),
    ),
)
_WHOLE_ANSWERS = (
    CallFormat(("", "", ""), ("NAME", ""), sign="[ARGS]"),
    CallFormat(("[", ", ", "]"), ('{"name": "NAME", "arguments": ', "}"), sign="[TOOL_CALLS]"),
    _JSON,
    CallFormat(("", "\n", ""), ("NAME\n", ""), several=False, sign="<|observation|>"),
)
"""Whose calls are the whole answer: Mistral's, Llama's, GLM-4's."""


def format_of(template: str) -> CallFormat:
    """How calls are written by models of this template; JSON where it says nothing of calls."""
    known = _IN_TAGS if _OPENING in template else _WHOLE_ANSWERS
    return next((form for form in known if form.sign in template), _JSON)


class ToolCallReader:
    """Takes an answer in chunks; gives back what is surely text, and in the end the calls."""

    def __init__(
        self,
        chat_template: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        forced: bool = False,
        most: int | None = None,
    ) -> None:
        """`tools`: those that may be called, as OpenAI's clients send them. `forced`: the answer is nothing but calls.
        `most`: calls that the client wants at the most; further ones are dropped."""
        offered: list[Mapping[str, Any]] = [tool.get("function", tool) for tool in tools]
        self._parameters = {str(tool.get("name")): _types_of(tool.get("parameters")) for tool in offered}
        self._marked = (not forced and channels.SIGN in chat_template) or _OPENING in chat_template
        signs = [form.sign for form in _WHOLE_ANSWERS]
        self._unmarked = not self._marked and (forced or any(sign in chat_template for sign in signs))
        self._longest = max(map(len, self._parameters), default=0)
        self._most = most
        self._held = ""
        self._calling: list[str] = []
        """The text since a call began."""
        self._shown = False

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        if not (self._marked or self._unmarked):
            return text
        if self._calling:
            self._calling.append(text)
            return ""
        self._held += text
        place = self._sure()
        shown, self._held = self._held[:place], self._held[place:]
        self._shown = self._shown or bool(shown)
        return shown

    def end(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        held, self._held, self._calling = self._held + "".join(self._calling), "", []
        calls: list[Call] = []
        rest, texts = _between_marks(held) if self._marked else ("", [held.strip()])
        for number, text in enumerate(texts, start=1):
            found = (self._in_tags(text) if self._marked else None) or self._in_json(text)
            if not found:
                cut_off = calls and number == len(texts) and not held.rstrip().endswith(_CLOSING)
                if cut_off:  # by the limit of tokens, which the end of the answer tells; those before it are whole
                    break
                return held, []
            calls += found
        return (rest.strip(), calls[: self._most]) if calls else (held, [])

    def _sure(self) -> int:
        """Up to where there is no call, no beginning of one, and no white space that may stand before one."""
        if not self._marked:
            return len(self._held) if self._shown or not self._may_call() else 0
        place = self._held.find(_OPENING)
        if place >= 0:
            kept = len(self._held[:place].rstrip())
            self._calling, self._held = [self._held[kept:]], self._held[:kept]
            return kept
        place = len(self._held) - overlap(self._held, _OPENING)
        kept = len(self._held[:place].rstrip())
        return place if place - kept > _LONGEST_SPACE else kept

    def _may_call(self) -> bool:
        """Whether the answer, so far, may be a call."""
        begun = self._held.lstrip()
        if not begun:
            return len(self._held) <= _LONGEST_SPACE
        name = "" if begun[0] in "[{" else begun.partition("{")[0].rstrip()
        if begun[0] in "[{" or ("{" in begun and name in self._parameters):
            self._calling, self._held = [self._held], ""
            return True
        if len(begun) > self._longest + _LONGEST_SPACE:
            return False
        return name in self._parameters or any(each.startswith(begun) for each in self._parameters)

    def _in_json(self, text: str) -> list[Call]:
        """Objects or lists of them, or a tool's name before each object; empty if anything else stands there."""
        calls: list[Call] = []
        at = _skip(text, 0)
        while at < len(text):
            named = _NAME.match(text, at)
            try:
                written, at = _DECODER.raw_decode(text, _skip(text, named.end()) if named else at)
            except (ValueError, RecursionError):
                return []
            if named:
                written = {"name": named[0], "arguments": written}
            for call in written if isinstance(written, list) else [written]:
                if not isinstance(call, dict) or str(call.get("name")) not in self._parameters:
                    return []
                calls.append(_call(str(call["name"]), call.get("arguments", call.get("parameters", {}))))
            at = _skip(text, at)
        return calls

    def _in_tags(self, text: str) -> list[Call]:
        """Arguments between tags: as text where the tool declares one, else as JSON where it is some."""
        if text.startswith("<function="):
            name, _, rest = text.removeprefix("<function=").partition(">")
            found = _parameters_of(rest.removesuffix("</function>"))
        else:
            name, found = text.partition("<arg_key>")[0], _arguments_of(text)
        name = name.strip()
        if name not in self._parameters or found is None:
            return []
        types = self._parameters[name]
        return [_call(name, {key: _value(value, types.get(key)) for key, value in found})]


def _between_marks(text: str) -> tuple[str, list[str]]:
    """What stands outside of <tool_call> and </tool_call>, and the texts inside; the last end may be missing."""
    outside, inside, at = [], [], 0
    while (begin := text.find(_OPENING, at)) >= 0:
        outside.append(text[at:begin])
        end = text.find(_CLOSING, begin)
        at = len(text) if end < 0 else end + len(_CLOSING)
        inside.append(text[begin + len(_OPENING) : len(text) if end < 0 else end].strip())
    return "".join([*outside, text[at:]]), inside


def _parameters_of(text: str) -> list[tuple[str, str]] | None:
    found = _pairs(text, "<parameter=", ">", "</parameter>")
    return found and [(key, value.removeprefix("\n").removesuffix("\n")) for key, value in found]


def _arguments_of(text: str) -> list[tuple[str, str]] | None:
    found = _pairs(text, "<arg_key>", "</arg_key>", "</arg_value>")
    return found and [(key, value.lstrip().removeprefix("<arg_value>")) for key, value in found]


def _pairs(text: str, opening: str, middle: str, closing: str) -> list[tuple[str, str]] | None:
    """What stands between `opening` and `middle`, and from there to `closing`; None if the last has no end."""
    found, at = [], 0
    while (begin := text.find(opening, at)) >= 0:
        begin += len(opening)
        inner = text.find(middle, begin)
        at = -1 if inner < 0 else text.find(closing, inner)
        if at < 0:
            return None
        found.append((text[begin:inner], text[inner + len(middle) : at]))
    return found


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
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def _call(name: str, arguments: Any) -> Call:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": text}


def _skip(text: str, at: int) -> int:
    """Past white space."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
