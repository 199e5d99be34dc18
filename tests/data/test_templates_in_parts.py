"""Chat templates of models that see pictures: they read contents as parts, and text arrives all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.template_sandbox import render_text
from lowrank.data.config import DataConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.records import Conversation, Message
from tests.checkpoint_folder import save_checkpoint_folder

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') "
    "%}{{ part['text'] + ' '}}{% endfor %}{% else %}{% for part in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{% generation %}{{ part['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's, by its public description."""
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif 'text' in part %}{{ part['text'] }}!{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""One that takes both; what it makes of text stays as it was."""
QUESTION = Conversation(
    (Message("user", "Where?"), Message("assistant", "Here."), Message("user", "And?"), Message("assistant", "There."))
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerFast:
    return load_tokenizer(ModelConfig(path=str(save_checkpoint_folder(tmp_path_factory.mktemp("model")))))


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (LLAVA, ["Here.<|im_end|>", "There.<|im_end|>"]),
        (SMOLVLM, [" Here.<|im_end|>", " There.<|im_end|>"]),
        (QWEN, ["Here.<|im_end|>", "There.<|im_end|>"]),
    ],
    ids=["llava", "smolvlm", "qwen"],
)
def test_text_arrives(template: str, learned: list[str], tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, DataConfig())
    rendering = renderer.render(QUESTION)
    assert rendering.problem is None
    shown = [renderer.show(segment) for segment in rendering.segments]
    assert [text for pieces in shown for text, weight in pieces if weight] == learned
    turns = [{"role": "user", "content": "Where?"}]
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
    wanted = tokenizer.apply_chat_template(
        turns if template is QWEN else in_parts, tokenize=False, add_generation_prompt=True
    )
    assert render_text(tokenizer, turns, generation_prompt=True) == wanted
    assert "Where?" in wanted


def test_a_template_that_only_the_processor_has(tmp_path: Path) -> None:
    folder = save_checkpoint_folder(tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA}))
    assert load_tokenizer(ModelConfig(path=str(folder))).chat_template == LLAVA
