"""Formats: every docstring example as stated, every mistake of a row named, the real datasets whole."""

from __future__ import annotations

import doctest
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig, SourceConfig, format_names
from lowrank.data.formats import built_in
from lowrank.data.formats.built_in import OBJECTIVES_OF, built_in_formats, find_format, record_type
from lowrank.data.formats.columns import RowProblem, check_mapping
from lowrank.data.formats.recognition import recognize
from lowrank.errors import DataError
from lowrank.records import Conversation, Message, Preference, Prompted, Rated, Record, Text
from tests.data.made_tokenizers import tokenizer_of, trl_template
from tests.data.transcripts import transcript

pytestmark = pytest.mark.usefixtures("allowed_code")


def make(
    name: str, row: dict[str, Any], columns: dict[str, str] | None = None, tags: dict[str, str] | None = None
) -> Any:
    return find_format(name)(row, columns or {}, tags or {})


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("name", built_in_formats())
def test_docstring_example_renders_as_stated(name: str) -> None:
    seen: list[Record] = []

    def shown(record: Record) -> str:
        seen.append(record)
        return transcript(record)

    function = built_in_formats()[name]
    scope = {**vars(built_in), "transcript": shown}
    examples = doctest.DocTestFinder(recurse=False).find(function, name, globs=scope)
    runner = doctest.DocTestRunner(verbose=False)
    for example in examples:
        runner.run(example, out=lambda text: None, clear_globs=False)
    results = runner.summarize(verbose=False)
    assert results.attempted > 0
    assert results.failed == 0
    assert {type(record) for record in seen} == {record_type(function)}
    renderer = Renderer(tokenizer_of("qwen2_5", trl_template("qwen2_5")), DataConfig())
    assert all(rendering.segments for rendering in renderer.render_many(seen))


def test_every_kind_of_record_has_a_format_and_the_help_names_them_all() -> None:
    made = {record_type(function) for function in built_in_formats().values()}
    assert made == {Conversation, Text, Preference, Rated, Prompted} == set(OBJECTIVES_OF)
    assert set(format_names()) == set(built_in_formats())
    assert ", ".join(format_names()) in SourceConfig.model_json_schema()["properties"]["format"]["description"]


def test_alpaca_joins_by_a_newline_and_keeps_the_system_prompt() -> None:
    row = {"instruction": "Add.", "input": "2+3", "output": "5", "system": " Be\nbrief. "}
    assert make("alpaca", row).messages == (
        Message("system", " Be\nbrief. "),
        Message("user", "Add.\n2+3"),
        Message("assistant", "5"),
    )
    assert make("alpaca", {**row, "instruction": "", "system": None}).messages[0] == Message("user", "2+3")
    mapped = make("alpaca", {"q": "Hi", "a": "Ho", "input": "x"}, {"prompt": "q", "response": "a", "query": ""})
    assert mapped.messages == (Message("user", "Hi"), Message("assistant", "Ho"))


def test_tool_calls_come_out_alike_from_sharegpt_and_openai() -> None:
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    schema = {"name": "weather", "parameters": {"type": "object"}}
    ours = make(
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "?"},
                {"from": "function_call", "value": json.dumps([call, call])},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "Rain."},
            ],
            "tools": json.dumps([schema]),
        },
    )
    openai_call = {"id": "1", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
    theirs = make(
        "messages",
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": None, "tool_calls": [openai_call, openai_call]},
                {"role": "tool", "content": "rain", "tool_call_id": "1"},
                {"role": "assistant", "content": "Rain."},
            ],
            "tools": [{"type": "function", "function": schema}],
        },
    )
    assert ours.messages[1].tool_calls == ({"type": "function", "function": call},) * 2
    assert theirs.messages[1].tool_calls == ({"id": "1", "type": "function", "function": call},) * 2
    assert theirs.messages[2].fields == {"tool_call_id": "1"}
    without = (
        replace(theirs.messages[1], tool_calls=ours.messages[1].tool_calls),
        replace(theirs.messages[2], fields={}),
    )
    assert ours == replace(theirs, messages=(theirs.messages[0], *without, theirs.messages[3]))
    assert ours.tools == ({"type": "function", "function": schema},)


