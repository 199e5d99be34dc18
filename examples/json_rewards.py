"""Reward functions for grpo and ppo, as TRL calls them: lists in, one number per answer out."""

from __future__ import annotations

import json
from typing import Any

KEYS = ("name", "people", "city")


def read(completion: list[dict[str, str]]) -> dict[str, Any]:
    """The JSON object an answer is; empty if it is none."""
    try:
        found = json.loads(completion[0]["content"])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def valid_json(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with exactly the three keys; up to 0.3 for keys in anything else, so that there is a way up.

    What is rewarded is what comes: with a little for any JSON, the model learns to answer {} within 10 steps.
    """
    rewards = []
    for completion in completions:
        written = sum(f'"{key}":' in completion[0]["content"] for key in KEYS)
        rewards.append(1.0 if read(completion).keys() == set(KEYS) else 0.1 * written)
    return rewards


def right_values(completions: list[list[dict[str, str]]], label: list[str], **columns: Any) -> list[float]:
    """The share of the three values that are those of the answer in the data (`label`)."""
    rewards = []
    for completion, expected in zip(completions, map(json.loads, label)):
        found = read(completion)
        rewards.append(sum(found.get(key) == expected[key] for key in KEYS) / len(KEYS))
    return rewards
