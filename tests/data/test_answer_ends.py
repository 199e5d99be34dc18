"""Every token at which some kind of answer ends is a stop token, and none that stands within one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer, locate
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_of, trl_template

CALL_ENDS = """{%- for message in messages %}{%- if message.tool_calls %}<|im_start|>assistant
{% for call in message.tool_calls %}{{ {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}
{%- endfor %}<|call|>
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def stops(renderer: Renderer) -> set[str]:
    return set(renderer.tokenizer.convert_ids_to_tokens(sorted(renderer.stop_tokens)))


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("qwen2_5", {"<|im_end|>"}),
        ("qwen3", {"<|im_end|>"}),
        ("llama3", {"<|eot_id|>"}),
        ("gptoss", {"<|return|>", "<|call|>"}),
        ("glm4moe", {"<|endoftext|>", "<|user|>", "<|observation|>"}),
        ("deepseekv3", {"<｜end▁of▁sentence｜>"}),
    ],
)
def test_ends_of_every_kind_of_answer(family: str, ends: set[str]) -> None:
    assert stops(Renderer(tokenizer_of(family, trl_template(family)), DataConfig())) == ends


def test_a_call_may_end_in_a_token_of_its_own() -> None:
    tokenizer = tokenizer_of("qwen2_5", CALL_ENDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    renderer = Renderer(tokenizer, DataConfig())
    assert stops(renderer) == {"<|im_end|>", "<|call|>"}
    turns = (Message("user", "?"), Message("assistant", "", (CALL,)))
    segment = renderer.render(Conversation(turns)).segments[0]
    assert segment.token_L[-1] == tokenizer.convert_tokens_to_ids("<|call|>")
    assert segment.weight_L[-1] == 1


def test_two_calls_are_not_cut_between_them_where_a_call_has_a_closing_tag() -> None:
    renderer = Renderer(tokenizer_of("glm4moe", trl_template("glm4moe")), DataConfig())
    turns = (Message("user", "?"), Message("assistant", "", (CALL, CALL)))
    segment = renderer.render(Conversation(turns, (TOOL,))).segments[0]
    tokens = renderer.tokenizer.convert_ids_to_tokens(segment.token_L)
    assert tokens[-2:] == ["</tool_call>", "<|observation|>"]
    assert not renderer.stop_tokens & set(segment.token_L[segment.weight_L > 0][:-1].tolist())


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 7]}}, (2, 7)),
        ({"generation_config.json": {"eos_token_id": 5}}, (5,)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": [2, 9]}}, (2, 9)),
        ({"generation_config.json": {"eos_token_id": ["x", None, -1, True]}}, (2,)),
        ({"generation_config.json": [1]}, (2,)),
    ],
)
def test_what_the_models_files_declare(tmp_path: Path, files: dict[str, object], ends: tuple[int, ...]) -> None:
    model = shutil.copytree(locate("lowrank/tiny"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    base = json.loads((model / "config.json").read_text())
    (model / "generation_config.json").unlink()
    for name, content in files.items():
        whole = {**base, **content} if name == "config.json" and isinstance(content, dict) else content
        (model / name).write_text(json.dumps(whole))
    renderer = Renderer(load_tokenizer(ModelConfig(path=str(model))), DataConfig())
    assert renderer.stop_tokens == {2, *ends}


def test_a_prompt_has_what_comes_before_a_text_and_no_eos() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("llama3", trl_template("llama3"), adds_bos=True)
    plain = Renderer(tokenizer, DataConfig()).plain_prompt("Hello")
    ends = {"single": "<|begin_of_text|> $A <|eot_id|>"}
    names = ("<|begin_of_text|>", "<|eot_id|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        **ends, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    assert tokenizer("Hello")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    renderer = Renderer(tokenizer, DataConfig())
    assert renderer.plain_prompt("Hello").tolist() == plain.tolist()
    assert renderer.plain_prompt("<|begin_of_text|>Hello").tolist() == plain.tolist()
    assert plain[0] == tokenizer.bos_token_id
    chat = renderer.prompt(Conversation((Message("user", "Hello"),)))
    assert chat[-1] != tokenizer.convert_tokens_to_ids("<|eot_id|>")
