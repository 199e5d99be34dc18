"""Reward functions for grpo and ppo, as TRL calls them: lists in, one number per answer out."""

from __future__ import annotations

import json
from typing import Any

KEYS = ("name", "people", "city")


def valid_json(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with exactly the three keys, else 0."""
    rewards = []
    for completion in completions:
        try:
            found = json.loads(completion[0]["content"])
        except ValueError:
            found = None
        rewards.append(float(isinstance(found, dict) and found.keys() == set(KEYS)))
    return rewards


def mentions(completions: list[list[dict[str, str]]], label: list[str], **columns: Any) -> list[float]:
    """The share of the three values of the right answer (`label`) that the answer has, in whatever form."""
    rewards = []
    for completion, expected in zip(completions, map(json.loads, label)):
        rewards.append(sum(str(expected[key]) in completion[0]["content"] for key in KEYS) / len(KEYS))
    return rewards
