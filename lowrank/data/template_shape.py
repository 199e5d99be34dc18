"""What a chat template does around an answer, learnt by rendering a made-up conversation once.

A template is a program; that it ends a turn with `<|im_end|>`, or writes earlier answers differently, is
written nowhere. So it is tried out, on contents that cannot be confused with anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.data.chat_template import ChatTemplate, RowRefused
from lowrank.errors import ModelError
from lowrank.records import Message

_SYSTEM = Message("system", "Sq7zsystem")
_ASKED = Message("user", "Uq7zfirst")
_ANSWER = Message("assistant", "Aq7zfirst")
_ASKED_AGAIN = Message("user", "Uq7zsecond")
_ANSWER_AGAIN = Message("assistant", "Aq7zsecond")
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
    refuses_system: str = ""
    """Why a system prompt is refused; empty if it is not."""
    notices: tuple[str, ...] = ()
    """What a person should know about this template."""


def shape_of(template: ChatTemplate, eos_token: str | None) -> Shape:
    """Try the template out. Raises ModelError if it cannot render a question and its answer."""
    refused = _refusal(template, [_SYSTEM, _ASKED, _ANSWER])
    start = []
    try:
        alone = template.render([_ASKED, _ANSWER]).text
    except RowRefused as error:
        if refused:
            raise ModelError(f"the chat template cannot render a question and its answer: {error}") from error
        start = [_SYSTEM]  # it insists on a system prompt
        alone = template.render([*start, _ASKED, _ANSWER]).text
    asked = template.render([*start, _ASKED], generation_prompt=True).text
    plain = template.render([*start, _ASKED]).text
    if alone.count(_ANSWER.content) != 1 or asked.count(_ASKED.content) != 1:
        raise ModelError("the chat template leaves out or repeats the question or its answer; set data.chat_template")
    history = _or_empty(template, [*start, _ASKED, _ANSWER, _ASKED_AGAIN, _ANSWER_AGAIN])
    opening, extra, header = _opening(template, alone, asked, plain)
    ending = alone.partition(_ANSWER.content)[2]
    closing = _closing(template, ending, history.partition(_ANSWER.content)[2])
    added = {} if closing else _added(template, start, eos_token)
    later = alone[: alone.index(_ANSWER.content)] + _ANSWER.content + closing
    return Shape(
        opening=opening,
        extra=extra,
        header=header,
        ending=ending,
        closing=closing,
        added=added,
        ignores_tools=_ignores_tools(template, start, plain),
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


def _or_empty(template: ChatTemplate, messages: list[Message]) -> str:
    try:
        return template.render(messages).text
    except RowRefused:
        return ""


def _opening(template: ChatTemplate, alone: str, asked: str, plain: str) -> tuple[str, str, str]:
    """Opening, extra and header; see `Shape`."""
    between = alone.partition(_ASKED.content)[2].partition(_ANSWER.content)[0]
    prompted = asked.partition(_ASKED.content)[2]
    if alone.startswith(asked):
        rest = between[len(prompted) :]
        ignored = asked == plain and bool(template.control.search(rest))
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
        after = _or_empty(template, [*start, _ASKED, _ANSWER, Message(role, "Nq7znext")]).partition(_ANSWER.content)[2]
        follows = template.control.match(after)
        token = follows[0] if follows else eos_token
        if token:
            added[role] = token
    return added


def _ignores_tools(template: ChatTemplate, start: list[Message], plain: str) -> bool:
    try:
        return template.render([*start, _ASKED], [_TOOL]).text == plain
    except RowRefused:
        return False


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
