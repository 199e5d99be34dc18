"""The built-in chat templates that stand for LLaMA-Factory's write the same text.

Its templates are slots per turn; here they are written out, and joined as it joins them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import lowrank.data.templates
from lowrank.compat.llamafactory.templates import TEMPLATES, choose
from lowrank.data.templates import slots, source_of
from lowrank.errors import ConfigError

EOS, BOS = "</s>", "<s>"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
GEMMA = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Slots:
    user: str
    assistant: str
    system: str
    prefix: str = ""
    default_system: str = ""
    system_in_user: bool = False


CHATML = Slots(
    user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{}<|im_end|>\n",
    system="<|im_start|>system\n{}<|im_end|>\n",
)
THEIRS = {
    "alpaca": Slots(
        user="### Instruction:\n{}\n\n### Response:\n",
        assistant="{}" + EOS + "\n\n",
        system="{}\n\n",  # their default ends with the blank line; a system prompt of the data gets it here too
        default_system=ALPACA,
    ),
    "chatml": CHATML,
    "qwen": Slots(CHATML.user, CHATML.assistant, CHATML.system, default_system=QWEN),
    "deepseek3": Slots(user="<｜User｜>{}<｜Assistant｜>", assistant="{}" + EOS, system="{}", prefix=BOS),
    "gemma": Slots(GEMMA, "{}<end_of_turn>\n", "{}\n\n", BOS, system_in_user=True),
    "gemma3": Slots(GEMMA, "{}<end_of_turn>\n", "{}\n\n", BOS, system_in_user=True),
    "llama3": Slots(
        user=LLAMA3.format("user") + "{}<|eot_id|>" + LLAMA3.format("assistant"),
        assistant="{}<|eot_id|>",
        system=LLAMA3.format("system") + "{}<|eot_id|>",
        prefix=BOS,
    ),
    "mistral": Slots("[INST] {}[/INST]", " {}" + EOS, "{}\n\n", BOS, system_in_user=True),
    "paligemma": Slots("{}\n", "{}" + EOS, "{}", BOS, system_in_user=True),
    "phi": Slots("<|user|>\n{}<|end|>\n<|assistant|>\n", "{}<|end|>\n", "<|system|>\n{}<|end|>\n"),
}


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BY_SLOTS = {
    "default": Slots("Human: {}" + EOS + "\nAssistant:", "{}" + EOS + "\n", "System: {}" + EOS + "\n"),
    "vicuna": Slots("USER: {} ASSISTANT:", "{}" + EOS, "{}", default_system=VICUNA),
    "llama2": Slots(BOS + "[INST] {} [/INST]", "{}" + EOS, "<<SYS>>\n{}\n<</SYS>>\n\n", system_in_user=True),
    "qwen3_nothink": CHATML,
    "deepseek": Slots("User: {}\n\nAssistant:", "{}" + EOS, "{}\n\n", BOS),
}
"""Some of what is written by slots (data/templates/slots.py)."""


def joined(slots: Slots, system: str, turns: list[tuple[str, str]]) -> str:
    system = system or slots.default_system
    opening = slots.system.format(system) if system else ""
    text = slots.prefix
    for number, (question, answer) in enumerate(turns):
        first = opening if number == 0 else ""
        text += slots.user.format(first + question) if slots.system_in_user else first + slots.user.format(question)
        text += slots.assistant.format(answer)
    return text


CONVERSATIONS = [[("Hi?", "Hello.")], [("1 + 1?", "2"), ("再加一?", "3")]]


def rendered(template: str, system: str, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    texts, _ = render_jinja_template([messages], chat_template=template, bos_token=BOS, eos_token=EOS)
    return str(texts[0])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("system", ["", "You are kind."])
@pytest.mark.parametrize("turns", [[("Hi?", "Hello.")], [("1 + 1?", "2"), ("再加一?", "3")]])
def test_the_same_text(name: str, system: str, turns: list[tuple[str, str]]) -> None:
    folder = lowrank.data.templates.__path__[0]
    with open(f"{folder}/{TEMPLATES[name]}.jinja", encoding="utf-8") as file:
        template = file.read()
    assert rendered(template, system, turns) == joined(THEIRS[name], system, turns)


@pytest.mark.parametrize("name", sorted(BY_SLOTS))
@pytest.mark.parametrize("system", ["", "You are kind."])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_same_text_by_slots(name: str, system: str, turns: list[tuple[str, str]]) -> None:
    expected = joined(BY_SLOTS[name], system, turns)
    assert slots.written_text(name, turns, system, BOS, EOS) == expected
    assert rendered(source_of(f"llamafactory/{name}"), system, turns) == expected


def test_every_template_of_their_registry_is_known(tmp_path: Path) -> None:
    """Each is a built-in one, one written by slots, or the tokenizer's own; those by slots are good Jinja."""
    assert len(slots.registry()) == 124
    for name in slots.registry():
        chosen = choose(name, "lowrank/tiny")
        assert chosen.setting is not None or chosen.note is None or name in chosen.note
        if slots.can_be_written(name):
            text = rendered(source_of(f"llamafactory/{name}"), "", CONVERSATIONS[1])
            assert text == slots.written_text(name, CONVERSATIONS[1], "", BOS, EOS)
    with pytest.raises(ConfigError, match="template: 'quen3' is none of LLaMA-Factory's; did you mean 'qwen3'"):
        choose("quen3", "lowrank/tiny")


CHATML_OF_QWEN3 = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}"""


def tokenizer_folder(folder: Path, template: str | None) -> str:
    config: dict[str, object] = {"eos_token": "<|im_end|>", "bos_token": None}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "template", "setting", "note"),
    [
        ("qwen3_nothink", CHATML_OF_QWEN3, None, None),
        ("qwen3", CHATML_OF_QWEN3, None, None),
        ("yi", CHATML_OF_QWEN3, None, None),
        ("yi", CHATML_OF_QWEN3.replace("<|im_start|>", "<|start|>"), None, "a question and an answer is written other"),
        ("yi", "{{ raise_exception('no') }}", None, "a question and an answer is refused"),
        ("yi", None, "llamafactory/yi", None),
        ("qwen3", None, None, "has no chat template"),
        ("vicuna", CHATML_OF_QWEN3, "llamafactory/vicuna", None),
        ("qwen", CHATML_OF_QWEN3, "qwen", None),
    ],
)
def test_a_warning_only_where_the_rendering_differs(
    name: str, template: str | None, setting: str | None, note: str | None, tmp_path: Path
) -> None:
    chosen = choose(name, tokenizer_folder(tmp_path, template))
    assert chosen.setting == setting
    assert (chosen.note is None) if note is None else (note in (chosen.note or ""))
