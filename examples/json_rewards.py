"""Reward functions for grpo and ppo, as TRL calls them: lists in, one number per answer out."""

from __future__ import annotations

import json
from typing import Any

KEYS = {"name", "people", "city"}


def read(completion: list[dict[str, str]]) -> dict[str, Any] | None:
    """The JSON object an answer is, or None."""
    try:
        found = json.loads(completion[0]["content"])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def valid_json(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with the right keys, 0.2 for any other JSON object."""
    found = [read(completion) for completion in completions]
    return [0.0 if each is None else 1.0 if each.keys() == KEYS else 0.2 for each in found]


def right_values(completions: list[list[dict[str, str]]], label: list[str], **columns: Any) -> list[float]:
    """The share of the three values that are those of the answer in the data (`label`)."""
    rewards = []
    for completion, expected in zip(completions, map(json.loads, label)):
        found = read(completion) or {}
        rewards.append(sum(found.get(key) == expected[key] for key in KEYS) / len(KEYS))
    return rewards
