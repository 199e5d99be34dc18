"""Modelfiles by a strict reader of Ollama's grammar, and templates in Go's language by a renderer of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lowrank.data.chat.template import without_marks
from lowrank.data.templates import choose, names, required_tokens
from lowrank.errors import ModelError
from lowrank.export.publish.go_template import turn_texts
from lowrank.export.publish.modelfile import Modelfile, parse, printable
from tests.export.ollama.go_renderer import render
from tests.export.ollama.modelfile_reader import WrongModelfile, read

TORTURE = ["plain", "two\nlines", ' "quoted" ', 'ends in "', '""', "trailing space ", "# no comment", "\n",
           "你好，世界", "{{ .System }}\n  {{- end }}", "tab\tin it", "a\r\nb"]  # fmt: skip


@pytest.mark.parametrize("value", TORTURE)
def test_every_value_comes_back(value: str) -> None:
    written = Modelfile("./a model-Q8_0.gguf", "./b.gguf", value, value, value, (("num_ctx", 4096), ("stop", value)))
    text = written.text()
    expected = [("from", "./a model-Q8_0.gguf"), ("adapter", "./b.gguf"), ("num_ctx", "4096"), ("stop", value),
                ("template", value), ("system", value), ("license", value)]  # fmt: skip
    assert read(text) == expected
    assert parse(text) == written


def test_both_readers_agree_on_random_texts() -> None:
    """Ours is what deploys what a person has changed by hand."""
    rng = random.Random(0)
    agreed = 0
    for _ in range(3000):
        value = "".join(rng.choice(['"', '"', "a", " ", "\n", "#"]) for _ in range(rng.randint(1, 9)))
        text = f"FROM x\nsystem {value}\nPARAMETER stop b\n"
        try:
            theirs: Any = dict(read(text)).get("system")
        except WrongModelfile:
            theirs = None
        try:
            ours = parse(text).system
        except ModelError:
            ours = None
        if theirs is not None and ours is not None:
            assert ours == theirs, text
            agreed += 1
    assert agreed > 1000


@pytest.mark.parametrize("value", ['has """ in it', "zero\u200bwidth", "form\x0cfeed", "no-break\u00a0space"])
def test_what_the_format_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(ModelError, match="Modelfile: SYSTEM"):
        Modelfile("x", system=value).text()


def test_wrong_lines_are_named() -> None:
    for text, described in (
        ("FROM x\nFORM y\n", "line 2: 'form'"),
        ("SYSTEM x\n", "no FROM"),
        ('FROM "x\n', "never closed"),
        ("FROM x\nPARAMETER num_ctx many\n", "expected a number"),
        ("FROM x\nMESSAGE user hi\n", "MESSAGE"),
    ):
        with pytest.raises(ModelError, match=described):
            parse(text)
    assert printable("a\u200b你🙂\x0c\n") == "a你🙂\n"


# ---- templates in Go's language --------------------------------------------------------------------------------------

CHATS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "你好 🙂")],
    [("user", "a"), ("assistant", 'b "c"\n'.strip()), ("user", "{{ d }}")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]
GO = (
    "chatml",
    "deepseek",
    "gemma",
    "llama3",
    "phi3",
    "vicuna",
    "zephyr",
    "alpaca",
    "mistral",
    "llama2",
    "glm4",
    "qwen",
)


class Tokens:
    """A tokenizer with every special token."""

    bos_token, eos_token, bos_token_id, chat_template = "<s>", "</s>", None, None

    def get_vocab(self) -> dict[str, int]:
        from lowrank.data.templates import _text

        return {token: 0 for name in names() for token in required_tokens(_text(name))}


def jinja(text: str) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    def call(turns: Any, waiting: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in turns]
        found, _ = render_jinja_template(
            [chat], chat_template=text, add_generation_prompt=waiting, bos_token="<s>", eos_token="</s>"
        )
        return found[0]

    return call


@pytest.mark.parametrize("name", names())
def test_go_template_says_what_jinja_says(name: str) -> None:
    """Or is refused: none that is written differs."""
    text = without_marks(choose(Tokens(), name))
    write = jinja(text)
    try:
        source = turn_texts(write, "<s>").go()
    except ModelError:
        assert name not in GO
        return
    for chat in CHATS:
        assert render(source, chat) == write(chat, True).removeprefix("<s>"), chat
    assert read(Modelfile("x", template=source).text())[1] == ("template", source)


def test_templates_that_do_more_are_refused() -> None:
    loud = jinja("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}")
    numbered = jinja("{% for m in messages %}<{{ loop.index }}{{ m.role }}>{{ m.content }}{% endfor %}"
                     "{% if add_generation_prompt %}<a>{% endif %}")  # fmt: skip
    for write in (loud, numbered):
        with pytest.raises(ModelError, match="cannot be written as Go's"):
            turn_texts(write, None)


@pytest.mark.parametrize("name", names())
def test_marks_leave_no_trace(name: str) -> None:
    marked = choose(Tokens(), name)
    plain = without_marks(marked)
    assert "generation %" not in plain
    for chat in CHATS[:1] + CHATS[2:3]:
        assert jinja(plain)(chat, True) == jinja(marked)(chat, True)
