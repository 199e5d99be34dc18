"""Dataset formats: one function each, from a row to a record.

A format is `f(row, columns, tags) -> record`. The annotation of what it returns says which objectives
it can feed; that is checked before any data is tokenized. `columns` says which column plays which part
and `tags` how roles are written, with the names of LLaMA-Factory's dataset_info.json. A format raises
`RowProblem("kind: detail")` for a row that cannot be used.

A public function of this file with such an annotation is a format, under its own name; a third party's
is `my_module:my_function`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from lowrank.data.formats.columns import (
    RowProblem,
    column_for,
    describe,
    list_of,
    optional,
    required,
    text_at,
    text_of,
)
from lowrank.data.formats.turn_flags import ROW_FLAG
from lowrank.data.formats.turns import conversation, prompt, read_tools, read_turn, read_turns
from lowrank.data.formats.unread import peek, whole
from lowrank.errors import ConfigError, DataError, did_you_mean
from lowrank.records import Conversation, Message, Preference, Prompted, Rated, Record, Text
from lowrank.third_party import CodeRefused, call_problem, load_code

Row = Mapping[str, Any]
Names = Mapping[str, str]
Format = Callable[[Row, Names, Names], Record]

OBJECTIVES_OF: dict[type, str] = {
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
    answer = Message("assistant", text_at("response", row, columns))
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
    return conversation(_chat(row, columns, tags), read_tools(optional("tools", row, columns)))


def messages(row: Row, columns: Names, tags: Names) -> Conversation:
    """OpenAI's `messages`: role and content, `tool_calls`, `weight` 0 for an answer that is context only; `tools`.

    Content in parts is joined, those of type `reasoning` as `<think>` blocks. Further keys (`tool_call_id`, `name`,
    `reasoning_content` ...) reach the chat template as they are.

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
    question = _prompt_turns(row, columns, tags)
    part = "response" if "response" in columns else "completion"
    answer = required(part, row, columns)
    if isinstance(answer, Mapping) or (isinstance(answer, list) and answer and isinstance(answer[0], Mapping)):
        turns = read_turns(answer, tags, "completion")
    else:
        turns = [Message("assistant", text_at(part, row, columns))]
    return conversation([*question, *turns], read_tools(optional("tools", row, columns)))


def text(row: Row, columns: Names, tags: Names) -> Text:
    """Plain text in the column `text` (or the one mapped as `text` or `prompt`).

    >>> print(transcript(text({"text": "Once upon a time."}, {}, {})))
    Once upon a time.
    """
    part = "prompt" if "prompt" in columns and "text" not in columns else "text"
    body = text_at(part, row, columns)
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
        raise RowProblem(
            f"wrong type for kto_tag: column {column_for('kto_tag', row, columns)!r} holds {describe(value)}, expected "
            "true or false (or 1 or 0)"
        )
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
    return Prompted(prompt(_prompt_turns(row, columns, tags), read_tools(optional("tools", row, columns))), whole(row))


def _alpaca_prompt(row: Row, columns: Names) -> list[Message]:
    """System, history, and `instruction + newline + input` as the last question."""
    parts = [text_at("prompt", row, columns), text_at("query", row, columns, needed=False)]
    turns = _system(row, columns)
    for pair in list_of(optional("history", row, columns), "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowProblem(f"wrong type for history: expected pairs of question and answer, got {describe(pair)}")
        turns += [Message("user", text_of(pair[0], "history")), Message("assistant", text_of(pair[1], "history"))]
    return [*turns, Message("user", "\n".join(part for part in parts if part))]


def _chat(row: Row, columns: Names, tags: Names) -> list[Message]:
    turns = read_turns(required("messages", row, columns), tags, loss_mask=row.get(ROW_FLAG))
    return _led_by_system(row, columns, turns)


def _led_by_system(row: Row, columns: Names, turns: list[Message]) -> list[Message]:
    """The row's `system` before its turns. Where these begin with one of their own, theirs counts; the row's is then
    read only if it says the same, and else named among what nobody reads."""
    if not turns or turns[0].role != "system":
        return [*_system(row, columns), *turns]
    name = column_for("system", row, columns)
    if name is not None:
        beside = peek(row, name)
        if isinstance(beside, str) and beside.strip() in ("", turns[0].content.strip()):
            _system(row, columns)
    return turns


def _system(row: Row, columns: Names) -> list[Message]:
    system = text_at("system", row, columns, needed=False)
    return [Message("system", system)] if system else []


def _prompt_turns(row: Row, columns: Names, tags: Names) -> list[Message]:
    """The turns before the answer: a list of them, or alpaca's columns."""
    if column_for("messages", row, columns):
        return _chat(row, columns, tags)
    name = column_for("prompt", row, columns)
    if name is not None and isinstance(row[name], (list, tuple)):
        return _led_by_system(row, columns, read_turns(row[name], tags, "prompt"))
    return _alpaca_prompt(row, columns)


def _before(row: Row, columns: Names, tags: Names, chosen: Sequence[Message]) -> list[Message]:
    """What leads to the answers: the prompt's turns and those before the last of `chosen`, or these alone if they are
    a chat from its beginning (`prompt` is then only its first question again)."""
    known = column_for("messages", row, columns) or column_for("prompt", row, columns)
    led = list(chosen[:-1])
    if led and led[0].role in ("system", "user"):
        _read_again(row, columns, led)
    if led and led[0].role == "system":
        return led
    if led and led[0].role == "user":
        return [*_system(row, columns), *led]
    if not known:
        raise RowProblem(
            "missing prompt: there is no column for it, and chosen and rejected hold answers alone; map `columns`"
        )
    return [*_prompt_turns(row, columns, tags), *led]


def _read_again(row: Row, columns: Names, led: Sequence[Message]) -> None:
    """Take the columns of prompt and messages if they say only what `chosen` says as well."""
    requested = {message.content for message in led if message.role == "user"}
    for part in ("prompt", "messages"):
        name = column_for(part, row, columns)
        reported = None if name is None else peek(row, name)
        chosen = peek(row, column_for("chosen", row, columns) or "")
        if name is not None and (
            reported in requested if isinstance(reported, str) else reported in (chosen, chosen[: len(led)])
        ):
            row[name]


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
    """The format called `name`, or a third party's `my_module:my_function`. DataError if there is none.

    CodeRefused where a third party's code is not allowed to run.
    """
    built_in = built_in_formats()
    if ":" not in name:
        if name not in built_in:
            hint = did_you_mean(name, built_in)
            raise DataError(f"there is no format {name!r}{hint}; or your own my_module:my_function")
        return built_in[name]
    try:
        found = load_code(name)
    except CodeRefused as error:
        raise CodeRefused(f"format: {error}") from error
    except ConfigError as error:
        raise DataError(f"format: {error}") from error
    record_type(found)
    if problem := call_problem(found, "row", "columns", "tags"):
        raise DataError(f"format {name} {problem}: docs/add-a-format.md")
    return found


def record_type(function: Format) -> type:
    """The kind of record a format makes, by its annotation. DataError if it does not say."""
    kinds = get_args(Record)
    name = getattr(function, "__name__", repr(function))
    try:
        made = get_type_hints(function).get("return") if inspect.isroutine(function) else None
    except Exception as error:  # an annotation in quotes that names nothing
        raise DataError(f"format {name}: its annotations cannot be read: {type(error).__name__}: {error}") from error
    if made is None or made not in kinds:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise DataError(f"format {name}: annotate what it returns, `-> Conversation` for one; it can be {names}")
    return made
