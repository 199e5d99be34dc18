"""Built-in chat templates: equal to the families' own, masks equal to transformers', clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowrank.data import templates
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_of, trl_template

FAMILY = {
    "alpaca": "plain", "chatml": "qwen2_5", "deepseek": "deepseekv3", "deepseek_r1": "deepseekv3", "gemma": "gemma",
    "glm4": "glm4moe", "llama2": "mistral", "llama3": "llama3", "mistral": "mistral", "phi3": "phi3", "qwen": "qwen2_5",
    "paligemma": "paligemma", "vicuna": "mistral", "zephyr": "mistral",
}  # fmt: skip
"""A tokenizer each template suits."""
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
WITH_SYSTEM = [{"role": "system", "content": "rules"}, *CHAT]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
WRITTEN = {
    "alpaca": ALPACA + "\n\n### Instruction:\none\n\n### Response:\ntwo<|endoftext|>\n\n"
    "### Instruction:\nthree\n\n### Response:\nfour<|endoftext|>\n\n",
    "chatml": "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>one<｜Assistant｜>two<｜end▁of▁sentence｜>"
    "<｜User｜>three<｜Assistant｜>four<｜end▁of▁sentence｜>",
    "glm4": "[gMASK]<sop><|user|>\none<|assistant|>\ntwo<|user|>\nthree<|assistant|>\nfour<|user|>",
    "llama2": "<s>[INST] one [/INST] two </s><s>[INST] three [/INST] four </s>",
    "mistral": "<s>[INST] one[/INST] two</s>[INST] three[/INST] four</s>",
    "paligemma": "<bos>one\ntwo<eos>three\nfour<eos>",
    "vicuna": "<s>" + VICUNA + " USER: one ASSISTANT: two</s>USER: three ASSISTANT: four</s>",
    "zephyr": "<s><|user|>\none</s>\n<|assistant|>\ntwo</s>\n<|user|>\nthree</s>\n<|assistant|>\nfour</s>\n",
}
SYSTEM_WRITTEN = {
    "alpaca": "rules\n\n### Instruction:\none\n\n",
    "gemma": "<bos><start_of_turn>user\nrules\n\none<end_of_turn>\n",
    "llama2": "<s>[INST] <<SYS>>\nrules\n<</SYS>>\n\none [/INST]",
    "mistral": "<s>[INST] rules\n\none[/INST]",
    "paligemma": "<bos>rulesone\n",
    "vicuna": "<s>rules USER: one ",
    "zephyr": "<s><|system|>\nrules</s>\n<|user|>\none",
    "glm4": "[gMASK]<sop><|system|>\nrules<|user|>\none",
}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def renderer_of(name: str, **settings: Any) -> Renderer:
    return Renderer(tokenizer_of(FAMILY[name]), DataConfig(chat_template=name, **settings))


def text_of(name: str, messages: list[dict[str, Any]], **more: Any) -> str:
    renderer = renderer_of(name)
    return renderer.tokenizer.apply_chat_template(
        messages, chat_template=renderer.chat_template, tokenize=False, **more
    )


def conversation_of(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(Message(message["role"], message["content"]) for message in messages))


def test_every_template_is_tried_here() -> None:
    assert sorted(FAMILY) == templates.names()


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_masks_are_those_of_transformers(name: str) -> None:
    renderer = renderer_of(name)
    rendering = renderer.render(conversation_of(CHAT))
    assert rendering.problem is None
    (segment,) = rendering.segments
    expected = renderer.tokenizer.apply_chat_template(
        CHAT, chat_template=renderer.chat_template, return_assistant_tokens_mask=True
    )
    assert segment.token_L.tolist() == expected["input_ids"][: len(segment)]
    assert segment.weight_L.tolist() == expected["assistant_masks"][: len(segment)]
    assert not any(expected["assistant_masks"][len(segment) :])
    pieces = renderer.show(segment)
    assert [text.strip().startswith(answer) for text, weight in pieces if weight for answer in ["two", "four"]]
    assert segment.token_L[-1] in renderer.stop_tokens
    bos = renderer.tokenizer.bos_token_id
    if templates.adds_bos(renderer.tokenizer) and name != "llama2":  # Llama 2 begins every exchange with it
        assert segment.token_L.tolist().count(bos) == 1
        assert segment.token_L[0] == bos
    assert renderer.notices == () or name == "deepseek_r1"


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_learned_text_is_the_answers_and_an_end(name: str) -> None:
    renderer = renderer_of(name)
    (segment,) = renderer.render(conversation_of(CHAT)).segments
    ends = {renderer.tokenizer.decode([stop]) for stop in renderer.stop_tokens}
    learned = [text.strip() for text, weight in renderer.show(segment) if weight]
    assert len(learned) == 2
    for text, answer in zip(learned, ["two", "four"]):
        assert text.startswith(answer)
        assert text.removeprefix(answer).strip() in ends


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_text_is_the_public_format(name: str) -> None:
    text = text_of(name, CHAT)
    assert (
        text == ("<｜begin▁of▁sentence｜>" if name == "chatml" and not text.startswith("<|im") else "") + WRITTEN[name]
    )


@pytest.mark.parametrize("name", sorted(SYSTEM_WRITTEN))
def test_system_prompts_stand_where_the_format_has_them(name: str) -> None:
    assert text_of(name, WITH_SYSTEM).startswith(SYSTEM_WRITTEN[name])


@pytest.mark.parametrize(("name", "original"), [("qwen", "qwen2_5"), ("llama3", "llama3"), ("gemma", "gemma")])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_equals_the_familys_own_template(name: str, original: str, prompt: bool) -> None:
    renderer = renderer_of(name)
    for messages in [CHAT[:3] if prompt else CHAT] + ([] if name == "gemma" else [WITH_SYSTEM]):
        own = renderer.tokenizer.apply_chat_template(
            messages, chat_template=trl_template(original), tokenize=False, add_generation_prompt=prompt
        )
        assert text_of(name, messages, add_generation_prompt=prompt) == own


def test_phi3_equals_its_own_template_up_to_the_end() -> None:
    own = render_jinja_template([WITH_SYSTEM], chat_template=trl_template("phi3"), eos_token="")[0][0]
    assert text_of("phi3", WITH_SYSTEM) == "<s>" + own  # this tokenizer puts BOS before text, as Phi-3's base does


def test_qwen_writes_tools_as_the_original() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "两"}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Once more", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Three."},
    ]
    for start in ([], [{"role": "system", "content": "rules"}]):
        own = render_jinja_template([[*start, *messages]], tools=[TOOL], chat_template=trl_template("qwen2_5"))[0][0]
        assert text_of("qwen", [*start, *messages], tools=[TOOL]) == own


def test_r1_learns_to_think_from_where_its_prompt_ends() -> None:
    renderer = renderer_of("deepseek_r1")
    messages = [dict(message) for message in CHAT]
    for message in messages[1::2]:
        message["content"] = f"<think>\nhm {message['content']}\n</think>\n\n{message['content']}"
    rendering = renderer.render(conversation_of(messages))
    shown = [renderer.show(segment) for segment in rendering.segments]
    assert [text for pieces in shown for text, weight in pieces if weight] == [
        message["content"] + "<｜end▁of▁sentence｜>" for message in messages[1::2]
    ]
    assert shown[1][0][0].endswith("<｜User｜>one<｜Assistant｜>two<｜end▁of▁sentence｜><｜User｜>three<｜Assistant｜>")


def test_a_base_without_a_template_is_told_what_to_choose() -> None:
    def message(family: str) -> str:
        with pytest.raises(ModelError) as caught:
            Renderer(tokenizer_of(family), DataConfig()).render(conversation_of(CHAT))
        return str(caught.value)

    assert all(name in message("plain") for name in templates.names())
    assert "alpaca is a good choice" in message("plain")
    assert "chatml is a good choice" in message("qwen2_5")
    assert "llama3 is a good choice" in message("llama3")
    assert "gemma is a good choice" in message("gemma")
    assert "paligemma is a good choice" in message("paligemma")
    assert "phi3 is a good choice" in message("phi3")


def test_a_template_whose_tokens_are_missing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"(?s)lacks: <\|im_start\|>, <\|im_end\|>.*use llama3"):
        _ = Renderer(tokenizer_of("llama3"), DataConfig(chat_template="chatml")).chat_template


def test_unknown_names_and_files(tmp_path: Path) -> None:
    def choose(setting: str) -> str:
        return Renderer(tokenizer_of("qwen2_5", "own"), DataConfig(chat_template=setting)).chat_template

    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        choose("chatm")
    with pytest.raises(ConfigError, match="cannot read"):
        choose(str(tmp_path / "absent.jinja"))
    (tmp_path / "mine.jinja").write_text(trl_template("qwen2_5"), encoding="utf-8")
    assert choose(str(tmp_path / "mine.jinja")) == trl_template("qwen2_5")
    (tmp_path / "broken.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot render a question"):
        choose(str(tmp_path / "broken.jinja"))


def test_the_tokenizers_own_template_comes_first() -> None:
    own = trl_template("llama3")
    assert Renderer(tokenizer_of("llama3", own), DataConfig()).chat_template == own


def test_bos_is_written_where_the_tokenizer_would_add_it() -> None:
    assert templates.choose(tokenizer_of("llama3", adds_bos=True), "alpaca").startswith("{{- bos_token }}")
    assert "bos_token" not in templates.choose(tokenizer_of("llama3", adds_bos=False), "alpaca")
