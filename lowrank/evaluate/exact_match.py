"""Exact match: the share of questions answered letter for letter as in the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank.records import Conversation


@dataclass(frozen=True)
class Answered:
    """A held-out question, the answer in the data, and what each voice said."""

    question: str
    expected: str
    answers: dict[str, str]


def ask_all(
    conversations: Sequence[Conversation],
    voices: Sequence[str],
    answer: Callable[[Sequence[tuple[str, Conversation]]], list[str]],
) -> list[Answered]:
    """Put every conversation's last question to every voice; all in one call, so they share the base's passes."""
    prompts = [Conversation(each.messages[:-1], each.tools) for each in conversations]
    texts = iter(answer([(voice, prompt) for prompt in prompts for voice in voices]))
    return [
        Answered(
            question=each.messages[-2].content,
            expected=each.messages[-1].content,
            answers={voice: next(texts) for voice in voices},
        )
        for each in conversations
    ]


def exact_match(answered: Sequence[Answered], voice: str) -> float:
    """0 to 1; blanks around the answer do not count."""
    return sum(each.answers[voice].strip() == each.expected.strip() for each in answered) / max(1, len(answered))
