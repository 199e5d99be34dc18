"""What commands, runs and the board say on a Chinese page: every sentence of ours that a person meets there."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import lowrank.board
import lowrank.checkpoints.live_commands
import lowrank.config.checks
import lowrank.config.no_effect
import lowrank.pipelines.live_commands
from lowrank.board import form
from lowrank.board.sentences import _NUMBERS, in_chinese, known
from lowrank.board.texts import Texts, TranslatedText
from lowrank.config import validate_settings
from lowrank.errors import ConfigError
from lowrank.peer_names import PEER_NAMES
from tests.board.english import raised, returned

BOARD = Path(lowrank.board.__file__).parent
HAN = re.compile(r"[\u4e00-\u9fff]")
PLACE = re.compile(r"\{(\w+)\}")
BASE = {"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": "x"}


def unknown(sentences: set[str]) -> set[str]:
    """Those that the Chinese page would show in English; a 7 stands for every value, and nothing for a suggestion."""
    texts = {re.sub(r"(?<=\w)\{\d\}$", "", sentence) for sentence in sentences}
    filled = {PLACE.sub("7", sentence) for sentence in texts if " " in PLACE.sub("", sentence).strip(" :")}
    return {sentence for sentence in filled if any(in_chinese(line) is None for line in sentence.split("\n"))}


def test_what_the_board_refuses_is_said_in_chinese() -> None:
    found = {sentence for path in BOARD.rglob("*.py") for sentence in raised(path)}
    assert len(found) > 40
    assert unknown(found) == set()


def test_answers_to_commands_are_in_chinese() -> None:
    """All of them: what was done and what was refused, of the handler that carries them out and of their folder."""
    handler, folder = (
        Path(str(module.__file__)) for module in (lowrank.pipelines.live_commands, lowrank.checkpoints.live_commands)
    )
    answers = {
        *raised(handler),
        *raised(folder),
        *returned(handler, "_join", "_stop", "_pause", "_resume", "_priority", "_set"),
    }
    joined = {f"r8 {where}" for where in ("trains from now on", "waits for a slot: 3 jobs train at the same time")}
    assert len(answers) > 18
    assert unknown((answers - {"{1} {2}"}) | joined) == set()
    assert (
        in_chinese("r8 has optimizer.learning_rate=0.0001 from step 4 on")
        == "r8 从第 4 步起使用 optimizer.learning_rate=0.0001"
    )
    refused = "there is no job 'r' in this run; did you mean 'r8'?"
    assert in_chinese(refused) == "本次训练里没有适配器 'r'；是不是 'r8'？"


def test_settings_that_cannot_be_combined_are_explained_in_chinese() -> None:
    found: set[str] = set()
    for module in (lowrank.config.checks, lowrank.config.no_effect):
        file = Path(str(module.__file__))
        names = re.findall(r"^def (\w*(?:conflicts|unused)\w*)", file.read_text("utf-8"), re.MULTILINE)
        found |= set(returned(file, *names))
    problems = {sentence.partition(": ")[2] if PLACE.match(sentence) else sentence for sentence in found}
    problems = {re.sub(r"^\{\d\}(?=\w)", "", problem) for problem in problems}  # of which job, where there are several
    assert unknown(problems) == set(), "add them to lowrank/board/translations/sentences.zh.json"
    rollouts = "objective grpo generates answers, each device its own for as long as they last, and a shared base needs"
    several = in_chinese(f"sharded: job r8: {rollouts} all devices in step; set base: replicated")
    assert several is not None
    assert several.startswith("sharded：适配器 r8：objective grpo 要生成回答")


WRONG: list[dict[str, Any]] = [
    {"adapter": {"rank": "abc"}}, {"adapter": {"rnk": 3}}, {"adapter": {"type": "lor"}}, {"adapter": {"dropout": 2}},
    {"adapter": {"target_modules": 3}}, {"adapter": "evil:X"}, {"adaptr": {}}, {"optimizer": {"learning_rate": -1}},
    {"optimizer": {"type": "sgdx"}}, {"seed": 1.5}, {"schedule": {"type": "x"}}, {"save_steps": "x"},
    {"num_train_epochs": "many"}, {"max_steps": 0}, {"early_stopping_patience": 3}, {"resume": True, "overwrite": True},
    {"jobs": [{"adapter": {"rank": 3}}]}, {"jobs": [{"name": "a"}, {"name": "a"}]}, {"jobs": [{"name": "a/b"}]},
    {"data": None}, {"data": {"train": []}}, {"data": {"train": "lowrank/demo", "batch_size": 0}}, {"model": None},
    {"model": {"path": "lowrank/tiny", "storage": {"type": "nf5"}}}, {"objective": {"type": "grpo"}},
    {"objective": {"type": "dpo", "beta": -1}}, {"sweep": {"grid": {"adapter.rank": [4, 8]}}},
    {"sweep": {"random": {"adapter.rank": {"uniform": [1, 2]}}}}, {"sweep": {"grid": {"adapter.rnk": [4, 8]}}},
    {"lora_r": 8}, {"jobs": [{"name": "a", "fp16": True}]}, {"data": {"seed": 1}}, {"sweep": {"grid": {"lr": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=json.dumps)
def test_usual_mistakes_are_explained_in_chinese(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        validate_settings({**BASE, **wrong})
    for problem in form.problems(str(refused.value)):
        assert in_chinese(problem.text) is not None, problem.text


def test_names_of_peers_are_explained_in_chinese() -> None:
    with pytest.raises(ConfigError) as refused:
        validate_settings({**BASE, **dict.fromkeys(PEER_NAMES, 1)})
    for problem in form.problems(str(refused.value)):
        chinese = in_chinese(problem.text)
        assert chinese is not None, problem.text
        assert re.search(r"[a-z] [a-z]+ [a-z]", chinese) is None, chinese


ROWS: list[dict[str, Any]] = [
    *({"instruction": f"Say {number}", "output": f"number {number}"} for number in range(40)),
    {"instruction": "", "output": "x"}, {"instruction": "a", "output": ""}, {"instruction": "b"},
    {"instruction": 3, "output": "x"}, {"instruction": "Say 0", "output": "number 0"},
    {"instruction": "q", "output": "x " * 5000},
    {"instruction": "c", "output": "d", "extra": 3}, {"instruction": "q", "output": "<|im_end|> z"},
]  # fmt: skip
TURNS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"messages": [{"role": "user", "content": "hi"}]}, {"messages": []}, {"messages": 3},
    {"messages": [{"role": "x", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
]  # fmt: skip


@pytest.mark.parametrize("rows", [ROWS, TURNS], ids=["alpaca", "messages"])
def test_what_the_data_doctor_finds_is_in_chinese(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowrank.cli.main import main

    (tmp_path / "my rows.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "my rows.json", "--model", "lowrank/tiny", "--json"])
    assert ended.value.code == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    findings = [*report["losses"], *report["notices"]]
    assert len(findings) > 6
    assert [text for text in findings if in_chinese(text) is None] == []
    assert any(re.search("第 (41|2) 行", in_chinese(text) or "") for text in findings)


@pytest.mark.parametrize("data", ['{"a": 1', "[]", '[{"foo": 1}]'])
def test_data_that_cannot_be_used_is_explained_in_chinese(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowrank.cli.main import main

    (tmp_path / "rows.json").write_text(data, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["data", "rows.json", "--json"])
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert in_chinese(message) is not None, message


def test_what_is_not_known_is_announced_as_output() -> None:
    english, chinese = Texts("en"), Texts("zh")
    assert english.sentence("r8 is not paused") == TranslatedText("r8 is not paused", own=True)
    assert chinese.sentence("r8 is not paused") == TranslatedText("r8 没有暂停", own=True)
    assert chinese.sentence("CUDA error: <b>") == TranslatedText("CUDA error: <b>", own=False)
    assert english.reply("CUDA error") == "CUDA error"
    assert chinese.reply("CUDA error") == "命令输出：CUDA error"
    assert chinese.reply("The settings cannot be used:\n  - seed: gone wild") == (
        "命令输出：The settings cannot be used:\n  - seed: gone wild"
    )


def test_names_that_a_command_does_not_know() -> None:
    unknown_task = (
        "--tasks: lm-eval has 14683 tasks, these are not among them:\n  - nonsense; did you mean 'commonsense_qa'?"
    )
    assert in_chinese(unknown_task) == (
        "--tasks：lm-eval 有 14683 个任务，下面这些不在其中：\n  - nonsense；是不是 'commonsense_qa'？"
    )


def test_the_table_is_whole() -> None:
    for english, chinese in known().items():
        assert set(PLACE.findall(chinese)) <= set(PLACE.findall(english)), english
        assert HAN.search(chinese) or english.startswith("Value error"), english
        assert not re.search(r"[\u4e00-\u9fff][,;?!](?![a-zA-Z0-9])", chinese), f"Western punctuation: {chinese}"


ODD = "{name}%s\\1<b>"
OUR_WORDING = "{name} %s \\1 is paused already"


def filled(text: str, value: str, inner: str) -> str:
    """With a value in every place: numbers where numbers stand, and `inner` where a sentence of ours stands."""
    values = dict.fromkeys(_NUMBERS, "7")
    return PLACE.sub(
        lambda place: inner if place[1].startswith("sentence") else values.get(place[1], value),
        f"{{sentence}}{text}" if text.startswith((";", "；")) else text,  # these stand behind another sentence
    )


def test_values_come_back_as_they_are() -> None:
    """With braces, a percent sign, a group of a regular expression and a tag of HTML in them."""
    number = "a whole number"
    for english, chinese in known().items():
        assert in_chinese(filled(english, ODD, number)) == filled(chinese, ODD, known()[number])


def test_names_that_look_like_sentences_are_not_lost() -> None:
    """They are there as they are, or in Chinese where a sentence may stand, as often as they were given."""
    for english, chinese in known().items():
        answer = in_chinese(filled(english, OUR_WORDING, OUR_WORDING)) or ""
        wanted = filled(chinese, "{value}", "{value}").count("{value}")
        assert sum(answer.count(value) for value in (OUR_WORDING, "{name} %s \\1 已经暂停")) >= wanted, english


def test_no_wording_takes_long() -> None:
    """Each again and again in one line: all 260 take half a second, and an expression that explodes takes minutes."""
    begin = time.process_time()
    for english in known():
        in_chinese(" ".join([PLACE.sub("7", english)] * 30)[:1000])
    assert time.process_time() - begin < 30
