"""Reward functions for grpo and ppo, as TRL calls them: lists in, one number per answer out."""

from __future__ import annotations

import json
from typing import Any

KEYS = ("name", "people", "city")
FRAME = ('{"name": "', '", "people": ', ', "city": "', '"}')


def read(completion: list[dict[str, str]]) -> dict[str, Any]:
    """The JSON object an answer is; empty if it is none."""
    try:
        found = json.loads(completion[0]["content"])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def valid_json(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with exactly the three keys; less than half for how far anything else comes with it.

    What is rewarded is what comes: with a little for any JSON, the model learns to answer {} within 10 steps.
    """
    texts = [completion[0]["content"] for completion in completions]
    whole = [read(completion).keys() == set(KEYS) for completion in completions]
    return [1.0 if right else 0.4 * _how_far(text) for text, right in zip(texts, whole)]


def _how_far(text: str) -> float:
    """The share of the frame's characters that stand in the text, in order and without a gap in any of its parts."""
    at = found = 0
    for number, part in enumerate(FRAME):
        place = text.find(part, at)
        if place < 0 or (number == 0 and place > 0):
            begun = (length for length in range(len(part) - 1, 0, -1) if text.startswith(part[:length]))
            found += next(begun, 0) if number == 0 else 0
            break
        at, found = place + len(part), found + len(part)
    return found / sum(map(len, FRAME))


def right_values(completions: list[list[dict[str, str]]], label: list[str], **columns: Any) -> list[float]:
    """The share of the three values that are those of the answer in the data (`label`)."""
    rewards = []
    for completion, expected in zip(completions, map(json.loads, label)):
        found = read(completion)
        rewards.append(sum(found.get(key) == expected[key] for key in KEYS) / len(KEYS))
    return rewards
