"""What a dataset is, by its columns; and which column is called otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.chat.characters import CharacterRenderer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.formats.recognition import recognize
from lowrank.data.prepare import examine, refuse
from lowrank.data.report.statistics import DataReport
from lowrank.errors import DataError
from lowrank.records import Conversation, Preference, Prompted, Rated, Text

TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def report(tmp_path: Path, *rows: dict[str, Any], record: type | None = None, **settings: Any) -> DataReport:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train=(SourceConfig(path=str(path), **settings),))
    return examine(config, renderer=CharacterRenderer(), record=record)


@pytest.mark.parametrize("record", [None, Conversation])
@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"instruction": "?", "anwser": "!"}, "columns: {response: 'anwser'}`; did you mean 'anwser' for 'output'"),
        ({"instruction": "?", " output": "!"}, "did you mean ' output' for 'output'"),
        ({"Instruction": "?", "Output": "!"}, "did you mean 'Instruction' for 'instruction' and 'Output' for 'output'"),
        ({"question": "?", "answer": "!"}, "columns: {prompt: 'question', response: 'answer'}"),
        ({"converstions": TURNS}, "did you mean 'converstions' for 'conversations'"),
        ({"conversation": TURNS}, "columns: {messages: 'conversation'}"),
    ],
)
def test_a_slip_is_told_about_its_column(row: dict[str, Any], hint: str, record: type | None) -> None:
    with pytest.raises(DataError) as raised:
        recognize([row], {}, record)
    assert hint in str(raised.value)
    assert "objective" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "record", "hint"),
    [
        ({"prompt": "?", "choosen": "!", "rejected": "x"}, Preference, "did you mean 'choosen' for 'chosen'"),
        ({"prompt": "?", "winner": "!", "loser": "x"}, Preference, "columns: {chosen: 'winner', rejected: 'loser'}"),
        ({"instruction": "?", "output": "!", "kto_tga": True}, Rated, "did you mean 'kto_tga' for 'kto_tag'"),
        ({"instruction": "?", "output": "!", "score": 3}, Rated, "no column plays the part kto_tag (kto_tag or label)"),
        ({"instruction": "?", "note": "x"}, Conversation, "no column plays the part response (output)"),
        ({"txt": "x"}, Text, "did you mean 'txt' for 'text'"),
    ],
)
def test_what_the_objective_needs_is_told_as_columns(row: dict[str, Any], record: type, hint: str) -> None:
    with pytest.raises(DataError) as raised:
        recognize([row], {}, record)
    assert hint in str(raised.value)


def test_prompts_for_reward_functions_may_have_any_column() -> None:
    for row in ({"prompt": "?", "answer": "5"}, {"prompt": "?", "solution": 5, "outputs": 1}):
        assert recognize([row], {}, Prompted) == "prompted"
    assert recognize([{"prompt": "?", "answer": "5"}]) == "prompted"


@pytest.mark.parametrize("tags", [("good", "bad"), ("up", "down")])
def test_labels_that_are_no_yes_or_no_are_named_with_their_column(tags: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output": "a", "kto_tag": tags[n % 2]} for n in range(4)]
    with pytest.raises(
        DataError, match=rf"4 rows .* column 'kto_tag' holds text \('{tags[0]}'\), expected true or false"
    ):
        refuse(report(tmp_path, *rows, record=Rated), strict=False)
    named = [{"instruction": "q", "output": "a", "label": row["kto_tag"]} for row in rows]
    with pytest.raises(DataError, match="column 'label' holds text"):
        refuse(report(tmp_path, *named, record=Rated), strict=False)


@pytest.mark.parametrize("name", ["kto_tag", "label"])
def test_ones_and_zeros_are_labels_where_labels_are_wanted(name: str, tmp_path: Path) -> None:
    found = report(tmp_path, *({"instruction": f"q{n}", "output": "a", name: n % 2} for n in range(4)), record=Rated)
    assert (found.datasets[0].used, found.datasets[0].format) == (4, "rated")


def test_a_mapped_column_that_is_not_there_is_no_reason_to_take_another(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "instruction": "a", "output": "b", "reply": "c"}] * 2
    with pytest.raises(DataError, match=r"columns\.response: there is no column 'replly', .*did you mean 'reply'"):
        report(tmp_path, *rows, columns={"response": "replly"})
    assert report(tmp_path, *rows, columns={"response": "reply"}).shown[0][1][0] == "c"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (1, r"expected text, got a number \(1\) in column 'output'; put quotation marks around it"),
        (["a", "b"], r"expected text, got a list .* in column 'output'; make a row of each"),
        ({"a": 1}, "an object .* in column 'output'; write it as text, or map another"),
        (True, "true/false .* in column 'output'"),
    ],
)
def test_answers_of_another_type_say_the_column_and_the_way_out(output: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        refuse(report(tmp_path, {"instruction": "?", "output": output}), strict=False)


LOSSES = (
    "a picture is missing",
    "a video is missing",
    "not as many places as",
    "plain text has no turn",
    "as text only",
)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "<image>What is it?", "output": "a cat"},
        {"instruction": "What is it?", "output": "a cat", "image": "cat.png"},
        {"messages": TURNS, "images": ["cat.png"]},
        {"messages": [{"role": "user", "content": "hear <audio>"}, TURNS[1]]},
        {"text": "<video> of a cat"},
        {"text": "a cat", "video": "cat.mp4"},
        {"prompt": "<image>?", "chosen": "a", "rejected": "b"},
    ],
)
def test_pictures_and_sound_are_never_learned_as_text(row: dict[str, Any], tmp_path: Path) -> None:
    (dataset,) = report(tmp_path, row).datasets
    assert (dataset.used, sum(finding.count for finding in dataset.dropped)) == (0, 1)
    assert any(phrase in dataset.losses[0] for phrase in LOSSES)


def test_html_and_empty_columns_are_no_pictures(tmp_path: Path) -> None:
    rows = [
        {"instruction": "How?", "output": "<video>\n<source src='x.mp4'>\n</video>"},
        {"instruction": "How?", "output": "So.", "images": [], "image": None},
    ]
    assert report(tmp_path, *rows).datasets[0].used == 2
    put = report(tmp_path, {"instruction": "<image>?", "output": "So."}, replace={"<image>": ""})
    assert put.datasets[0].used == 1
