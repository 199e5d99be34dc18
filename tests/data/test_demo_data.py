"""The demo's dataset: the skill is real, every answer is right, and nothing of the held-out rows is in training.

Counts and times are read out of the messages by a second, independent reading written here.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "lowrank" / "data" / "demo"
RECIPE = ROOT / "examples" / "tiny-base"
KEYS = ["name", "item", "count", "city", "time"]

EN_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
EN_NUMBERS = {word: number for number, word in enumerate(EN_WORDS)} | {"fifteen": 15, "twenty": 20, "twenty-four": 24}
EN_SPECIAL = {"half a dozen": 6, "two dozen": 24, "a dozen": 12, "a couple of": 2, "a pair of": 2}
ZH_WORDS = ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二"]
ZH_NUMBERS = {word: number for number, word in enumerate(ZH_WORDS)} | {"两": 2, "十五": 15, "二十": 20, "二十四": 24}
ZH_SPECIAL = {"一对": 2, "半打": 6, "一打": 12, "两打": 24}
AFTERNOON = ("pm", "afternoon", "evening", "下午", "晚上")

_word = "|".join(sorted(EN_NUMBERS, key=len, reverse=True))
_zh = "|".join(sorted(ZH_NUMBERS, key=len, reverse=True))
EN_TIME = re.compile(
    rf"(?P<h>\d{{1,2}}):(?P<m>\d\d)(?: (?P<half>am|pm))?|(?P<h2>\d{{1,2}}) (?P<half2>am|pm)|(?P<noon>noon)"
    rf"|(?P<rel>half past|quarter past|quarter to) (?P<w>{_word}) in the (?P<part>\w+)"
    rf"|(?P<w2>{_word}) o'clock in the (?P<part2>\w+)"
)
ZH_TIME = re.compile(
    rf"(?P<h>\d\d):(?P<m>\d\d)|(?P<part>早上|上午|中午|下午|晚上)(?P<n>\d+|{_zh})点(?P<rest>半|整|一刻|三刻|15分|45分)?"
)


def read(name: str) -> list[tuple[str, dict[str, Any], str]]:
    """(message, answer, answer as text) of each row."""
    rows = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        rows.append((user["content"], json.loads(assistant["content"]), assistant["content"]))
    return rows


TRAIN, HELD_OUT = read("train.jsonl"), read("heldout.jsonl")
BOTH = pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "heldout"])


def is_chinese(message: str) -> bool:
    return re.search("[\u4e00-\u9fff]", message) is not None


def afternoon(hour: int, part: str | None) -> int:
    return hour + 12 if part in AFTERNOON and hour < 12 else hour


def english_time(match: re.Match[str]) -> str:
    if match["noon"]:
        return "12:00"
    if match["h"]:
        return f"{afternoon(int(match['h']), match['half']):02d}:{match['m']}"
    if match["h2"]:
        return f"{afternoon(int(match['h2']), match['half2']):02d}:00"
    if match["w2"]:
        return f"{afternoon(EN_NUMBERS[match['w2']], match['part2']):02d}:00"
    if match["rel"] == "quarter to":  # a quarter to one in the afternoon is still 12:45
        hour = EN_NUMBERS[match["w"]] - 1 or 12
        if match["w"] == "twelve" and match["part"] == "morning":
            return "11:45"
        return f"{afternoon(hour, match['part']):02d}:45"
    return f"{afternoon(EN_NUMBERS[match['w']], match['part']):02d}:{'30' if match['rel'] == 'half past' else '15'}"


def chinese_time(match: re.Match[str]) -> str:
    if match["h"]:
        return f"{match['h']}:{match['m']}"
    said = match["n"]
    hour = afternoon(int(said) if said.isdigit() else ZH_NUMBERS[said], match["part"])
    minute = {None: 0, "整": 0, "半": 30, "一刻": 15, "15分": 15, "三刻": 45, "45分": 45}[match["rest"]]
    return f"{hour:02d}:{minute:02d}"


def counts_in(text: str, chinese: bool) -> list[int]:
    """Every quantity of a message whose time has been cut out."""
    special, numbers = (ZH_SPECIAL, ZH_NUMBERS) if chinese else (EN_SPECIAL, EN_NUMBERS)
    found = []
    for phrase, number in special.items():
        if phrase in text:
            found.append(number)
            text = text.replace(phrase, "")
    words = sorted(numbers, key=len, reverse=True)
    pattern = rf"\d+|{'|'.join(words)}" if chinese else rf"\b(?:\d+|{'|'.join(words)})\b"
    return found + [int(word) if word.isdigit() else numbers[word] for word in re.findall(pattern, text)]


def test_sizes_and_languages() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (2400, 200)
    for rows in (TRAIN, HELD_OUT):
        assert sum(is_chinese(message) for message, _, _ in rows) == len(rows) // 2
        assert len({message for message, _, _ in rows}) == len(rows)


def test_nothing_held_out_is_in_training() -> None:
    assert not {message for message, _, _ in TRAIN} & {message for message, _, _ in HELD_OUT}
    assert not {text for _, _, text in TRAIN} & {text for _, _, text in HELD_OUT}
    customers = {answer["name"] for _, answer, _ in HELD_OUT}
    assert not customers & {answer["name"] for _, answer, _ in TRAIN}


@BOTH
def test_answers_are_strict(rows: list[tuple[str, dict[str, Any], str]]) -> None:
    for _, answer, text in rows:
        assert list(answer) == KEYS
        assert text == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        assert type(answer["count"]) is int
        assert re.fullmatch(r"[012]\d:(00|15|30|45)", answer["time"])


@BOTH
def test_copied_slots_stand_in_the_message(rows: list[tuple[str, dict[str, Any], str]]) -> None:
    for message, answer, _ in rows:
        assert answer["name"] in message
        assert answer["city"] in message
        assert answer["item"].removesuffix("y") in message, message


@BOTH
def test_normalised_slots_agree_with_a_second_reading(rows: list[tuple[str, dict[str, Any], str]]) -> None:
    distracted = 0
    for message, answer, _ in rows:
        chinese = is_chinese(message)
        times = list((ZH_TIME if chinese else EN_TIME).finditer(message))
        assert len(times) == 1, message
        assert (chinese_time if chinese else english_time)(times[0]) == answer["time"], message
        rest = message.replace(times[0][0], " ").replace(answer["item"], " ").replace(answer["name"], " ")
        counts = counts_in(rest, chinese)
        assert answer["count"] in counts, message
        distracted += len(set(counts)) > 1
    assert 0 < distracted < len(rows) // 5  # some messages name a number that is not the answer


def test_the_recipe_makes_the_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    runpy.run_path(str(RECIPE / "demo_data.py"))["write"](tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
