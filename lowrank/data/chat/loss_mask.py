"""The loss mask (label masking, completion-only loss): which characters of a rendered conversation are learned.

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

from lowrank.data.chat.template import ChatTemplate, Rendered, RowRefused
from lowrank.data.chat.template_shape import Shape, common_prefix
from lowrank.records import Conversation, Medium, Message

THINKING = {"enable_thinking": True, "thinking": True}
"""What templates call the wish that the model thinks first."""
Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Sample:
    """One text to learn from."""

    text: str
    learned: tuple[Span, ...]
    spelled: tuple[Span, ...] = ()
    """Where control tokens stand that are to be read as text (foreign.py)."""
    num_messages: int = 0
    """Messages of the conversation that are in it."""
    places: tuple[tuple[Span, Medium], ...] = ()
    """What stands for each medium, once that is put in (placeholders.py)."""


@dataclass(frozen=True)
class _Turn:
    """An answer at the end of what led to it."""

    index: int
    text: str
    spans: tuple[Span, ...]
    spelled: tuple[Span, ...]
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
    answers = _Answers(template, shape, conversation, learned[-1])
    turns = {index: answers.turn(index) for index in learned}
    samples: list[Sample] = []
    waiting = list(learned)
    groups: list[tuple[_Turn, list[Span]]] = []
    while waiting:
        last = turns[waiting[-1]]
        found = {index: answers.within(turns[index], last) for index in waiting}
        groups.append((last, [span for spans in found.values() for span in spans]))
        waiting = [index for index in waiting if not found[index]]
    for last, spans in reversed(groups):
        text = last.text + last.added
        _check_shown(conversation, last.index, text)
        if prompt_too:
            others = answers.others(last, learned)
            fresh = common_prefix(samples[-1].text, text) if samples else 0
            spans = _complement(others, fresh, len(text))
        samples.append(Sample(text, tuple(sorted(spans)), last.spelled, last.index + 1))
    return samples


class _Answers:
    """The answers of one conversation, each as it is spoken; `last` is the last that is asked for."""

    def __init__(self, template: ChatTemplate, shape: Shape, conversation: Conversation, last: int) -> None:
        self._template, self._shape, self._messages = template, shape, conversation.messages
        self._beginnings = template.beginnings(conversation.messages, conversation.tools, last)

    def turn(self, index: int) -> _Turn:
        """Raises RowRefused where it cannot be told from what leads to it."""
        template, shape, message = self._template, self._shape, self._messages[index]
        if not index:
            raise RowRefused("the conversation begins with an answer, so there is nothing to answer")
        alone = self._beginnings.render(index + 1)
        content_end, end = _end(template, shape, alone)
        start = self._start(index, alone.text)
        spans = _marked_spans(alone, start, end) if template.marked else [(start, end)]
        described = "".join(alone.text[first:last] for first, last in spans)
        if not _shows_all(shape.opening + described, message):
            raise RowRefused(
                f"the chat template leaves out part of the answer in turn {index + 1}, or does not follow the "
                f"generation prompt there: {_shorten(message)}"
            )
        closed = bool(shape.closing) or described.rstrip().endswith((*shape.call_ends, *shape.added.values()))
        added = "" if closed else shape.added.get("tool" if message.tool_calls else "user", "")
        cut = max(spans[-1][1], end) if closed else content_end
        spans = [(first, min(last, cut)) for first, last in spans]
        if added:
            spans[-1] = (spans[-1][0], cut + len(added))
        spelled = tuple(span for span in alone.spelled if span[1] <= cut)
        return _Turn(index, alone.text[:cut], tuple(spans), spelled, added)

    def _start(self, index: int, text: str) -> int:
        """Where the answer begins: behind its generation prompt, which for one with a thought may be another."""
        shape = self._shape
        requested = self._beginnings.render(index, generation_prompt=True).text
        undecided = not THINKING.keys() & self._template.variables.keys()
        if undecided and self._messages[index].thinks and not text.startswith(requested + shape.header):
            thinking = self._beginnings.render(index, generation_prompt=True, variables=THINKING).text
            if text.startswith(thinking):
                return len(thinking)
        if text.startswith(requested + shape.header):
            return len(requested) + len(shape.header)
        beyond = len(shape.extra)
        if beyond and requested.endswith(shape.opening + shape.extra) and text.startswith(requested[:-beyond]):
            return len(requested) - beyond
        raise RowRefused(
            "it does not continue its generation prompt: the chat template writes the answer, or what comes before it, "
            "differently once it is there"
        )

    def within(self, turn: _Turn, last: _Turn) -> list[Span]:
        """The turn's spans in the text of a later one; nothing unless it stands there as it was spoken."""
        if turn is last:
            return list(turn.spans)
        tail = len(turn.added)
        spans = [(first, stop) for first, stop in turn.spans if last.text.startswith(turn.text[:stop])]
        described = "".join(last.text[first:stop] for first, stop in spans)
        if not spans or not _shows_all(self._shape.opening + described, self._messages[turn.index]):
            return []
        if tail:  # the template writes no end of turn: what follows has to be one
            follows = self._template.control.match(last.text, len(turn.text))
            if follows is None or len(spans) < len(turn.spans):
                return []
            spans[-1] = (spans[-1][0], follows.end())
        return spans

    def others(self, last: _Turn, learned: Sequence[int]) -> list[Span]:
        """Where the answers stand that are context only."""
        spans: list[Span] = []
        for index, message in enumerate(self._messages[: last.index]):
            if message.role == "assistant" and index not in learned:
                found = self.within(self.turn(index), last)
                if not found:
                    raise RowRefused(
                        f"the answer in turn {index + 1}, which is not to be learned, cannot be told apart"
                    )
                spans += found
        return spans


