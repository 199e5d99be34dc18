"""Dataset formats: one function each, from a row to a record.

A format is `f(row, columns, tags) -> record`. The annotation of what it returns says which objectives
it can feed; that is checked before any data is tokenised. `columns` says which column plays which part
and `tags` how roles are written, with the names of LLaMA-Factory's dataset_info.json. A format raises
`RowProblem("kind: detail")` for a row that cannot be used.

A public function of this file with such an annotation is a format, under its own name; a third party's
is `my_module:my_function`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from lowrank.data.columns import (
    RowProblem,
    column_for,
    describe,
    list_of,
    optional,
    refuse_media,
    required,
    text_of,
)
from lowrank.data.turns import conversation, prompt, read_tools, read_turn, read_turns
from lowrank.errors import DataError, did_you_mean
from lowrank.records import Conversation, Message, Preference, Prompted, Rated, Record, Text

Row = Mapping[str, Any]
Names = Mapping[str, str]
Format = Callable[[Row, Names, Names], Record]

FEEDS: dict[type, str] = {
    Conversation: "sft",
    Text: "pretrain",
    Preference: "objectives on preference pairs, such as dpo",
    Rated: "objectives on rated answers, such as kto",
    Prompted: "objectives whose answers the model gives itself, such as grpo",
}
"""What each kind of record is for, in words."""


def alpaca(row: Row, columns: Names, tags: Names) -> Conversation:
    """Instruction, optional input, output; optional `history` (pairs of question and answer), `system`, `tools`.

    >>> row = {"instruction": "Add.", "input": "2 + 3", "output": "5", "history": [["Hi", "Hello"]], "system": "Short."}
    >>> print(transcript(alpaca(row, {}, {})))
    system: Short.
    user: Hi
    assistant: Hello
    user: Add.
    2 + 3
    assistant: 5
    """
    refuse_media(row, columns)
    answer = Message("assistant", text_of(required("response", row, columns), "response"))
    return conversation([*_alpaca_prompt(row, columns), answer], read_tools(optional("tools", row, columns)))


def sharegpt(row: Row, columns: Names, tags: Names) -> Conversation:
    """A list of turns `{"from", "value"}`: human, gpt, system, observation, function_call; `system`, `tools` beside it.

    A `function_call` is an answer that calls a tool, an `observation` what the tool said.

    >>> print(transcript(sharegpt({"conversations": [
    ...     {"from": "human", "value": "Weather in Oslo?"},
    ...     {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ...     {"from": "observation", "value": "rain"},
    ...     {"from": "gpt", "value": "It rains."}]}, {}, {})))
    user: Weather in Oslo?
    assistant: {"name": "weather", "arguments": {"city": "Oslo"}}
    tool: rain
    assistant: It rains.
    """
    refuse_media(row, columns)
    return conversation(_chat(row, columns, tags), read_tools(optional("tools", row, columns)))


def messages(row: Row, columns: Names, tags: Names) -> Conversation:
    """OpenAI's `messages`: role and content, `tool_calls`, `weight` 0 for an answer that is context only; `tools`.

    Content in parts is joined; parts of type `reasoning` and `reasoning_content` become `<think>` blocks.

    >>> print(transcript(messages({"messages": [
    ...     {"role": "user", "content": "2 + 3?"},
    ...     {"role": "assistant", "content": "6", "weight": 0},
    ...     {"role": "user", "content": "Sure?"},
    ...     {"role": "assistant", "content": "5, sorry."}]}, {}, {})))
    user: 2 + 3?
    assistant: 6
    user: Sure?
    assistant: 5, sorry.
    """
    return sharegpt(row, columns, tags)


def prompt_completion(row: Row, columns: Names, tags: Names) -> Conversation:
    """A prompt and its completion, as texts or as lists of messages; an optional `system`.

    >>> print(transcript(prompt_completion({"prompt": "Say hi.", "completion": "hi"}, {}, {})))
    user: Say hi.
    assistant: hi
    """
    refuse_media(row, columns)
    question = _prompt_turns(row, columns, tags)
    answer = required("response" if "response" in columns else "completion", row, columns)
    if isinstance(answer, str):
        turns = [Message("assistant", answer)]
    else:
        turns = read_turns(answer, tags, "completion")
    return conversation([*question, *turns], read_tools(optional("tools", row, columns)))


def text(row: Row, columns: Names, tags: Names) -> Text:
    """Plain text in the column `text` (or the one mapped as `text` or `prompt`).

    >>> print(transcript(text({"text": "Once upon a time."}, {}, {})))
    Once upon a time.
    """
    part = "prompt" if "prompt" in columns and "text" not in columns else "text"
    body = text_of(required(part, row, columns), "text")
    if not body.strip():
        raise RowProblem("empty text")
    return Text(body)


def preference(row: Row, columns: Names, tags: Names) -> Preference:
    """A prompt (alpaca's or a list of turns) with a `chosen` and a `rejected` answer: texts, turns, or whole chats.

    >>> row = {"instruction": "Capital of France?", "chosen": "Paris.", "rejected": "London."}
    >>> print(transcript(preference(row, {}, {})))
    user: Capital of France?
    chosen: Paris.
    rejected: London.
    """
    refuse_media(row, columns)
    tools = read_tools(optional("tools", row, columns))
    chosen, rejected = (_answer(required(part, row, columns), tags, part) for part in ("chosen", "rejected"))
    before = _before(row, columns, tags, chosen)
    if chosen[:-1] != rejected[:-1]:
        raise RowProblem("two different prompts: the turns before the last differ between chosen and rejected")
    good, bad = (conversation([*before, answers[-1]]).messages[-1] for answers in (chosen, rejected))
    if good == bad:
        raise RowProblem("equal answers: chosen and rejected are the same, which teaches nothing")
    return Preference(prompt(before, tools), good, bad)


def rated(row: Row, columns: Names, tags: Names) -> Rated:
    """A conversation in any of the other formats, and whether its answer is desirable (`kto_tag` or `label`).

    >>> print(transcript(rated({"prompt": "Say hi.", "completion": "No.", "label": False}, {}, {})))
    user: Say hi.
    assistant: No.
    => undesirable
    """
    value = required("kto_tag", row, columns)
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower(), value)
    if value not in (True, False):
        raise RowProblem(f"wrong type for kto_tag: expected true or false, got {describe(value)}")
    if column_for("messages", row, columns):
        return Rated(sharegpt(row, columns, tags), bool(value))
    if "completion" in row and "response" not in columns:
        return Rated(prompt_completion(row, columns, tags), bool(value))
    return Rated(alpaca(row, columns, tags), bool(value))


def prompted(row: Row, columns: Names, tags: Names) -> Prompted:
    """A prompt (alpaca's, or a list of turns) without an answer; all other columns are for reward functions.

    >>> print(transcript(prompted({"prompt": "2 + 3?", "solution": 5}, {}, {})))
    user: 2 + 3?
    """
    refuse_media(row, columns)
    return Prompted(prompt(_prompt_turns(row, columns, tags), read_tools(optional("tools", row, columns))), dict(row))


def _alpaca_prompt(row: Row, columns: Names) -> list[Message]:
    """System, history, and `instruction + newline + input` as the last question."""
    parts = [text_of(required("prompt", row, columns), "prompt"), text_of(optional("query", row, columns), "query")]
    turns = _system(row, columns)
    for pair in list_of(optional("history", row, columns), "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowProblem(f"wrong type for history: expected pairs of question and answer, got {describe(pair)}")
        turns += [Message("user", text_of(pair[0], "history")), Message("assistant", text_of(pair[1], "history"))]
    return [*turns, Message("user", "\n".join(part for part in parts if part))]


def _chat(row: Row, columns: Names, tags: Names) -> list[Message]:
    turns = read_turns(required("messages", row, columns), tags)
    return turns if turns and turns[0].role == "system" else [*_system(row, columns), *turns]


def _system(row: Row, columns: Names) -> list[Message]:
    system = text_of(optional("system", row, columns), "system")
    return [Message("system", system)] if system else []


def _prompt_turns(row: Row, columns: Names, tags: Names) -> list[Message]:
    """The turns before the answer: a list of them, or alpaca's columns."""
    if column_for("messages", row, columns):
        return _chat(row, columns, tags)
    name = column_for("prompt", row, columns)
    if name is not None and isinstance(row[name], (list, tuple)):
        return [*_system(row, columns), *read_turns(row[name], tags, "prompt")]
    return _alpaca_prompt(row, columns)


def _before(row: Row, columns: Names, tags: Names, chosen: Sequence[Message]) -> list[Message]:
    """What leads to the answers: the prompt's turns and those before the last of `chosen`, or these alone if they are
    a chat from its beginning (`prompt` is then only its first question again)."""
    known = column_for("messages", row, columns) or column_for("prompt", row, columns)
    led = list(chosen[:-1])
    if led and led[0].role == "system":
        return led
    if led and led[0].role == "user":
        return [*_system(row, columns), *led]
    if not known:
        raise RowProblem(
            "missing prompt: there is no column for it, and chosen and rejected hold answers alone; map `columns`"
        )
    return [*_prompt_turns(row, columns, tags), *led]


def _answer(value: Any, tags: Names, part: str) -> list[Message]:
    """`chosen` or `rejected`: a text, one turn, or a chat whose last turn is the answer."""
    if isinstance(value, str):
        return [Message("assistant", value)]
    turns = [read_turn(value, tags)[1]] if isinstance(value, Mapping) else read_turns(value, tags, part)
    if not turns or turns[-1].role != "assistant":
        raise RowProblem(f"wrong role order: {part} does not end with an answer of the assistant")
    return turns


def built_in_formats() -> dict[str, Format]:
    """`{name: function}` of every format of this file."""
    module = sys.modules[__name__]
    public = {
        name: value
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == __name__ and not name.startswith("_")
    }
    return {name: value for name, value in public.items() if get_type_hints(value).get("return") in get_args(Record)}


def find_format(name: str) -> Format:
    """The format called `name`, or a third party's `my_module:my_function`. DataError if there is none."""
    built_in = built_in_formats()
    if ":" not in name:
        if name not in built_in:
            hint = did_you_mean(name, built_in)
            raise DataError(f"there is no format {name!r}{hint}; or your own my_module:my_function")
        return built_in[name]
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"format: cannot import {name!r}: {error}; is its folder on PYTHONPATH?") from error
    record_type(found)
    return found


def record_type(function: Format) -> type:
    """The kind of record a format makes, by its annotation. DataError if it does not say."""
    kinds = get_args(Record)
    made = get_type_hints(function).get("return") if inspect.isroutine(function) else None
    if made is None or made not in kinds:
        name = getattr(function, "__name__", repr(function))
        names = ", ".join(kind.__name__ for kind in kinds)
        raise DataError(f"format {name}: annotate what it returns, `-> Conversation` for one; it can be {names}")
    return made


def recognise(rows: Sequence[Row], columns: Names | None = None) -> str:
    """The name of the format of the first rows.

    Raises DataError if none fits, with the columns that are there, or if rows differ in format.
    """
    columns = columns or {}
    where: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        name = _shape(row, columns)
        if name is not None:
            where.setdefault(name, number)
    if len(where) > 1:
        where.pop("prompted", None)  # among answered rows, one without an answer is a row that lacks it
    if len(where) > 1:
        found = ", ".join(f"{name} (first in row {number})" for name, number in where.items())
        raise DataError(f"mixed schemas: {found}; keep one format per dataset, or set `format`")
    if not where:
        there = ", ".join(repr(name) for name in rows[0]) if rows else "no rows"
        raise DataError(
            f"format not recognised from the columns {there}; set `format` (known: {', '.join(built_in_formats())}) "
            "and `columns`, e.g. {prompt: question, response: answer}"
        )
    return next(iter(where))


def _shape(row: Row, columns: Names) -> str | None:
    """The format one row has, or None."""

    def has(part: str) -> bool:
        return column_for(part, row, columns) is not None

    if has("chosen") and has("rejected"):
        return "preference"
    answered = has("messages") or (has("prompt") and (has("completion") or has("response")))
    if answered and has("kto_tag") and ("kto_tag" in columns or _is_rating(row)):
        return "rated"
    if has("messages"):
        turns = row[column_for("messages", row, columns) or ""]
        first = turns[0] if isinstance(turns, (list, tuple)) and turns else {}
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if has("prompt") and has("completion") and "response" not in columns:
        return "prompt_completion"
    if has("prompt") and has("response"):
        return "alpaca"
    if has("text") or ("prompt" in columns and has("prompt")):
        return "text"
    return "prompted" if has("prompt") else None


def _is_rating(row: Row) -> bool:
    value = row.get("kto_tag", row.get("label"))
    return isinstance(value, bool) or str(value).lower() in ("true", "false")
