"""Questions with a known answer, from any dataset that training reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank.data.chat.last_answer import split_last_answer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.dataset import open_datasets, read_record
from lowrank.data.formats.columns import RowProblem
from lowrank.errors import DataError
from lowrank.notices import log_notice
from lowrank.records import Conversation, Message


@dataclass(frozen=True)
class Question:
    """`prompt` waits for an answer; `label` is the one in the data. `place` says where it stands."""

    place: str
    prompt: Conversation
    label: Message

    @property
    def answered(self) -> Conversation:
        """With the answer of the data."""
        return replace(self.prompt, messages=(*self.prompt.messages, self.label))


def read_questions(
    source: SourceConfig,
    *,
    seed: int = 42,
    root: Path | None = None,
    notify: Callable[[str], None] = log_notice,
) -> list[Question]:
    """The last answer of every conversation, as a question; of a preference, the chosen one.

    `notify` is called with how many rows cannot be used and why. Media of every kind are read: who is asked says what
    it cannot take. Raises DataError if no row can be used.
    """
    (dataset,) = open_datasets(DataConfig(train=(source,)), None, seed, root, given_as="data")
    questions: list[Question] = []
    problems: list[str] = []
    for row in dataset.rows(notify):
        try:
            prompt, label = split_last_answer(read_record(row, dataset, _any_kind))
            questions.append(Question(f"{row.place} row {row.number}", prompt, label))
        except RowProblem as problem:
            problems.append(f"row {row.number}: {problem}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        text = (
            f"{dataset.title}: {len(problems)} rows are no questions with an answer ({'; '.join(problems[:3])}{more})"
        )
        if not questions:
            raise DataError(text)
        notify(text)
    if not questions:
        raise DataError(f"{dataset.title} has no rows")
    return questions


def _any_kind(kind: str) -> bool:
    del kind
    return True
