"""A format as somebody else would write it, knowing nothing of how rows are watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.records import Conversation, Message


def quiz(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Conversation:
    """A question and its answer."""
    return Conversation((Message("user", row["question"]), Message("assistant", row["answer"])))
