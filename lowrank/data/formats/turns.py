"""Turns of a chat, in the ways people write them, as messages; and what orders of roles make a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowrank.data.formats.columns import COLUMNS, RowProblem, beginning, describe, list_of, text_of
from lowrank.data.formats.inline_media import PARTS, GivenMedium, part_of
from lowrank.data.formats.turn_flags import LOSS_FLAGS, flags_of_row, is_trained
from lowrank.records import THOUGHTS, Conversation, Message, Preference, Prompted, Rated, Record, Role, Text

CALL = "function_call"
"""The role, in sharegpt data, of an assistant's turn that is a tool call written as JSON."""

_ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": CALL,
    "tool_call": CALL,
    "system": "system",
    "developer": "system",
}
_RENAMED = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL,
    "system_tag": "system",
}
_OF_TURNS = frozenset({"role", "content", "from", "value", "tool_calls", "function_call", *LOSS_FLAGS})
"""Keys that are read here; the others go to the chat template."""
_KNOWN_FIELDS = frozenset({*THOUGHTS, "name", "tool_call_id"})
_TOOLS_OF_TURN = COLUMNS["tools"]


def read_turns(turns: Any, tags: Mapping[str, str], part: str = "messages", loss_mask: Any = None) -> list[Message]:
    """A list of `{"from", "value"}` or `{"role", "content"}` turns as messages, adjacent calls merged.

    `loss_mask`: 0 and 1 of the row for each turn, or for each turn of the assistant. Raises RowProblem for an unknown
    role, a wrong type, media, or a tool call that is not JSON.
    """
    read: list[tuple[str, Message]] = []
    for number, item in enumerate(list_of(turns, part), start=1):
        if not isinstance(item, Mapping):
            raise RowProblem(f"wrong type for {part}: turn {number} is {describe(item)}, expected an object")
        read.append(read_turn(item, tags, number))
    if loss_mask is not None:
        flags = flags_of_row(loss_mask, [message.role == "assistant" for _, message in read])
        read = [(role, replace(each, trained=each.trained and flag)) for (role, each), flag in zip(read, flags)]
    messages: list[Message] = []
    for role, message in read:
        if role == CALL and messages and messages[-1].role == "assistant":
            before = messages.pop()  # what is said before a call, or another call: one turn
            calls = before.tool_calls + message.tool_calls
            fields = {**before.fields, **message.fields}
            message = Message(
                "assistant", before.content, calls, before.trained and message.trained, fields, before.media
            )
        messages.append(message)
    return messages


def read_turn(item: Mapping[str, Any], tags: Mapping[str, str], number: int = 1) -> tuple[str, Message]:
    """One turn: the role as written in the data (`CALL` kept apart) and the message."""
    role_key = tags.get("role_tag") or ("from" if "from" in item else "role")
    content_key = tags.get("content_tag") or ("value" if "value" in item else "content")
    if role_key not in item:
        there = ", ".join(repr(name) for name in item)
        raise RowProblem(f"missing role: turn {number} has no {role_key!r} but {there}; see `tags.role_tag`")
    written = item[role_key]
    role = _role(written, tags, number)
    content, calls, media = _content(item.get(content_key), number)
    fields = _fields(item, role_key, content_key)
    trained = is_trained(item, number, is_answer=role in ("assistant", CALL))
    if role == CALL:
        return CALL, Message("assistant", "", (*_calls_of_json(content, number), *calls), trained, fields, media)
    calls += [_call(call, number) for call in list_of(item.get("tool_calls"), "tool_calls")]
    if item.get("function_call"):
        calls.append(_call(item["function_call"], number))
    if content_key not in item and not calls:
        there = ", ".join(repr(name) for name in item)
        raise RowProblem(f"missing content: turn {number} has no {content_key!r} but {there}; see `tags.content_tag`")
    for name in THOUGHTS:
        text_of(item.get(name), name)
    return role, Message(_as_role(role), content, tuple(calls), trained, fields, media)


