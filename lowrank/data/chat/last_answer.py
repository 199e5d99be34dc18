"""The last answer of a record, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.unread import whole
from lowrank.records import Conversation, Message, Preference, Prompted, Rated, Record


def split_last_answer(record: Record) -> tuple[Conversation, Message]:
    """`(what leads to the last answer, the answer)`; of a preference, the chosen one. RowProblem if there is none."""
    if isinstance(record, Preference):
        return record.prompt, record.chosen
    if isinstance(record, Rated):
        record = record.conversation
    if isinstance(record, Prompted):
        raise RowProblem("no answer: the row has only a prompt")
    if not isinstance(record, Conversation):
        raise RowProblem("plain text asks nothing")
    answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
    if not answers:
        raise RowProblem("no answer: the conversation has no turn of the assistant")
    label = record.messages[answers[-1]]
    if not label.content.strip():
        raise RowProblem("the answer is empty")
    if answers[-1] == 0:
        raise RowProblem("nothing comes before the answer")
    return replace(record, messages=record.messages[: answers[-1]]), label


def as_prompted(function: Callable[..., Record]) -> Callable[..., Prompted]:
    """A format whose records are asked anew: the last answer becomes the label, and the row goes along."""

    def read(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Prompted:
        record = function(row, columns, tags)
        if isinstance(record, Prompted):
            return record
        prompt, label = split_last_answer(record)
        return Prompted(prompt, whole(row), label.content)

    return read
