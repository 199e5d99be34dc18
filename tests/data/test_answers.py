"""Preference pairs and rated answers, in the ways people write them, from the row to the segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowrank.data.batching.mismatched import with_mismatched
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.data.formats.built_in import find_format
from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.recognition import recognize
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.records import Conversation, Message, Preference, Rated
from lowrank.segments import CHOSEN, MISMATCHED, REJECTED, Segment
from tests.data.transcripts import transcript

QUESTION = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Short."}
PLAIN = "user: 2 + 2?\nchosen: 4\nrejected: 5"


def parse(row: dict[str, Any], **columns: str) -> str:
    return transcript(find_format(recognize([row], columns))(row, columns, {}))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"instruction": "2 +", "input": "2?", "chosen": "4", "rejected": "5"}, id="alpaca"),
        pytest.param({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, id="trl explicit text"),
        pytest.param({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}, id="trl explicit chat"),
        pytest.param({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, id="trl implicit"),
        pytest.param({"messages": [QUESTION], "chosen": GOOD, "rejected": BAD}, id="openai"),
        pytest.param(
            {"prompt": "2 + 2?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, id="question said twice"
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            id="sharegpt",
        ),
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    assert parse(row).replace("2 +\n2?", "2 + 2?") == PLAIN


def test_nothing_of_a_longer_chat_is_lost() -> None:
    """`prompt` is its first question only, as in the well-known binarised sets."""
    more = [GOOD, {"role": "user", "content": "Sure?"}]
    row = {"prompt": "2 + 2?", "chosen": [QUESTION, *more, GOOD], "rejected": [QUESTION, *more, BAD]}
    assert parse(row) == "user: 2 + 2?\nassistant: 4\nuser: Sure?\nchosen: 4\nrejected: 5"
    with_system = {**row, "system": "Short."}
    assert parse(with_system) == "system: Short.\n" + parse(row)
    first = {"chosen": [SYSTEM, QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]}
    assert parse(first) == f"system: Short.\n{PLAIN}"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "4", "rejected": "5"}, "missing prompt: there is no column for it"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "equal answers"),
        ({"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "?"}, BAD]}, "two different prompts"),
        ({"prompt": "2 + 2?", "chosen": "", "rejected": "5"}, "empty answer"),
    ],
)
def test_pairs_that_cannot_be_used(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        find_format("preference")(row, {}, {})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4", "label": True},
        {"prompt": [QUESTION], "completion": [GOOD], "label": True},
        {"messages": [QUESTION, GOOD], "label": True},
        {"instruction": "2 + 2?", "output": "4", "kto_tag": True},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "kto_tag": "true"},
    ],
)
def test_ratings(row: dict[str, Any]) -> None:
    assert parse(row) == "user: 2 + 2?\nassistant: 4\n=> desirable"


def render(record: Preference | Rated, **settings: Any) -> Any:
    return Renderer(load_tokenizer(ModelConfig(path="lowrank/tiny")), DataConfig(**settings)).render(record)


def pair(chosen: str, rejected: str) -> Preference:
    return Preference(
        Conversation((Message("user", "Go."),)), Message("assistant", chosen), Message("assistant", rejected)
    )


def test_a_pair_shares_its_prompt_to_the_token_also_when_it_is_cut() -> None:
    for max_length in (2048, 20):
        rendering = render(pair("one two three " * 9, "four five six " * 9), max_length=max_length)
        chosen, rejected = rendering.segments
        assert (chosen.role, rejected.role) == (CHOSEN, REJECTED)
        at = [int(np.flatnonzero(each.weight_L)[0]) for each in (chosen, rejected)]
        assert at[0] == at[1] > 0
        np.testing.assert_array_equal(chosen.token_L[: at[0]], rejected.token_L[: at[0]])
        assert all(each.weight_L[at[0] :].all() for each in (chosen, rejected))  # the answer to its end, and no more
        assert (rendering.truncated_tokens > 0) == (max_length == 20)


def test_a_pair_that_differs_only_beyond_the_cut_is_left_out() -> None:
    rendering = render(pair("one two three " * 20 + "yes", "one two three " * 20 + "no"), max_length=30)
    assert rendering.segments == ()
    assert rendering.problem.startswith("equal answers after cutting: too long")


def rated(prompt: int, answer: int, role: int = CHOSEN) -> tuple[Segment]:
    return (Segment(np.array([1, prompt, 2, answer, answer]), np.array([0, 0, 0, 1, 1], np.float32), role=role),)


def test_mismatched_answers_come_from_the_nearest_row_with_another_prompt() -> None:
    samples = [rated(7, 10), rated(7, 11, REJECTED), rated(8, 12), rated(8, 13), rated(9, 14)]
    made = list(with_mismatched(samples, max_length=100))
    assert [sample[0] is given[0] for sample, given in zip(made, samples)] == [True] * 5
    assert all(other.role == MISMATCHED and other.pair == -1 for _, other in made)
    pairs = [(int(other.token_L[1]), int(other.token_L[3])) for _, other in made]
    assert pairs == [(7, 12), (7, 12), (8, 11), (8, 11), (9, 13)]
    assert [list(other.weight_L) for _, other in made] == [[0, 0, 0, 1, 1]] * 5


def test_mismatched_answers_of_one_prompt_or_one_row() -> None:
    same = [
        [int(other.token_L[3]) for _, other in with_mismatched([rated(7, n) for n in range(10, 10 + count)], 100)]
        for count in (1, 3)
    ]
    assert same == [[10], [12, 10, 11]]


def test_mismatched_answers_are_cut_and_keep_the_order_of_a_stream() -> None:
    samples = [rated(7 + n % 3, n) for n in range(200)]
    made = list(with_mismatched(iter(samples), max_length=4))
    assert [int(sample[0].token_L[3]) for sample in made] == list(range(200))
    assert {len(other) for _, other in made} == {4}
