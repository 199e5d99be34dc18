"""Which characters of a rendered conversation are learned.

What an assistant says in a turn is what follows the generation prompt, up to and with the token that ends
the turn. Where the template marks it with `{% generation %}`, the marks are taken. Elsewhere it is found by
rendering: the conversation before the turn with a generation prompt gives the start, the known ending the
end. A turn can be learned inside a longer conversation only if it stands there exactly as it was spoken;
templates that rewrite history (thinking dropped, system prompt moved) make a sample of its own per turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.data.chat_template import ChatTemplate, Rendered, RowRefused
from lowrank.data.template_shape import Shape, common_prefix
from lowrank.records import Conversation, Message

Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Sample:
    """One text to learn from."""

    text: str
    learned: tuple[Span, ...]


@dataclass(frozen=True)
class _Turn:
    """An answer at the end of what led to it."""

    index: int
    text: str
    spans: tuple[Span, ...]
    added: str
    """End of turn to put after the text, where the template writes none."""


def samples_of(
    template: ChatTemplate,
    shape: Shape,
    conversation: Conversation,
    learned: Sequence[int],
    *,
    prompt_too: bool = False,
) -> list[Sample]:
    """Texts that between them learn the answers `learned` (indices of messages), each exactly once.

    One text where the template allows it. Nothing follows the last learned answer, since it could not
    change any loss. With `prompt_too` everything is learned but the other answers. Raises RowRefused.
    """
    _check(shape, conversation)
    turns = {index: _turn(template, shape, conversation, index) for index in learned}
    samples: list[Sample] = []
    waiting = list(learned)
    groups: list[tuple[_Turn, list[Span]]] = []
    while waiting:
        last = turns[waiting[-1]]
        found = {index: _within(template, shape, conversation, turns[index], last) for index in waiting}
        groups.append((last, [span for spans in found.values() for span in spans]))
        waiting = [index for index in waiting if not found[index]]
    for last, spans in reversed(groups):
        text = last.text + last.added
        _check_shown(conversation, last.index, text)
        if prompt_too:
            others = _others(template, shape, conversation, last, learned)
            fresh = common_prefix(samples[-1].text, text) if samples else 0
            spans = _complement(others, fresh, len(text))
        samples.append(Sample(text, tuple(sorted(spans))))
    return samples


def _turn(template: ChatTemplate, shape: Shape, conversation: Conversation, index: int) -> _Turn:
    before, tools = conversation.messages[:index], conversation.tools
    if not before:
        raise RowRefused("the conversation begins with an answer, so there is nothing to answer")
    alone = template.render([*before, conversation.messages[index]], tools)
    content_end, end = _end(template, shape, alone.text)
    asked = template.render(before, tools, generation_prompt=True).text
    start = _start(shape, asked, alone.text)
    spans = _marked_spans(alone, start, end) if template.marked else [(start, end)]
    said = "".join(alone.text[first:last] for first, last in spans)
    message = conversation.messages[index]
    if not _shows_all(shape.opening + said, message):
        raise RowRefused(
            f"the chat template leaves out part of the answer in turn {index + 1}, or does not follow the generation "
            f"prompt there: {_shorten(message)}"
        )
    closed = bool(shape.closing) or _ends_with_control(template, said)
    added = "" if closed else shape.added.get("tool" if message.tool_calls else "user", "")
    cut = max(spans[-1][1], end) if closed else content_end
    spans = [(first, min(last, cut)) for first, last in spans]
    if added:
        spans[-1] = (spans[-1][0], cut + len(added))
    return _Turn(index, alone.text[:cut], tuple(spans), added)


def _end(template: ChatTemplate, shape: Shape, text: str) -> Span:
    """Where the last answer's content ends, and where its end-of-turn token does."""
    if text.endswith(shape.ending):
        content_end = len(text) - len(shape.ending)
        return content_end, content_end + len(shape.closing)
    ends = [match.end() for match in template.control.finditer(text)]  # a call may be ended by another token
    if not ends or text[ends[-1] :].strip():
        raise RowRefused("the end of its last answer cannot be found in what the chat template makes of it")
    return ends[-1], ends[-1]


