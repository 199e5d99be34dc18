"""Reward functions for tests, named `tests.train.rewards:...` in settings."""

from __future__ import annotations

from typing import Any

SEEN: list[dict[str, Any]] = []


def digits(completions: list[Any]) -> list[float]:
    """The share of the answer's characters that are digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(each.isdigit() for each in text) / max(len(text), 1) for text in texts]


def shortness(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [-len(tokens) / 10 for tokens in completion_ids]


def noted(**arguments: Any) -> list[float]:
    """Keeps what it was called with."""
    SEEN.append(arguments)
    return [float(index) for index in range(len(arguments["completions"]))]


def failing_later(completions: list[Any]) -> list[float]:
    SEEN.append({})
    if len(SEEN) > 2:
        raise RuntimeError("the judge is out")
    return digits(completions)


def nothing(completions: list[Any]) -> list[float]:
    """No answer is better than another."""
    return [0.0] * len(completions)