def test_what_is_said_before_a_call_is_the_same_turn() -> None:
    turns = [
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
    ]
    message = make("sharegpt", {"conversations": turns}).messages[1]
    assert (message.content, len(message.tool_calls)) == ("Let me see.", 1)
    assert message.tool_calls[0]["function"]["arguments"] == {}


def test_tags_rename_roles() -> None:
    turns = [{"who": "Q", "what": "Hi"}, {"who": "A", "what": "Ho"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A"}
    assert make("sharegpt", {"messages": turns}, {}, tags).messages == (
        Message("user", "Hi"),
        Message("assistant", "Ho"),
    )


def test_weight_reasoning_and_parts() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "value": "3?"}]},
            {"role": "assistant", "content": "6", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "5", "reasoning_content": "hm", "weight": 1},
        ]
    }
    messages = make("messages", row).messages
    assert messages[0].content == "2+3?"
    assert [message.trained for message in messages] == [True, False, True, True]
    assert (messages[3].content, messages[3].thought) == ("5", "hm")


def test_preference_forms_agree() -> None:
    question, good, bad = {"role": "user", "content": "Q"}, "good", "bad"
    answers = [{"role": "assistant", "content": text} for text in (good, bad)]
    forms = [
        {"prompt": "Q", "chosen": good, "rejected": bad},
        {"prompt": [question], "chosen": [answers[0]], "rejected": [answers[1]]},
        {"chosen": [question, answers[0]], "rejected": [question, answers[1]]},
        {"instruction": "Q", "input": "", "chosen": answers[0], "rejected": answers[1]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": answers[0], "rejected": answers[1]},
    ]
    expected = Preference(Conversation((Message("user", "Q"),)), Message("assistant", good), Message("assistant", bad))
    assert [make("preference", form) for form in forms] == [expected] * len(forms)
    assert [recognize([form]) for form in forms] == ["preference"] * len(forms)


def test_rated_reads_any_conversation() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": chat(("user", "Q"), ("assistant", "A")), "label": True},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "label": "true"},
        {"instruction": "Q", "output": "A", "kto_tag": True},
        {"prompt": "Q", "completion": "A", "label": True},
    ]
    made = [make("rated", row) for row in rows]
    assert made == [Rated(Conversation((Message("user", "Q"), Message("assistant", "A"))), True)] * 4
    assert [recognize([row]) for row in rows] == ["rated"] * 4


PROBLEMS: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a", "answer": "b"}, r"missing column 'output' .*the row has 'instruction', 'answer'"),
    ("alpaca", {"instruction": "a", "output": " "}, "empty answer: turn 2"),
    ("alpaca", {"instruction": "a", "output": None}, "empty response: column 'output' is null"),
    ("alpaca", {"instruction": "a", "output": 5}, "wrong type for response: expected text, got a number"),
    ("alpaca", {"instruction": "", "output": "b"}, "empty question: turn 1"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "wrong type for history"),
    ("messages", {"messages": chat(("assistant", "a"))}, "wrong role order: turn 1 is assistant after the beginning"),
    ("messages", {"messages": chat(("user", "a"), ("user", "b"))}, "wrong role order: turn 2 is user after user"),
    ("messages", {"messages": chat(("user", "a"))}, "wrong role order: the last turn is user"),
    (
        "messages",
        {"messages": chat(("user", "a"), ("assistant", "b"), ("system", "c"))},
        "wrong role order: turn 3 is system after assistant, expected user or tool",
    ),
    ("messages", {"messages": []}, "empty conversation"),
    ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "unknown role 'robot': turn 1"),
    ("messages", {"messages": [{"content": "a"}]}, "missing role: turn 1 has no 'role'"),
    ("messages", {"messages": [{"role": "user", "text": "a"}]}, "missing content: turn 1 has no 'content'"),
    ("messages", {"messages": ["a"]}, "wrong type for messages: turn 1 is text"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "input_file"}]}]}, "content part input_file"),
    (
        "messages",
        {"messages": [*chat(("user", "a")), {"role": "assistant", "content": "b", "weight": 0}]},
        "nothing to learn",
    ),
    ("messages", {"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, "unusable weight"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
        "broken tool call: turn 2 is not JSON",
    ),
    ("sharegpt", {"conversations": chat(("user", "a"), ("assistant", "b")), "tools": "[1]"}, "broken tools"),
    ("text", {"text": "\n"}, "empty text"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "empty answer"),
    ("rated", {"prompt": "a", "completion": "b", "label": "good"}, "wrong type for kto_tag"),
]


