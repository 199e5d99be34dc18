"""Calls are read as the models' own templates (those that TRL ships) write them, whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowrank.data import templates
from lowrank.serve.api.tool_calls import ToolCallReader

_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "-",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "weather_of_sea", "parameters": {"type": "object", "properties": {}}}},
]
ONE = [("weather", {"city": '北京 "x" <b>', "days": 3, "units": ["C", "m/s"]})]
TWO = [*ONE, ("weather_of_sea", {})]
MISTRAL = "{{ '[TOOL_CALLS]' }}"
GLM4 = "{{ '<|observation|>' }}"


def rendered(template: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """The answer with `calls` as the template writes it, without special tokens, as a decoder leaves it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=how.get("ensure_ascii", False))
    environment.globals["strftime_now"] = lambda form: "2026-01-01"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    requested = [{"role": "user", "content": "?"}]
    made = [{"type": "function", "function": {"name": name, "arguments": each}} for name, each in calls]
    answered = [*requested, {"role": "assistant", "content": "", "tool_calls": made}]
    options: dict[str, Any] = {"tools": TOOLS, "bos_token": "", "eos_token": ""}
    rendered = environment.from_string(template)
    before = rendered.render(messages=requested, add_generation_prompt=True, **options)
    after = rendered.render(messages=answered, add_generation_prompt=False, **options)
    text = after[len(before) :] if after.startswith(before) else after[after.rindex("assistant") + len("assistant") :]
    for special in ("<|im_end|>", "<|eot_id|>", "<|end_header_id|>", "<|assistant|>", "<|observation|>"):
        text = text.replace(special, "")
    for thought in ("<think></think>", "<think>\n\n</think>"):
        text = text.replace(thought, "")
    return text


def read(template: str, text: str, size: int | None = None) -> tuple[str, list[tuple[str, Any]]]:
    """The text that is shown, and the calls, of an answer that comes in pieces of `size` characters."""
    reader = ToolCallReader(template, TOOLS)
    size = size or max(1, len(text))
    shown = "".join(reader.add(text[place : place + size]) for place in range(0, len(text), size))
    rest, calls = reader.end()
    return shown + rest, [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("qwen2_5", TWO),
        ("qwen3", TWO),
        ("qwen3_instruct_2507", TWO),
        ("qwen3_5_nothink", TWO),
        ("llama3_1", ONE),
        ("llama3_2", ONE),
        ("glm4moe", TWO),
    ],
)
def test_calls_as_the_template_writes_them(name: str, calls: list[Any]) -> None:
    template = (_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    text = rendered(template, calls)
    assert "weather" in text
    for size in (None, 1, 3, 7):
        assert read(template, text, size) == ("", calls)


def test_calls_as_our_own_template_writes_them() -> None:
    text = (Path(templates.__file__).parent / "qwen.jinja").read_text("utf-8")
    plain = text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert read(plain, rendered(plain, TWO), 2) == ("", TWO)


@pytest.mark.parametrize(
    ("template", "text", "calls"),
    [
        (MISTRAL, ' [{"name": "weather", "arguments": {"city": "x"}, "id": "abcdefg"}]', [("weather", {"city": "x"})]),
        (MISTRAL, 'weather{"city": "x"}weather_of_sea{}', [("weather", {"city": "x"}), ("weather_of_sea", {})]),
        (GLM4, '\nweather\n{"city": "x"}', [("weather", {"city": "x"})]),
        ('"parameters"', '{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {"days": 1}}',
         [("weather", {}), ("weather", {"days": 1})]),
    ],
)  # fmt: skip
def test_formats_whose_markers_are_special_tokens(template: str, text: str, calls: list[Any]) -> None:
    for size in (None, 1, 4):
        assert read(template, text, size) == ("", calls)


@pytest.mark.parametrize("template", ["<tool_call>", MISTRAL, GLM4, "no tools"])
@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        "weather: fine",
        "weathered stone",
        ' [1, 2] and {"a": 1}',
        '{"name": "unknown", "arguments": {}}',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>\nbroken",
        "a <tool_ca",
        "x < y\n\n",
        "",
    ],
)
def test_what_is_no_call_of_an_offered_tool_stays_text(template: str, text: str) -> None:
    for size in (None, 1, 5):
        assert read(template, text, size) == (text, [])


def test_text_is_shown_as_soon_as_it_is_sure() -> None:
    reader = ToolCallReader("<tool_call>", TOOLS)
    assert reader.add("Let me look. ") == "Let me look."
    assert reader.add("a<b") == " a<b"
    assert reader.add('\n<tool_call>{"name": "weather"}') == ""
    assert reader.add("</tool_call>") == ""
    assert reader.end() == ("", [{"name": "weather", "arguments": "{}"}])
    reader = ToolCallReader(GLM4, TOOLS)
    assert reader.add("weather") == ""
    assert reader.add(" today") == "weather today"
    assert reader.add("{") == "{"


def test_a_call_that_was_cut_off_takes_no_others_with_it() -> None:
    whole = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    assert read("<tool_call>", whole + '<tool_call>{"name": "wea') == ("", [("weather", {})])
    assert read("<tool_call>", whole + "<tool_call>broken</tool_call>")[1] == []
