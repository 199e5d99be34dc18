"""Turns reach the chat template whole, whatever project's spelling they are in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.data.formats.built_in import messages
from lowrank.data.formats.columns import RowProblem
from lowrank.records import Conversation
from lowrank.serve.api.requests import ChatRequest
from lowrank.serve.limits import RequestLimits
from tests.data.made_tokenizers import tokenizer_of, tokenizer_with, trl_template
from tests.data.test_any_template import TOKENS

SCHEMA = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL = {"type": "function", "function": SCHEMA}
IDS_OF_NINE = """{%- for message in messages %}
{%- if message.role == 'user' %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}{% for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}
{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}
{{- {'content': message.content, 'name': message.name | default(''), 'call_id': message.tool_call_id} | tojson }}
{%- else %} {{ message.content }}{{ eos_token }}
{%- endif %}{% endfor %}"""
ID_IS_THE_NAME = """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'tool' %}## Return of {{ message.tool_call_id }}
{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<call>{{ call['id'] }}<with>{{ call.function.arguments | tojson }}
{%- endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def parallel(ids: tuple[str, str] | None) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"city": "Oslo"}}} for name in ("weather", "time")
    ]
    results: list[dict[str, Any]] = [
        {"role": "tool", "name": name, "content": described}
        for name, described in (("time", "noon"), ("weather", "rain"))
    ]
    if ids:
        calls = [{**call, "id": each} for call, each in zip(calls, ids)]
        results = [{**result, "tool_call_id": each} for result, each in zip(results, reversed(ids))]
    turns = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    return {"messages": [*turns, {"role": "assistant", "content": "It rains."}], "tools": [TOOL]}


def text_of(renderer: Renderer, row: dict[str, Any]) -> str:
    rendering = renderer.render(messages(row, {}, {}))
    assert rendering.problem is None
    return renderer.tokenizer.decode(rendering.segments[-1].token_L)


