"""Keys that nobody reads: watched, counted, named, refused by strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.chat.characters import CharacterRenderer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.formats.unread import KeyTrackingDict, unread, whole
from lowrank.data.prepare import examine, refuse
from lowrank.data.report.statistics import DataReport
from lowrank.errors import DataError


def of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataReport:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceConfig(path=str(path), **settings)
    return examine(DataConfig(train=(source,)), renderer=CharacterRenderer())


def found(report: DataReport) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {finding.what: (finding.count, finding.rows) for finding in report.datasets[0].unread}


def test_reading_is_what_takes_a_key() -> None:
    row = KeyTrackingDict(
        {"a": 1, "b": {"c": 1, "d": {"e": 2}}, "f": [{"g": 1, "h": 2}, 3], "i": None, "j": "", "k": 5}
    )
    assert "k" in row
    assert list(row) == ["a", "b", "f", "i", "j", "k"]
    assert unread(row) == []  # nothing was opened: it may still be handed on whole
    assert row["b"]["c"] == 1
    assert row.get("f")[0]["h"] == 2
    assert unread(row) == ["a", "b.d", "f[].g", "k"]
    assert json.loads(json.dumps(row["b"])) == {"c": 1, "d": {"e": 2}}
    assert dict(row["f"][0]) == {"g": 1, "h": 2}
    assert unread(row) == ["a", "k"]
    assert {**row}["a"] == 1
    assert unread(row) == []


def test_what_is_handed_on_whole_is_plain_and_read() -> None:
    row = KeyTrackingDict({"tools": [{"function": {"name": "f", "x": {"y": 1}}}], "z": 1})
    assert row["tools"][0]["function"]["name"] == "f"
    assert unread(row) == ["tools[].function.x", "z"]
    taken = whole(row["tools"])
    assert type(taken[0]["function"]["x"]) is dict
    assert unread(row) == ["z"]


def test_columns_and_keys_of_turns_are_named_with_their_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?", "mood": "sad"}, {"role": "assistant", "content": "!"}]
    report = of(
        tmp_path,
        {"messages": turns, "id": 1},
        {"messages": turns, "id": 2, "sytem": "Be brief.", "score": 0.5},
        {"messages": [], "never": "counted, since the row is left out"},
    )
    assert found(report) == {
        "messages[].mood": (2, ("row 1", "row 2")),
        "id": (2, ("row 1", "row 2")),
        "sytem": (1, ("row 2",)),
        "score": (1, ("row 2",)),
    }
    warnings = "\n".join(report.warnings)
    assert "the key 'messages[].mood' is not read by this format: 2 rows (row 1, row 2)" in warnings
    assert "the column 'sytem' is not read by this format: 1 row (row 2); did you mean 'system'?" in warnings
    assert "'id'" not in warnings
    assert any("'id' (2 rows (row 1, row 2))" in text for text in report.information)


def test_strict_refuses_what_nobody_reads_unless_it_is_known(tmp_path: Path) -> None:
    row = {"instruction": "?", "output": "!", "id": 7, "note": "x", "empty": ""}
    with pytest.raises(DataError, match=r"'note' is not read(.|\n)*'id'(.|\n)*ignored_columns"):
        refuse(of(tmp_path, row), strict=True)
    refuse(of(tmp_path, row), strict=False)
    refuse(of(tmp_path, row, ignored_columns=("id", "note")), strict=True)


def test_a_row_for_reward_functions_is_read_whole(tmp_path: Path) -> None:
    assert found(of(tmp_path, {"prompt": "2+3?", "solution": 5, "about": {"level": 1}})) == {}


def test_a_prompt_that_only_repeats_the_chosen_chat_is_not_missed(tmp_path: Path) -> None:
    requested = [{"role": "user", "content": "?"}]
    good, bad = ([*requested, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    row = {"prompt": "?", "messages": good, "chosen": good, "rejected": bad}
    assert found(of(tmp_path, row, {**row, "prompt": "Another?"})) == {"prompt": (1, ("row 2",))}


@pytest.mark.usefixtures("allowed_code")
def test_third_parties_have_nothing_to_register(tmp_path: Path) -> None:
    format = "tests.data.third_party_format:quiz"
    report = of(tmp_path, {"question": "?", "answer": "!", "hint": "no"}, format=format)
    assert found(report) == {"hint": (1, ("row 1",))}


def test_keys_without_end_are_counted_together(tmp_path: Path) -> None:
    rows = [{"text": "x" * number, f"key {number}": 1} for number in range(1, 400)]
    report = of(tmp_path, *rows)
    assert len(report.datasets[0].unread) == 201
    assert report.datasets[0].unread[0].what == "still other keys"


def test_keys_of_an_entry_of_dataset_info_are_named_and_refused_by_strict(tmp_path: Path) -> None:
    row = {"instruction": "?", "output": "!"}
    report = of(tmp_path, row, unread_keys=("file_sha1",))
    assert any("the key 'file_sha1' of its entry in dataset_info.json is not read" in text for text in report.warnings)
    with pytest.raises(DataError, match="file_sha1"):
        refuse(report, strict=True)
    refuse(of(tmp_path, row, unread_keys=("file_sha1",), ignored_columns=("file_sha1",)), strict=True)


def test_a_system_beside_a_system_turn_is_named_unless_it_says_the_same(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    rows = [{"messages": turns, "system": text} for text in ("another", "system", "", "another")]
    report = of(tmp_path, *rows)
    assert {name: count for name, (count, _) in found(report).items()} == {"system": 2}
    with pytest.raises(DataError, match="system"):
        refuse(report, strict=True)
    chosen = [*turns[:2], {"role": "assistant", "content": "yes"}], [*turns[:2], {"role": "assistant", "content": "no"}]
    prompted = {"prompt": turns[:2], "completion": "yes", "system": "another"}
    assert "system" in found(of(tmp_path, prompted))
    assert "system" in found(of(tmp_path, {"chosen": chosen[0], "rejected": chosen[1], "system": "another"}))