def _end(template: ChatTemplate, shape: Shape, alone: Rendered) -> Span:
    """Where the last answer's content ends, and where its end-of-turn token does."""
    text, spelled = alone.text, {end for _, end in alone.spelled}
    if text.endswith(shape.ending):
        content_end = len(text) - len(shape.ending)
        return content_end, content_end + len(shape.closing)
    found = template.control.finditer(text)  # a call may be ended by another token
    ends = [match.end() for match in found if match.end() not in spelled]
    if not ends or text[ends[-1] :].strip():
        raise RowRefused("the end of its last answer cannot be found in what the chat template makes of it")
    return ends[-1], ends[-1]


def _marked_spans(alone: Rendered, start: int, end: int) -> list[Span]:
    """The template's own marks of this turn; the last is stretched over an end-of-turn token it leaves out."""
    spans = [(first, stop) for first, stop in alone.blocks if stop > start]
    if not spans:
        raise RowRefused("the chat template marks nothing of its last answer as generated")
    if spans[-1][1] < end:
        spans[-1] = (spans[-1][0], end)
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
    shown = _Shown(text)
    for index, message in enumerate(conversation.messages[:last]):
        if message.role != "assistant" and not all(map(shown.has, message.texts)):
            raise RowRefused(f"the chat template leaves out turn {index + 1} ({message.role}): {_shorten(message)}")


def _shows_all(text: str, message: Message) -> bool:
    """`text` begins with the generation prompt, which may hold the `<think>` an answer begins with."""
    described, shown = (message.content, message.thought), _Shown(text)
    names = (call["function"]["name"] for call in message.tool_calls)
    return all(shown.has(each) for each in described) and all(name in text for name in names)


class _Shown:
    """Asks a text for contents, white space and JSON escapes aside."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._squeezed: str | None = None
        self._squeezed_at = 0

    def has(self, content: str) -> bool:
        """Looked for behind the last one that was found first, since turns come in order."""
        if (at := _find(self._text, content.strip(), self._at)) >= 0:
            self._at = at
            return True
        if self._squeezed is None:
            self._squeezed = "".join(self._text.split())
        for form in (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]):
            if (at := _find(self._squeezed, "".join(form.split()), self._squeezed_at)) >= 0:
                self._squeezed_at = at
                return True
        return False


def _find(text: str, part: str, start: int) -> int:
    at = text.find(part, start)
    return at if at >= 0 or not start else text.find(part)


def _shorten(message: Message) -> str:
    content = message.content or json.dumps(list(message.tool_calls), ensure_ascii=False)
    return repr(content if len(content) <= 60 else content[:57] + "...")