@pytest.mark.parametrize(
    ("template", "ids"),
    [(IDS_OF_NINE, ("a1b2c3d4e", "f1b2c3d4e")), (ID_IS_THE_NAME, ("functions.weather:0", "functions.time:1"))],
)
def test_ids_and_names_of_calls_and_results_reach_the_template(template: str, ids: tuple[str, str]) -> None:
    renderer = Renderer(tokenizer_of("qwen2_5", template), DataConfig())
    row = parallel(ids)
    expected = renderer.tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    assert text_of(renderer, row) == expected.strip()
    requested = {**row, "model": "m", "messages": row["messages"][:-1]}
    engine: Any = SimpleNamespace(chat_template=lambda name: template, chat_variables=lambda name: {})
    question = ChatRequest(**requested).understood(engine, RequestLimits()).question
    assert isinstance(question, Conversation)
    prompt = renderer.tokenizer.decode(renderer.prompt(question))
    assert prompt == renderer.tokenizer.apply_chat_template(
        row["messages"][:-1], tools=row["tools"], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("template", [IDS_OF_NINE, ID_IS_THE_NAME])
def test_ids_a_template_insists_on_are_made_where_a_row_has_none(template: str) -> None:
    text = text_of(Renderer(tokenizer_of("qwen2_5", template), DataConfig()), parallel(None))
    assert "rain" in text
    assert "It rains." in text
    assert ("call00000" in text) == (template == IDS_OF_NINE)
    assert ("functions.time:1" in text) == (template == ID_IS_THE_NAME)


@pytest.mark.parametrize("field", ["thinking", "reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
)
def test_a_thought_is_written_as_transformers_writes_it(name: str, field: str) -> None:
    template = trl_template(name)
    tokenizer = tokenizer_with(sorted(set(TOKENS.findall(template))), template)
    turns = [
        {"role": "user", "content": "17 + 25?"},
        {"role": "assistant", field: "MYTHOUGHT: 30, then 12.", "content": "42."},
    ]
    try:
        expected = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:
        pytest.skip("it wants other contents")
    if "42" not in expected:
        pytest.skip("it wants other contents")
    renderer = Renderer(tokenizer, DataConfig())
    rendering = renderer.render(messages({"messages": turns}, {}, {}))
    if rendering.problem:
        assert "MYTHOUGHT" not in expected, rendering.problem
        assert "the chat template leaves out part of the answer" in rendering.problem
        return
    (segment,) = rendering.segments
    if "MYTHOUGHT" in expected:
        text = str(tokenizer.decode(segment.token_L))
        assert str(expected).startswith(re.sub(r"(</s>|<\|user\|>)$", "", text))
    assert "MYTHOUGHT" in "".join(described for described, weight in renderer.show(segment) if weight)


def flagged(wrong: dict[str, Any], right: dict[str, Any], **row: Any) -> dict[str, Any]:
    turns = [
        ("user", "2+2?", {}),
        ("assistant", "WRONG five", wrong),
        ("user", "Sure?", {}),
        ("assistant", "RIGHT four", right),
    ]
    return {"messages": [{"role": role, "content": text, **more} for role, text, more in turns], **row}


@pytest.mark.parametrize(
    "row",
    [
        *(
            flagged({name: off}, {name: on})
            for name in (
                "weight",
                "loss",
                "train",
                "training",
                "trainable",
                "loss_weight",
                "loss_scale",
                "loss_mask",
                "step_loss_mask",
            )
            for off, on in ((0, 1), (False, True), (0.0, 1.0), ("false", "true"))
        ),
        flagged({}, {}, loss_mask=[0, 1]),
        flagged({}, {}, loss_mask=[0, 0, 0, 1]),
        flagged({}, {}, loss_mask=[1, 0, 1, 1]),
        flagged({}, {}, loss_mask="[false, true]"),
    ],
    ids=str,
)
def test_flags_in_any_spelling_keep_a_turn_as_context(row: dict[str, Any]) -> None:
    renderer = Renderer(tokenizer_of("qwen2_5", trl_template("qwen2_5")), DataConfig())
    segment = renderer.render(messages(row, {}, {})).segments[0]
    assert [described for described, weight in renderer.show(segment) if weight] == ["RIGHT four<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (flagged({"loss": 0.5}, {}), "unusable loss: turn 2"),
        (flagged({"weight": 1, "train": False}, {}), "contradictory weights: turn 2"),
        (flagged({}, {}, loss_mask=[0, 1, 1]), "unusable loss_mask: 3 flags for 4 turns, 2 of them answers"),
        (flagged({}, {}, loss_mask=[0, 2]), "unusable loss_mask"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        messages(row, {}, {})


def test_tools_are_found_where_projects_put_them() -> None:
    arguments = json.dumps({"city": "Oslo"})
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    chat = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    legacy = [
        chat[0],
        {"role": "assistant", "function_call": call["function"]},
        {"role": "function", "name": "weather", "content": "rain"},
        chat[3],
    ]
    rows = [
        {"tools": [TOOL], "messages": chat},
        {"functions": [SCHEMA], "messages": legacy},
        {"functions": json.dumps([SCHEMA]), "messages": legacy},
        {"tool_defs": [TOOL], "messages": chat},
        {"tools": [json.dumps(TOOL)], "messages": chat},
        {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, *chat]},
        {"messages": [{"role": "system", "content": "", "tool_defs": [TOOL]}, *chat]},
        {"messages": [{"role": "system", "content": "", "functions": json.dumps([SCHEMA])}, *legacy]},
    ]
    renderer = Renderer(tokenizer_of("qwen2_5", trl_template("qwen2_5")), DataConfig())
    found = [messages(row, {}, {}) for row in rows]
    assert {json.dumps(each.tools) for each in found} == {json.dumps([TOOL])}
    texts = [text_of(renderer, row) for row in rows]
    assert texts[0] == texts[1] == texts[2] == texts[3] == texts[4]
    assert all("Tells the weather." in text for text in texts)