def _start(shape: Shape, asked: str, text: str) -> int:
    if text.startswith(asked + shape.header):
        return len(asked) + len(shape.header)
    beyond = len(shape.extra)
    if beyond and asked.endswith(shape.opening + shape.extra) and text.startswith(asked[:-beyond]):
        return len(asked) - beyond
    raise RowRefused(
        "it does not continue its generation prompt: the chat template writes the answer, or what comes before it, "
        "differently once it is there"
    )


def _marked_spans(alone: Rendered, start: int, end: int) -> list[Span]:
    """The template's own marks of this turn; the last is stretched over an end-of-turn token it leaves out."""
    spans = [(first, stop) for first, stop in alone.blocks if stop > start]
    if not spans:
        raise RowRefused("the chat template marks nothing of its last answer as generated")
    if spans[-1][1] < end:
        spans[-1] = (spans[-1][0], end)
    return spans


def _ends_with_control(template: ChatTemplate, text: str) -> bool:
    ends = [match.end() for match in template.control.finditer(text)]
    return bool(ends) and not text[ends[-1] :].strip()


def _within(template: ChatTemplate, shape: Shape, conversation: Conversation, turn: _Turn, last: _Turn) -> list[Span]:
    """The turn's spans in the text of a later one; nothing unless it stands there as it was spoken."""
    if turn is last:
        return list(turn.spans)
    tail = len(turn.added)
    spans = [(first, stop) for first, stop in turn.spans if last.text.startswith(turn.text[:stop])]
    said = "".join(last.text[first:stop] for first, stop in spans)
    if not spans or not _shows_all(shape.opening + said, conversation.messages[turn.index]):
        return []
    if tail:  # the template writes no end of turn: what follows has to be one
        follows = template.control.match(last.text, len(turn.text))
        if follows is None or len(spans) < len(turn.spans):
            return []
        spans[-1] = (spans[-1][0], follows.end())
    return spans


def _others(
    template: ChatTemplate, shape: Shape, conversation: Conversation, last: _Turn, learned: Sequence[int]
) -> list[Span]:
    """Where the answers stand that are context only."""
    spans: list[Span] = []
    for index, message in enumerate(conversation.messages[: last.index]):
        if message.role == "assistant" and index not in learned:
            turn = _turn(template, shape, conversation, index)
            found = _within(template, shape, conversation, turn, last)
            if not found:
                raise RowRefused(f"the answer in turn {index + 1}, which is not to be learned, cannot be told apart")
            spans += found
    return spans


def _complement(spans: Sequence[Span], first: int, end: int) -> list[Span]:
    kept, at = [], first
    for start, stop in [*sorted(spans), (end, end)]:
        if start > at:
            kept.append((at, start))
        at = max(at, stop)
    return kept


def _check(shape: Shape, conversation: Conversation) -> None:
    if conversation.tools and shape.ignores_tools:
        raise RowRefused("it has tools, which the chat template ignores; set data.chat_template to one that knows them")
    if shape.refuses_system and any(message.role == "system" for message in conversation.messages):
        raise RowRefused(f"it has a system prompt; {shape.refuses_system}")


def _check_shown(conversation: Conversation, last: int, text: str) -> None:
    """Nothing that leads to the answer may get lost; assistant turns in between are up to the template."""
    for index, message in enumerate(conversation.messages[:last]):
        if message.role != "assistant" and not _shows(text, message.content):
            raise RowRefused(f"the chat template leaves out turn {index + 1} ({message.role}): {_shorten(message)}")


def _shows_all(text: str, message: Message) -> bool:
    """`text` begins with the generation prompt, which may hold the `<think>` an answer begins with."""
    return _shows(text, message.content) and all(call["function"]["name"] in text for call in message.tool_calls)


def _shows(text: str, content: str) -> bool:
    """The content is in the text, white space and JSON escapes aside."""
    if content.strip() in text:
        return True
    squeezed = "".join(text.split())
    forms = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    return any("".join(form.split()) in squeezed for form in forms)


def _shorten(message: Message) -> str:
    content = message.content or json.dumps(list(message.tool_calls), ensure_ascii=False)
    return repr(content if len(content) <= 60 else content[:57] + "...")
