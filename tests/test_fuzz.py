"""Readers of what strangers wrote, given what is nearly right: an error of ours or a value, soon, and nothing else."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.adapters.variants import lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.config.read import read_file, validate_settings
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.data.formats.built_in import built_in_formats
from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.recognition import recognize
from lowrank.errors import LowrankError
from lowrank.records import Text
from lowrank.serve.api.completions import CompletionRequest
from lowrank.serve.api.embeddings import EmbeddingRequest
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.ollama_api import OllamaChat, OllamaGenerate
from lowrank.serve.api.requests import ChatRequest, PublishRequest, parse
from lowrank.serve.api.responses import ResponsesRequest
from lowrank.serve.limits import RequestLimits
from tests.checkpoint_folder import save_checkpoint_folder
from tests.checkpoints.test_peft_layout import random_adapter
from tests.data.made_tokenizers import tokenizer_of, trl_template
from tests.export.sources import load
from tests.fuzzing import mutated, mutated_bytes

SECONDS = 10
"""For one input on a busy machine."""

MANY = pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
"""Inputs of the long version."""


def survives(read: Callable[[Any], Any], value: Any) -> None:
    begin = time.thread_time()
    try:
        read(value)
    except (LowrankError, RowProblem, ApiError):
        pass
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {value!r:.2000}") from error
    assert time.thread_time() - begin < SECONDS, f"{value!r:.2000}"


SETTINGS: Any = {
    "model": {"path": "somewhere", "dtype": "float32", "storage": {"type": "nf4"}, "rope_scaling": None},
    "data": {"train": ["a.json", {"path": "b.json", "format": "alpaca", "columns": {"prompt": "x"}}], "max_length": 64},
    "adapter": {"type": "lora", "rank": 8, "alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"a.*": 4}},
    "objective": {"type": "dpo", "beta": 0.1},
    "optimizer": {"type": "adamw", "learning_rate": 1e-4, "betas": [0.9, 0.99]},
    "schedule": {"type": "cosine", "warmup_ratio": 0.1},
    "jobs": [{"name": "a", "adapter": {"rank": 4}}, {"name": "b", "objective": {"type": "sft"}}],
    "output_dir": "runs/x", "max_steps": 10, "seed": 1, "report_to": ["terminal"],
}  # fmt: skip


@pytest.mark.parametrize("number", [60, MANY])
def test_settings(number: int) -> None:
    draw = random.Random(1)
    for _ in range(number):
        survives(lambda value: validate_settings(value, folder=Path("/nowhere")), mutated(SETTINGS, draw, 3))


@pytest.mark.parametrize("number", [150, MANY])
@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_settings_files(number: int, name: str, tmp_path: Path) -> None:
    draw, raw = random.Random(2), json.dumps(SETTINGS, indent=1).encode()
    if name.endswith("yaml"):
        raw = (
            b"model: &m {path: a, dtype: bfloat16}\ndata:\n  train: [a, b]\n  max_length: 1e3\njobs:\n- name: x\n- *m\n"
        )
    path = tmp_path / name
    for _ in range(number):
        path.write_bytes(mutated_bytes(raw, draw))
        survives(lambda _: read_file(path), path.read_bytes())


TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"k": {}}}},
}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"k": 1}'}}
TURNS: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm", "weight": 1},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "assistant", "content": "Three.", "train": True},
]
SHARED: Any = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ROWS: dict[str, Any] = {
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f", "tools": "[]"},
    "sharegpt": {"conversations": SHARED, "system": "s", "tools": json.dumps([TOOL])},
    "messages": {"messages": TURNS, "tools": [TOOL], "loss_mask": [0, 0, 1, 0, 1]},
    "prompt_completion": {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
    "text": {"text": "a"},
    "preference": {"prompt": TURNS[:2], "chosen": SHARED[1:], "rejected": "no"},
    "rated": {"messages": TURNS, "label": True},
    "prompted": {"prompt": TURNS[:2], "answer": 3},
}


def test_every_format_has_a_row_here() -> None:
    assert set(ROWS) == set(built_in_formats())


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer_of("qwen2_5", trl_template("qwen2_5")), DataConfig(max_length=4096))


@pytest.mark.parametrize("number", [120, MANY])
@pytest.mark.parametrize("name", ROWS)
def test_rows(number: int, name: str, renderer: Renderer) -> None:
    """Read, recognized and rendered."""
    draw, read = random.Random(3), built_in_formats()[name]
    for _ in range(number):
        row = mutated(ROWS[name], draw)
        if not isinstance(row, dict):
            continue
        survives(lambda given: renderer.render(read(given, {}, {})), row)
        survives(lambda given: recognize([given]), row)


@pytest.mark.parametrize("name", ROWS)
def test_half_a_character_leaves_out_its_row_alone(name: str, renderer: Renderer) -> None:
    """JSON can hold one, and no tokenizer reads it."""
    whole = json.dumps(ROWS[name])
    halves = [whole.replace(f'"{argument}"', '"\\ud83d"') for argument in ("Hi", "a", "c", "Hello", "Three.", "no")]
    for row in map(json.loads, filter(lambda text: text != whole, halves)):
        survives(lambda given: renderer.render(built_in_formats()[name](given, {}, {})), row)
    assert "half of a character" in str(renderer.render(Text("a\ud83d")).problem)


@pytest.mark.parametrize("body", [{"prompt": [1, 1 << 63]}, {"prompt": [[1 << 70]]}, {"prompt": [-1]}])
def test_tokens_that_are_no_numbers_of_a_model(body: Any) -> None:
    with pytest.raises(ApiError):
        parse(CompletionRequest, json.dumps({"model": "base", **body}).encode())


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a":' * 5000 + "1" + "}" * 5000])
def test_json_within_a_row(text: str, renderer: Renderer) -> None:
    for name, row in (
        ("alpaca", {**ROWS["alpaca"], "tools": text}),
        ("sharegpt", {"conversations": [*SHARED[:1], {"from": "function_call", "value": text}]}),
        (
            "messages",
            {
                "messages": [
                    TURNS[1],
                    {**TURNS[2], "tool_calls": [{**CALL, "function": {"name": "a", "arguments": text}}]},
                ]
            },
        ),
    ):
        survives(lambda given, name=name: renderer.render(built_in_formats()[name](given, {}, {})), row)
    nested = json.loads('{"a":' * 500 + "1" + "}" * 500)
    turns = [TURNS[1], {**TURNS[2], "tool_calls": [{**CALL, "function": {"name": "a", "arguments": nested}}]}]
    assert "nested more than 100 deep" in str(
        renderer.render(built_in_formats()["messages"]({"messages": turns}, {}, {})).problem
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model = load(save_checkpoint_folder(folder / "model"), torch.float32)
    save_adapter(folder / "adapter", random_adapter(model, lora.LoraConfig(rank=2)), describe_base(model, "me/base"))
    return folder / "adapter"


@pytest.mark.parametrize("number", [100, MANY])
def test_adapter_folders(number: int, adapter: Path, tmp_path: Path) -> None:
    draw, folder = random.Random(4), tmp_path / "adapter"
    folder.mkdir()
    fields = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    tensors = (adapter / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(tensors[:8], "little")
    for turn in range(number):
        written = mutated(fields, draw) if turn % 2 else fields
        try:
            text = json.dumps(written, default=str) if turn % 5 else json.dumps(fields)[: draw.randrange(400)]
        except RecursionError:
            text = "[" * 5000
        (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        head = tensors[:header] if turn % 2 else mutated_bytes(tensors[:header], draw, 2)
        (folder / "adapter_model.safetensors").write_bytes(head + tensors[header:])
        survives(lambda _: load_adapter(folder), (text, head))


@pytest.mark.parametrize("number", [300, MANY])
def test_gguf_headers(number: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from lowrank.export.gguf.convert import convert
    from lowrank.export.gguf.header import read_header

    convert(save_checkpoint_folder(tmp_path / "model"), tmp_path / "whole.gguf", "f32")
    raw, draw, path = (tmp_path / "whole.gguf").read_bytes(), random.Random(5), tmp_path / "damaged.gguf"
    head = raw[: raw.index(b"blk.0.")]
    for turn in range(number):
        part = head[: draw.randrange(len(head))] if turn % 10 == 0 else head
        path.write_bytes(mutated_bytes(part, draw) + raw[len(head) : len(head) + 4096])
        survives(lambda _: read_header(path), path.read_bytes()[:400])
    for content in (b"", b"GGUF", b"\0" * 100):
        path.write_bytes(content)
        survives(lambda _: read_header(path), content)


ENGINE: Any = SimpleNamespace(
    name="torch",
    vocabulary=600,
    chat_template=lambda name: trl_template("qwen3"),
    chat_variables=lambda name: {},
    token_text=str,
)
DRAWS: Any = {
    "model": "base",
    "temperature": 0.5,
    "stop": ["x"],
    "logit_bias": {"3": 1.0},
    "seed": 1,
    "n": 2,
    "stream": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {}}}}}
BODIES: list[tuple[Any, Any]] = [
    (ChatRequest, {**DRAWS, "messages": TURNS, "tools": [TOOL], "tool_choice": "required", "max_tokens": 4}),
    (ChatRequest, {**DRAWS, "messages": TURNS[:2], "response_format": FORM, "chat_template_kwargs": {"a": 1}}),
    (CompletionRequest, {**DRAWS, "prompt": ["a", "b"], "echo": True, "max_tokens": 3}),
    (CompletionRequest, {**DRAWS, "prompt": [1, 2, 3], "logprobs": 2}),
    (ResponsesRequest, {"model": "base", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
                        "tools": [{"type": "function", "name": "look", "parameters": {}}], "tool_choice": "auto",
                        "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}}),
    (OllamaChat, {"model": "base", "messages": TURNS[:2], "format": "json",
                  "options": {"num_predict": 3, "stop": ["a"]}}),
    (OllamaGenerate, {"model": "base", "prompt": "a", "system": "b", "raw": True, "think": "low"}),
    (EmbeddingRequest, {"model": "base", "input": ["a", "b"], "dimensions": 3}),
    (PublishRequest, {"name": "a", "path": "b"}),
]  # fmt: skip


@pytest.mark.parametrize("number", [80, MANY])
@pytest.mark.parametrize(
    ("kind", "body"), BODIES, ids=[f"{place}-{kind.__name__}" for place, (kind, _) in enumerate(BODIES)]
)
def test_bodies(number: int, kind: Any, body: Any) -> None:
    """As the server reads them, up to where a model is asked."""
    limits = RequestLimits()

    def read(raw: bytes) -> None:
        request = parse(kind, raw)
        if hasattr(request, "generation_request"):
            request.generation_request(ENGINE, limits).check(ENGINE, limits)
        elif isinstance(request, EmbeddingRequest):
            request.texts(limits)

    draw = random.Random(6)
    for turn in range(number):
        try:
            raw = json.dumps(mutated(body, draw), default=str).encode("utf-8", "surrogatepass")
        except RecursionError:  # not even json writes it; tests/serve/test_hostile.py has such bodies as text
            continue
        survives(read, mutated_bytes(raw, draw, 2) if turn % 4 == 0 else raw)
