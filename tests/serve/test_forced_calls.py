"""A call can be forced in every format the server reads: what the grammar lets a random model say is a call."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.serve.api.forced_calls import grammar_of
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.tool_calls import ToolCallReader
from lowrank.serve.api.tool_choice import read_tool_choice

llguidance = pytest.importorskip("llguidance")

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "units": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "at": {"$ref": "#/$defs/Place"},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {
                    "Place": {
                        "type": "object",
                        "properties": {"x": {"enum": [1, 2]}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "weather_of_sea"}},
]
TEMPLATES = {
    "qwen": "<tool_call>",
    "qwen3_coder": "<tool_call><function=",
    "glm4.5": "<tool_call><arg_key>",
    "llama3": '"parameters"',
    "mistral": "[TOOL_CALLS]",
    "mistral_since": "[TOOL_CALLS] [ARGS]",
    "glm4": "<|observation|>",
    "says nothing of tools": "{{ messages }}",
}


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(load_tokenizer(ModelConfig(path="lowrank/tiny")))


def drawn(vocabulary: Any, grammar: str, seed: int) -> str | None:
    """What a model without any idea says within the grammar; None if it finds no end in 160 tokens."""
    matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    draw, tokens = random.Random(seed), []
    ends = set(vocabulary.eos_tokens)
    for _ in range(160):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(token) for token in np.flatnonzero(bits) if token not in ends]
        if not allowed or (matcher.is_accepting() and draw.random() < 0.5):
            break
        forced = matcher.compute_ff_tokens()
        token = forced[0] if forced else draw.choice(allowed)
        # Texts between tags end where the model says so.
        closing = [each for each in allowed if vocabulary.decode_str([each]) in ("\n", "<", "</")]
        token = draw.choice(closing) if not forced and closing and draw.random() < 0.5 else token
        assert matcher.consume_token(token)
        tokens.append(token)
        if matcher.is_stopped():
            break
    return vocabulary.decode_bytes(tokens).decode("utf-8", "replace") if matcher.is_accepting() else None


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_said_is_a_call(vocabulary: Any, name: str) -> None:
    template, whole = TEMPLATES[name], 0
    for seed in range(6):
        described = drawn(vocabulary, grammar_of(template, TOOLS, several=seed % 2 == 0), seed)
        if described is None:
            continue
        reader = ToolCallReader(template, TOOLS, forced=True)
        shown = "".join(reader.add(described[at : at + 3]) for at in range(0, len(described), 3))
        rest, calls = reader.end()
        whole += 1
        assert shown + rest == ""
        for call in calls:
            arguments = json.loads(call["arguments"])
            assert call["name"] in ("weather", "weather_of_sea")
            if call["name"] == "weather":
                assert set(arguments) >= {"city", "days"}
                assert arguments["days"] in range(1, 10)
                assert arguments.get("units") in (None, "C", "F")
                assert arguments.get("at") in (None, {"x": 1}, {"x": 2})
        assert len(calls) == 1 or seed % 2 == 0
    assert whole >= 2, "so few calls show nothing"


def test_choices() -> None:
    every = [TOOLS[0], TOOLS[1]]
    assert read_tool_choice(TOOLS, None) == read_tool_choice(TOOLS, "auto")
    assert read_tool_choice(TOOLS, "none").shown == []
    assert read_tool_choice(TOOLS, "required").callable == every
    for named in ({"type": "function", "function": {"name": "weather"}}, {"type": "function", "name": "weather"}):
        choice = read_tool_choice(TOOLS, named)
        assert (choice.callable, choice.shown, choice.forced) == ([TOOLS[0]], every, True)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather_of_sea"}}]}
    for given in ({"type": "allowed_tools", "allowed_tools": allowed}, {"type": "allowed_tools", **allowed}):
        choice = read_tool_choice(TOOLS, given)
        assert (choice.callable, choice.shown, choice.forced) == ([TOOLS[1]], [TOOLS[1]], True)
    for wrong in (
        "must",
        3,
        {"type": "function"},
        {"type": "function", "function": {"name": "nothing"}},
        {"type": "x"},
    ):
        with pytest.raises(ApiError, match="tool_choice"):
            read_tool_choice(TOOLS, wrong)
    with pytest.raises(ApiError, match="nothing to call"):
        read_tool_choice([], "required")
