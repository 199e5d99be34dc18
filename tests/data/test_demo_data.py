"""The demo's dataset: made by its recipe, and nothing held out is ever trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "lowrank" / "data" / "demo"


def rows(name: str) -> list[tuple[str, str]]:
    lines = (DEMO / name).read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    assert all([message["role"] for message in each] == ["user", "assistant"] for each in messages)
    return [(each[0]["content"], each[1]["content"]) for each in messages]


def test_no_held_out_message_or_answer_is_in_the_training_rows() -> None:
    train, held_out = rows("train.jsonl"), rows("heldout.jsonl")
    assert (len(train), len(held_out)) == (2000, 200)
    assert not {question for question, _ in train} & {question for question, _ in held_out}
    assert not {answer for _, answer in train} & {answer for _, answer in held_out}


def test_answers_parse_and_agree_with_their_messages() -> None:
    chinese = 0
    for question, answer in rows("train.jsonl") + rows("heldout.jsonl"):
        record = json.loads(answer)
        assert list(record) == ["name", "people", "city"]
        assert record["name"] in question
        assert record["city"] in question
        assert 2 <= record["people"] <= 20
        chinese += any("\u4e00" <= letter <= "\u9fff" for letter in question)
    assert 0.4 < chinese / 2200 < 0.6


def test_the_files_are_what_the_recipe_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "examples" / "tiny-base" / "demo_data.py", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