def _fields(item: Mapping[str, Any], role_key: str, content_key: str) -> dict[str, Any]:
    """What else a turn holds. Only what every template may read is asked for; who reads the rest is not known yet."""
    for name in _KNOWN_FIELDS:
        item.get(name)
    plain = dict.items(item) if isinstance(item, dict) else item.items()
    other = {*_OF_TURNS, role_key, content_key}
    return {key: value for key, value in plain if key not in other and isinstance(key, str) and value is not None}


def take_tools(
    messages: Sequence[Message], tools: tuple[dict[str, Any], ...]
) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Messages and tools, these also where a turn has them (GLM-4, Kimi: the system turn's `tools`)."""
    without: list[Message] = []
    for message in messages:
        name = next((name for name in _TOOLS_OF_TURN if message.fields.get(name)), None)
        if name is not None:
            own = read_tools(message.fields[name])
            tools = (*tools, *(tool for tool in own if tool not in tools))
            message = replace(message, fields={key: each for key, each in message.fields.items() if key != name})
        without.append(message)
    return without, tools


def _role(written: Any, tags: Mapping[str, str], number: int) -> str:
    for tag, role in _RENAMED.items():
        if tags.get(tag) == written:
            return role
    role = _ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise RowProblem(
            f"unknown role {beginning(written, 80)}: turn {number}; known: {', '.join(_ROLES)}, or rename with `tags`"
        )
    return role


def _as_role(role: str) -> Role:
    assert role in ("system", "user", "assistant", "tool"), role
    return role  # type: ignore[return-value]  # narrowed by the assertion


def think(thought: str) -> str:
    """Reasoning as the chat templates of reasoning models read it out of an answer."""
    return f"<think>\n{thought}\n</think>\n\n" if thought else ""


def with_thought_apart(answer: str) -> Message:
    """An answer that a model gave, with what `think` put before it as a field of its own."""
    thought, closing, rest = answer.removeprefix("<think>\n").partition("\n</think>\n\n")
    if not answer.startswith("<think>\n") or not closing:
        return Message("assistant", answer)
    return Message("assistant", rest, fields={"reasoning_content": thought})


def _content(value: Any, number: int) -> tuple[str, list[dict[str, Any]], Any]:
    """A turn's text, the tool calls among its parts, and where media stand in the text, as they were given
    (media.py reads them); parts are `{"type", "text" or "value"}`."""
    if not isinstance(value, (list, tuple)):
        return text_of(value, f"the content of turn {number}"), [], ()
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    media: list[tuple[int, GivenMedium]] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in PARTS:
            media.append((sum(map(len, texts)), part_of(part, PARTS[kind])))
            continue
        if kind not in ("text", "reasoning", "tool_call"):
            what = beginning(kind) if kind and not isinstance(kind, str) else kind[:40] if kind else describe(part)
            raise RowProblem(
                f"content part {what}: turn {number}; lowrank trains on text, pictures, videos and sounds, leave such "
                "rows out"
            )
        body = text_of(part["text"] if part.get("text") is not None else part.get("value"), f"a part of turn {number}")
        if kind == "tool_call":
            calls += _calls_of_json(body, number)
        else:
            texts.append(think(body) if kind == "reasoning" else body)
    return "".join(texts), calls, tuple(media)


def _calls_of_json(text: str, number: int) -> list[dict[str, Any]]:
    try:
        written = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"broken tool call: turn {number} is not JSON ({error}); got {text[:40]!r}") from error
    return [_call(call, number) for call in (written if isinstance(written, list) else [written])]


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowProblem(f'broken tool call: turn {number} has no "name" but is {describe(call)}')
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowProblem(f"broken tool call: the arguments in turn {number} are not JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise RowProblem(f"broken tool call: the arguments in turn {number} are {describe(arguments)}, not an object")
    own = {key: value for key, value in function.items() if key not in ("name", "arguments", "parameters")}
    about = {} if function is call else {key: value for key, value in call.items() if key != "function"}
    if function is call and "id" in own:
        about = {"id": own.pop("id")}
    own.pop("type", None)
    written = {"type": "function", **{key: value for key, value in about.items() if value is not None}}
    return {**written, "function": {"name": function["name"], "arguments": dict(arguments), **own}}


def _read_tool(tool: Any) -> Any:
    """Arrow has no objects of different keys in one column, so tools stand there as JSON, one by one or together."""
    if not isinstance(tool, str):
        return tool
    try:
        return json.loads(tool)
    except (ValueError, RecursionError):
        return tool


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Function schemas, as a list or as JSON in a text, each in OpenAI's form."""
    tools = []
    for tool in map(_read_tool, list_of(value, "tools")):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise RowProblem(f'broken tools: expected objects with a "name", got {describe(tool)}')
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(tools)


def conversation(messages: Sequence[Message], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A conversation that ends in an answer, or a RowProblem: order of roles, empty turns, nothing to learn."""
    messages, tools = take_tools(messages, tools)
    check_order(messages)
    if messages[-1].role != "assistant":
        raise RowProblem(f"wrong role order: the last turn is {messages[-1].role}, expected an answer of the assistant")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise RowProblem("nothing to learn: every answer has weight 0")
    return Conversation(tuple(messages), tools)


def prompt(messages: Sequence[Message], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A conversation that ends in a question, or a RowProblem."""
    messages, tools = take_tools(messages, tools)
    check_order(messages)
    if messages[-1].role == "assistant":
        raise RowProblem("wrong role order: the prompt ends with an answer, expected it to end with user or tool")
    return Conversation(tuple(messages), tools)


def check_order(messages: Sequence[Message]) -> None:
    """[system] then (user | tool ...) and assistant in turn, none of them empty."""
    if not messages or (len(messages) == 1 and messages[0].role == "system"):
        raise RowProblem("empty conversation: it has no turn of user or assistant")
    before = "the beginning"
    for number, message in enumerate(messages, start=1):
        expected = _expected(before)
        if message.role not in expected:
            raise RowProblem(
                f"wrong role order: turn {number} is {message.role} after {before}, expected {' or '.join(expected)}"
            )
        has_content = message.tool_calls or message.thought or message.media
        empty = not message.content.strip() and not has_content
        if empty and message.role in ("user", "assistant"):
            raise RowProblem(f"empty {'answer' if message.role == 'assistant' else 'question'}: turn {number}")
        before = message.role


def _expected(before: str) -> tuple[str, ...]:
    orders = {
        "the beginning": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "tool": ("tool", "assistant"),
        "assistant": ("user", "tool"),
    }
    return orders[before]


def pieces(record: Record) -> list[tuple[str, float]]:
    """A record in plain words, with the loss weight of each piece: what a person reads without a tokenizer."""
    if isinstance(record, Text):
        return [(record.text, 1.0)]
    if isinstance(record, Prompted):
        return pieces(record.prompt)
    if isinstance(record, Rated):
        return [*pieces(record.conversation), (f"\n=> {'desirable' if record.desirable else 'undesirable'}", 0.0)]
    if isinstance(record, Preference):
        chosen, rejected = (_plain(answer)[1:] for answer in (record.chosen, record.rejected))
        return [*pieces(record.prompt), ("\nchosen: ", 0.0), *chosen, ("\nrejected: ", 0.0), *rejected]
    tools = [("tools: " + ", ".join(tool["function"]["name"] for tool in record.tools), 0.0)] if record.tools else []
    lines = [*([tools] if tools else []), *(_plain(message) for message in record.messages)]
    return [piece for index, line in enumerate(lines) for piece in ([("\n", 0.0)] if index else []) + line]


def _plain(message: Message) -> list[tuple[str, float]]:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    weight = float(message.role == "assistant" and message.trained)
    described = think(message.thought) + message.content
    media = "".join(f"[{each.shown}]" for _, each in message.media)
    shown = [(f"{media} ", 0.0)] if media else []
    return [(f"{message.role}: ", 0.0), *shown, (" ".join([*filter(None, [described]), *calls]), weight)]
