"""The built-in chat templates that stand for LLaMA-Factory's write the same text.

Its templates are slots per turn; here they are written out, and joined as it joins them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import lowrank.data.templates
from lowrank.compat.llamafactory import TEMPLATES

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
    "phi": Slots("<|user|>\n{}<|end|>\n<|assistant|>\n", "{}<|end|>\n", "<|system|>\n{}<|end|>\n"),
}


def joined(slots: Slots, system: str, turns: list[tuple[str, str]]) -> str:
    system = system or slots.default_system
    opening = slots.system.format(system) if system else ""
    text = slots.prefix
    for number, (question, answer) in enumerate(turns):
        first = opening if number == 0 else ""
        text += slots.user.format(first + question) if slots.system_in_user else first + slots.user.format(question)
        text += slots.assistant.format(answer)
    return text


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("system", ["", "You are kind."])
@pytest.mark.parametrize("turns", [[("Hi?", "Hello.")], [("1 + 1?", "2"), ("再加一?", "3")]])
def test_the_same_text(name: str, system: str, turns: list[tuple[str, str]]) -> None:
    folder = lowrank.data.templates.__path__[0]
    with open(f"{folder}/{TEMPLATES[name]}.jinja", encoding="utf-8") as file:
        template = file.read()
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    texts, _ = render_jinja_template([messages], chat_template=template, bos_token=BOS, eos_token=EOS)
    assert texts[0] == joined(THEIRS[name], system, turns)
