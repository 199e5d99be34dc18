"""What a chat template does around an answer, learned by rendering a made-up conversation once.

A template is a program; that it ends a turn with `<|im_end|>`, or writes earlier answers differently, is
written nowhere. So it is tried out, on contents that cannot be confused with anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank.data.chat.template import ChatTemplate, RowRefused
from lowrank.errors import ModelError
from lowrank.records import Message

_SYSTEM = Message("system", "Sq7zsystem")
_QUESTION = Message("user", "Uq7zfirst")
_ANSWER = Message("assistant", "Aq7zfirst")
_SECOND_QUESTION = Message("user", "Uq7zsecond")
_ANSWER_AGAIN = Message("assistant", "Aq7zsecond")
_THOUGHT = Message("assistant", "Aq7zfirst", fields={"reasoning_content": "Rq7zthought"})
_TOOL = {"type": "function", "function": {"name": "tq7z", "description": "-", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Shape:
    """Text around an answer."""

    opening: str
    """What precedes an answer both in the generation prompt and in a finished conversation."""
    extra: str
    """What the generation prompt holds beyond that, e.g. a `<think>` that finished answers lack."""
    header: str
    """What precedes an answer although the generation prompt lacks it (the template ignores that request)."""
    ending: str
    """Everything after the last answer, e.g. `<|im_end|>` and a newline."""
    closing: str
    """The part of `ending` that the model has to learn: up to its end-of-turn token. Empty if there is none."""
    added: Mapping[str, str] = field(default_factory=dict)
    """Without `closing`: the end of turn to put after an answer, by the role that speaks next."""
    ignores_tools: bool = False
    call_ends: tuple[str, ...] = ()
    """Tokens at which an answer that calls a tool, or thinks, ends otherwise."""
    call_ids: str = ""
    """What a template that fails on calls without ids takes for one, to be filled in with `name` and `index`."""
    ignores_thoughts: bool = False
    """It writes none of the fields that hold a thought."""
    refuses_system: str = ""
    """Why a system prompt is refused; empty if it is not."""
    notices: tuple[str, ...] = ()
    """What a person should know about this template."""


def shape_of(template: ChatTemplate, eos_token: str | None) -> Shape:
    """Try the template out. Raises ModelError if it cannot render a question and its answer."""
    refused = _refusal(template, [_SYSTEM, _QUESTION, _ANSWER])
    start = []
    try:
        alone = template.render([_QUESTION, _ANSWER]).text
    except RowRefused as error:
        if refused:
            raise ModelError(f"the chat template cannot render a question and its answer: {error}") from error
        start = [_SYSTEM]  # it insists on a system prompt
        alone = template.render([*start, _QUESTION, _ANSWER]).text
    question = template.render([*start, _QUESTION], generation_prompt=True).text
    plain = template.render([*start, _QUESTION]).text
    if alone.count(_ANSWER.content) != 1 or question.count(_QUESTION.content) != 1:
        raise ModelError("the chat template leaves out or repeats the question or its answer; set data.chat_template")
    history = _or_empty(template, [*start, _QUESTION, _ANSWER, _SECOND_QUESTION, _ANSWER_AGAIN])
    opening, extra, header = _opening(template, alone, question, plain)
    ending = alone.partition(_ANSWER.content)[2]
    closing = _closing(template, ending, history.partition(_ANSWER.content)[2])
    added = {} if closing else _added(template, start, eos_token)
    call_ids = _call_ids(template, start)
    later = alone[: alone.index(_ANSWER.content)] + _ANSWER.content + closing
    return Shape(
        opening=opening,
        extra=extra,
        header=header,
        ending=ending,
        closing=closing,
        added=added,
        ignores_tools=_ignores_tools(template, start, plain),
        call_ends=_call_ends(template, start, opening, call_ids),
        call_ids=call_ids,
        ignores_thoughts=_THOUGHT.thought not in _or_empty(template, [*start, _QUESTION, _THOUGHT]),
        refuses_system=refused,
        notices=tuple(
            _notices(
                template,
                header=header,
                extra=extra,
                added=added,
                endless=not closing and not added,
                same_later=history.startswith(later),
            )
        ),
    )


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts share at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _refusal(template: ChatTemplate, messages: list[Message]) -> str:
    try:
        template.render(messages)
    except RowRefused as error:
        return str(error)
    return ""


def _or_empty(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    try:
        return template.render(messages, tools).text
    except RowRefused:
        return ""


def _opening(template: ChatTemplate, alone: str, question: str, plain: str) -> tuple[str, str, str]:
    """Opening, extra and header; see `Shape`."""
    between = alone.partition(_QUESTION.content)[2].partition(_ANSWER.content)[0]
    prompted = question.partition(_QUESTION.content)[2]
    if alone.startswith(question):
        rest = between[len(prompted) :]
        ignored = question == plain and bool(template.control.search(rest))
        return (between, "", rest) if ignored else (prompted, "", "")
    shared = between[: common_prefix(between, prompted)]
    ends = [match.end() for match in template.control.finditer(shared)] + [shared.rfind("\n") + 1]
    opening = shared[: max(ends)]
    extra, rest = prompted[len(opening) :], between[len(opening) :]
    parts = [match[0] for match in template.control.finditer(extra)] + [extra.strip()]
    if any(part and part in rest for part in parts):  # no addition: the same header, after something that was rewritten
        extra = ""
    return opening, extra, ""


def _closing(template: ChatTemplate, ending: str, later: str) -> str:
    """Up to the last token that ends an answer both at the end and within a conversation, else at the end."""
    shared = common_prefix(ending, later) if later else len(ending)
    matches = list(template.control.finditer(ending))
    common = [match.end() for match in matches if match.end() <= shared]
    if common:
        return ending[: common[-1]]
    return ending[: matches[0].end()] if matches else ""


def _added(template: ChatTemplate, start: list[Message], eos_token: str | None) -> dict[str, str]:
    """The token that follows an answer directly, as GLM-4 ends one with `<|user|>`; else EOS."""
    added = {}
    for role in ("user", "tool"):
        after = _or_empty(template, [*start, _QUESTION, _ANSWER, Message(role, "Nq7znext")]).partition(_ANSWER.content)[
            2
        ]
        follows = template.control.match(after)
        token = follows[0] if follows else eos_token
        if token:
            added[role] = token
    return added


def _ignores_tools(template: ChatTemplate, start: list[Message], plain: str) -> bool:
    try:
        return template.render([*start, _QUESTION], [_TOOL]).text == plain
    except RowRefused:
        return False


def _call_ends(template: ChatTemplate, start: list[Message], opening: str, call_ids: str) -> tuple[str, ...]:
    """Last tokens of other kinds of answers; none that also stands within one, as `</tool_call>` between two calls."""
    calls = tuple(_call(name) for name in ("kq7z", "lq7z"))
    answers = [_THOUGHT, Message("assistant", "", calls[:1]), Message("assistant", "", calls)]
    answers += [replace(_THOUGHT, content="", tool_calls=calls[:1]), replace(_ANSWER, tool_calls=calls[:1])]
    ends: dict[str, None] = {}
    within: set[str] = set()
    for answer in answers:
        turns = with_call_ids([*start, _QUESTION, answer], call_ids)
        described = _or_empty(template, turns, [_TOOL]).partition(_QUESTION.content)[2]
        described = described.partition(opening)[2] if opening and opening in described else described
        found = list(template.control.finditer(described))
        if found and not described[found[-1].end() :].strip():
            ends[found[-1][0]] = None
        within |= {each[0] for each in found[:-1]}
    return tuple(end for end in ends if end not in within)


def _call(argument: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "tq7z", "arguments": {argument: "vq7z"}}}


def _call_ids(template: ChatTemplate, start: list[Message]) -> str:
    """The first form of ids with which a call and its result can be written; none if it goes without."""
    for form in ("", "call{index:05}", "functions.{name}:{index}"):
        turns = with_call_ids(
            (_QUESTION, Message("assistant", "", (_call("kq7z"),)), Message("tool", "Nq7znext")), form
        )
        text = _or_empty(template, [*start, *turns, _ANSWER])
        if all(part in text for part in ("tq7z", "vq7z", "Nq7znext", _ANSWER.content)):
            return form
    return ""


def with_call_ids(messages: Sequence[Message], form: str) -> tuple[Message, ...]:
    """Calls without an id have one of this form, and results without one theirs, in order."""
    if not form:
        return tuple(messages)
    filled: list[Message] = []
    waiting: list[str] = []
    number = 0
    for message in messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                calls.append({"id": form.format(name=call["function"]["name"], index=number), **call})
                number += 1
            message = replace(message, tool_calls=tuple(calls))
            waiting = [call["id"] for call in calls]
        elif message.role == "tool" and waiting:
            own = waiting.pop(0)
            message = replace(message, fields={"tool_call_id": own, **message.fields})
        filled.append(message)
    return tuple(filled)


def _notices(
    template: ChatTemplate, *, header: str, extra: str, added: Mapping[str, Any], endless: bool, same_later: bool
) -> list[str]:
    found = []
    if endless:
        found.append("neither chat template nor tokenizer has an end-of-turn token: answers have no end to learn")
    elif added:
        tokens = " or ".join(dict.fromkeys(added.values()))
        found.append(f"the chat template does not end answers with a token; {tokens} is added and learned")
    if header:
        found.append(f"the chat template writes no generation prompt; {header!r} is taken as one")
    if extra:
        found.append(
            f"the chat template's generation prompt ends in {extra!r}, which finished answers lack; they are learned "
            "without it, so the model will be asked in a way it was not trained on"
        )
    if not same_later:
        found.append(
            "the chat template writes earlier answers of a conversation differently from the last one (it may drop "
            "their thinking): such a conversation becomes several samples, so each answer is learned as it is spoken"
        )
    return found