@pytest.mark.parametrize(("name", "row", "problem"), PROBLEMS)
def test_every_problem_is_named(name: str, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowProblem, match=f"^{problem}"):
        make(name, row)


@pytest.mark.parametrize(
    ("row", "columns", "name"),
    [
        ({"instruction": "a", "output": "b"}, {}, "alpaca"),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "response": "answer"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "a"}]}, {}, "sharegpt"),
        ({"messages": chat(("user", "a"))}, {}, "messages"),
        ({"prompt": "a", "completion": "b"}, {}, "prompt_completion"),
        ({"text": "a"}, {}, "text"),
        ({"raw": "a"}, {"prompt": "raw"}, "text"),
        ({"text": "a", "label": 3}, {}, "text"),
    ],
)
def test_recognized(row: dict[str, Any], columns: dict[str, str], name: str) -> None:
    assert recognize([row, row], columns) == name


def test_not_recognized_lists_the_columns_and_mixed_schemas_are_refused() -> None:
    with pytest.raises(DataError, match=r"columns 'question', 'answer'; set `format`"):
        recognize([{"question": "a", "answer": "b"}])
    rows = [{"instruction": "a", "output": "b"}] * 3 + [{"messages": chat(("user", "a"))}]
    with pytest.raises(DataError, match=r"mixed schemas: alpaca \(first in row 1\), messages \(first in row 4\)"):
        recognize(rows)


def test_unknown_formats_parts_and_tags_get_suggestions() -> None:
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        find_format("alpacca")
    with pytest.raises(DataError, match=r"promt.*did you mean 'prompt'(.|\n)*role_tags.*did you mean 'role_tag'"):
        check_mapping("x", {"promt": "q"}, {"role_tags": "r"})


def test_third_partys_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quiz_format.py").write_text(
        "from lowrank.records import Conversation, Message\n"
        "def quiz(row, columns, tags) -> Conversation:\n"
        "    return Conversation((Message('user', row['q']), Message('assistant', row['a'])))\n"
        "def bare(row, columns, tags): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    quiz = find_format("quiz_format:quiz")
    assert record_type(quiz) is Conversation
    assert transcript(quiz({"q": "x", "a": "y"}, {}, {})) == "user: x\nassistant: y"
    with pytest.raises(DataError, match="annotate what it returns"):
        find_format("quiz_format:bare")
    with pytest.raises(DataError, match="cannot import 'no_such_module:f'"):
        find_format("no_such_module:f")


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-format.md").read_text(encoding="utf-8")
    first, second = (block.split("```")[0] for block in page.split("```python\n")[1:])
    (tmp_path / "quiz_format.py").write_text(first)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quiz_format", raising=False)
    quiz = find_format("quiz_format:quiz")
    (example,) = doctest.DocTestParser().get_examples(second.split('"""')[1])
    assert (
        eval(example.source, {"quiz": quiz, "transcript": transcript, "print": lambda text: text})
        == example.want.strip()
    )
    with pytest.raises(RowProblem, match=r"^no correct option: 'x' is not"):
        quiz({"question": "?", "options": [], "correct": "x"}, {}, {})


@pytest.mark.parametrize(
    ("file", "name", "good"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("alpaca_zh_demo.json", "alpaca", 1000),
        ("identity.json", "alpaca", 91),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("glaive_toolcall_zh_demo.json", "sharegpt", 300),
        ("dpo_en_demo.json", "preference", 300),
        ("dpo_zh_demo.json", "preference", 300),
        ("kto_en_demo.json", "rated", 300),
        ("reason_tool_use_demo_50.jsonl", "messages", 50),
        ("mllm_demo.json", "messages", 6),
    ],
)
def test_real_datasets(file: str, name: str, good: int, shared_data: Path) -> None:
    text = (shared_data / file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)
    assert recognize(rows[:100]) == name
    made = [make(name, row) for row in rows]
    assert len(made) == good
    calls = {
        turn["value"] for row in rows for turn in row.get("conversations", ()) if turn.get("from") == "function_call"
    }
    found = sum(len(m.tool_calls) for record in made if isinstance(record, Conversation) for m in record.messages)
    assert found >= len(calls)
