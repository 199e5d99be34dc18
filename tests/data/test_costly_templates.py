"""Chat templates of strangers that loop or grow end soon, in little memory, with one sentence; others are as before."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowrank.data import templates
from lowrank.data.chat import template_budget, template_sandbox
from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.template import as_dict
from lowrank.data.chat.template_budget import TemplateCostsTooMuch
from lowrank.data.chat.template_sandbox import render_text
from lowrank.data.config import DataConfig
from lowrank.errors import ModelError
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_with, trl_template
from tests.data.test_any_template import NAMES, Conversations

CHAT = Conversation((Message("user", "one"), Message("assistant", "two")))
DOUBLINGS = "{% set x = x ~ x %}" * 60
MANY = "{% for i in range(99999) %}"
COSTLY = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": MANY + MANY + MANY + "{% endfor %}" * 3,
    "filtered loops": "{% for i in range(99999) if false %}{% endfor %}".join([MANY, "{% endfor %}"]) * 9,
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "written loop": MANY + "a" * 50_000 + "{% endfor %}",
    "~": "{% set x = 'ab' %}" + DOUBLINGS,
    "wide ~": "{% set x = 'a' * 4000000 %}{{ " + " ~ ".join(["x"] * 3000) + " }}",
    "+": "{% set x = 'ab' %}" + DOUBLINGS.replace("~", "+"),
    "+ of lists": "{% set x = [1] %}" + DOUBLINGS.replace("~", "+"),
    "*": "{{ 'a' * 10**10 }}",
    "* reversed": "{{ 10**10 * 'a' }}",
    "* of lists": "{{ ([1] * 10**10) | length }}",
    "* of inner lists": "{% set x = [1, 2] * 99999 %}{% set y = [x] * 99999 %}{{ y }}",
    "**": "{{ 10**(10**10) }}",
    "* of numbers": "{% set x = 2**60000 %}" + "{% set x = x * x %}" * 60,
    "%": "{{ '%1000000000d' % 1 }}",
    "% *": "{{ '%*d' % (1000000000, 1) }}",
    "% names": "{% set x = 'a' * 4000000 %}{{ ('%(x)s' * 9999) % {'x': x} }}",
    "set block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "macro": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro of text": "{% macro m(n) %}" + "b" * 999
    + "{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "caller": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40 + "x" + "{% endcall %}" * 40,
    "list in list": "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 70 + "{{ x }}",
    "tuples compared": "{% set x = ('a', 'b') %}" + "{% set x = (x, x) %}" * 70 + "{{ x == x }}",
    "dict in dict": "{% set x = 'a' %}" + "{% set x = {'a': x, 'b': x} %}" * 70 + "{{ x | tojson }}",
    "dict()": "{% set x = 'a' %}" + "{% set x = dict(a=x, b=x) %}" * 70 + "{{ x }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center by map": "{{ ['a'] | map('center', 10**9) | list }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "indent by text": "{{ ('a\n' * 100000) | indent('x' * 100000) }}",
    "join": "{{ range(99999) | join('x' * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format inner": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "str.format many": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format by filter": "{{ ['%999999999s'] | map('format', 1) | list }}",
    "str.center": "{{ 'a'.center(10**9) }}",
    "str.zfill": "{{ 'a'.zfill(10**10) }}",
    "str.ljust": "{{ 'a'.ljust(10**10) }}",
    "str.join": "{{ ('x' * 99999).join(['y'] * 99999) }}",
    "str.replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "str.expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "str.translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "int.to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list | length }}",
    "batch in batch": "{{ range(99999) | batch(99998, 'x' * 99999) | list }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "tojson": "{{ [1] | tojson(indent=10**9) }}",
    "striptags": "{{ ('<!--x-->' * 400000) | striptags }}",
    "urlize": "{{ ('www.a.b ' * 400000) | urlize }}",
    "wordwrap": "{{ ('a b ' * 999999) | wordwrap(3) }}",
    "sum": "{{ ([[1] * 999] * 9999) | sum(start=[]) | length }}",
    "long list": "{% set n = namespace(x=[]) %}" + MANY + "{% set n.x = n.x + [i] %}{% endfor %}",
    "long text": "{% set n = namespace(x='') %}" + MANY + "{% set n.x = n.x ~ 'abcdefghijklmnop' %}{% endfor %}",
    "deep": "{% set n = namespace(x=[]) %}" + MANY + "{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "size": "{{ 1 }}" * 100_000,
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
}  # fmt: skip
REST = "{% for each in messages %}{{ each.content }}{% endfor %}"
SLOW = {"tuples compared", "wide ~", "loops", "filtered loops", "dict()", "list in list", "caller", "block", "macro",
        "long list", "long text", "deep", "str.format many", "dict in dict", "sum", "recursive loop", "size",
        "macro of text", "urlize", "striptags", "wordwrap"}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(COSTLY)]
)
def test_a_costly_template_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "SECONDS", 0.3)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    tokenizer = tokenizer_with([], COSTLY[name] + REST)
    tokenizer.name_or_path = "a/stranger"
    renderer = Renderer(tokenizer, DataConfig())
    with pytest.raises(TemplateCostsTooMuch, match=r"the chat template of a/stranger: it \w+"):
        renderer.render(CHAT)
    assert time.thread_time() - begun < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kB


def test_a_template_that_depends_on_the_row_ends_the_run() -> None:
    """Not a refused row: a million rows would each take as long."""
    template = "{% if 'grow' in messages[-1].content %}{{ 'a' * 10**10 }}{% endif %}" + REST
    renderer = Renderer(tokenizer_with([], template), DataConfig())
    assert renderer.render(CHAT).segments
    with pytest.raises(TemplateCostsTooMuch, match="one value of 10,000,000,000"):
        renderer.render(Conversation((CHAT.messages[0], Message("assistant", "grow"))))


ALL = [*templates.names(), *(name for name in NAMES if name not in templates.names())]
QUICK = {*templates.names(), "qwen3", "gptoss", "deepseekv3", "qwen2_5_training", "glm4moe"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_real_templates_write_what_transformers_writes(name: str) -> None:
    text = templates.source_of(name) if name in templates.names() else trl_template(name)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for seed in range(4):
        conversation = Conversations(seed).conversation()
        messages, tools = list(map(as_dict, conversation.messages)), list(conversation.tools) or None
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

        variables: Any = {"add_generation_prompt": seed % 3 == 0, "tools": tools, **special}
        theirs = _result(
            render_jinja_template, [messages], chat_template=text, return_assistant_tokens_mask=marked, **variables
        )
        ours = _result(
            template_sandbox.render,
            text,
            messages=messages,
            tools=tools,
            generation_prompt=seed % 3 == 0,
            variables=special,
        )
        if isinstance(theirs[0], list):
            theirs = theirs[0][0], tuple(theirs[1][0]) if marked else ours[1]
        assert ours == theirs


def _result(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    try:
        return function(*args, **settings)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3", "phi3", "deepseekv3", "qwen3", "glm4moe"])
@pytest.mark.parametrize("last", ["And so", " on and on ", "Hm.\n"])
@pytest.mark.filterwarnings("ignore")
def test_a_last_message_is_gone_on_with_as_transformers_has_it(name: str, last: str) -> None:
    text = trl_template(name)
    tokenizer = tokenizer_with([], text)
    turns = [{"role": "user", "content": "On?"}, {"role": "assistant", "content": last}]
    wanted = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert render_text(tokenizer, turns, continue_final_message=True) == wanted
    with pytest.raises(ModelError, match="does not write the last message"):
        render_text(tokenizer, turns, template="{{ messages[0].content }}", continue_final_message=True)
