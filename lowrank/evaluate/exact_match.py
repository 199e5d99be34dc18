"""Exact match: the share of questions answered letter for letter as in the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank.records import Conversation


@dataclass(frozen=True)
class Answered:
    """A held-out question, the answer in the data, and what each model said."""

    question: str
    expected: str
    answers: dict[str, str]


def generate_answers(
    conversations: Sequence[Conversation],
    answering_models: Sequence[str],
    answer: Callable[[Sequence[tuple[str, Conversation]]], list[str]],
) -> list[Answered]:
    """Put every conversation's last question to every model; all in one call, so they share the base's passes."""
    prompts = [Conversation(each.messages[:-1], each.tools) for each in conversations]
    texts = iter(answer([(model_name, prompt) for prompt in prompts for model_name in answering_models]))
    return [
        Answered(
            question=each.messages[-2].content,
            expected=each.messages[-1].content,
            answers={model_name: next(texts) for model_name in answering_models},
        )
        for each in conversations
    ]


def exact_match(answered: Sequence[Answered], model_name: str) -> float:
    """0 to 1; blanks around the answer do not count."""
    return sum(each.answers[model_name].strip() == each.expected.strip() for each in answered) / max(1, len(answered))
