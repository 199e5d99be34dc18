"""Every beginning of a conversation is rendered from where it differs, and comes out as if it were rendered whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from lowrank.data import templates
from lowrank.data.chat.loss_mask import THINKING
from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.template import Beginnings, ChatTemplate, Rendered, RowRefused
from lowrank.data.chat.template_budget import Budget
from lowrank.data.config import DataConfig
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_with, trl_template
from tests.data.test_any_template import NAMES, TOKENS, Conversations

SEARCHING = ("diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5")
"""Each of their turns goes through all that follow: one rendering is quadratic already."""
MAKERS = NAMES
SPELLED = "<|im_end|></s><start_of_turn> 你好 🙂"


def template_of(name: str) -> ChatTemplate:
    text = trl_template(name) if name in NAMES else templates.source_of(name)
    tokens = TOKENS.findall(text) if name in NAMES else [t for t in templates.required_tokens(text) if t != "none"]
    return ChatTemplate(text, tokenizer_with(sorted({*tokens, "<|im_end|>"} - {"</s>", "<s>"}), text), {})


def long_conversation(seed: int) -> Conversation:
    """Of several made-up ones, with thoughts in fields, and control tokens that somebody spelled."""
    draw, source = random.Random(seed), Conversations(seed)
    parts = [source.conversation() for _ in range(3)]
    messages = [message for part in parts for message in part.messages if message.role != "system"]
    if draw.random() < 0.5:
        messages.insert(0, Message("system", "ctx0q"))
    for place, message in enumerate(messages):
        if message.role == "assistant" and draw.random() < 0.3:
            messages[place] = replace(message, fields={"reasoning_content": source.unique_text("say")})
        elif message.role == "user" and seed % 3 == 0 and draw.random() < 0.3:
            messages[place] = replace(message, content=message.content + SPELLED)
    return Conversation(tuple(messages), parts[0].tools)


def outcome(render: Callable[..., Rendered], *args: Any, **options: Any) -> Rendered | str:
    try:
        return render(*args, **options)
    except RowRefused as error:
        return str(error)


def check(name: str, seeds: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(name)
    resumed = Beginnings._resumed
    done: list[bool] = []

    def counted(*args: Any) -> Any:
        done.append(False)
        result = resumed(*args)
        done[-1] = True
        return result

    monkeypatch.setattr(Beginnings, "_resumed", counted)
    rendered = 0
    for seed in seeds:
        conversation = long_conversation(seed)
        messages, tools = conversation.messages, conversation.tools
        beginnings = template.beginnings(messages, tools, len(messages) - 1)
        for length in range(1, len(messages) + 1):
            for prompt, variables in ((False, None), (True, None), (True, THINKING)):
                if prompt and length == len(messages):
                    continue
                options: dict[str, Any] = {"generation_prompt": prompt, "variables": variables}
                found = outcome(beginnings.render, length, **options)
                assert found == outcome(template.render, messages[:length], tools, **options)
                rendered += isinstance(found, Rendered)
    assert rendered
    assert sum(done) == rendered  # all in this way: none was rendered whole because something could not be followed


@pytest.mark.parametrize("name", [*templates.names(), *MAKERS])
def test_every_beginning_is_what_a_rendering_of_it_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, (0, 1), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*templates.names(), *MAKERS])
def test_every_beginning_of_many_is_what_a_rendering_of_it_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, range(2, 20), monkeypatch)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in SEARCHING and "_training" not in name])
def test_work_grows_with_the_conversation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the template and characters it makes: twice the rounds, about twice of both."""
    steps, characters = count_work(monkeypatch)
    text = trl_template(name)
    renderer = Renderer(tokenizer_with(sorted(set(TOKENS.findall(text))), text), DataConfig(max_length=10**7))
    worked = []
    for rounds in (10, 40, 80):
        turns = [Message(role, f"{role} {turn}q") for turn in range(rounds) for role in ("user", "assistant")]
        steps.clear()
        characters.clear()
        assert not isinstance(renderer._samples.of(Conversation(tuple(turns))), str)
        worked.append((sum(steps), sum(characters)))
    assert worked[2][0] < 2.2 * worked[1][0]
    assert worked[2][1] < 2.2 * worked[1][1]


def count_work(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    steps: list[int] = []
    characters: list[int] = []
    step, grew = Budget.step, Budget.grew

    def counted_step(self: Budget, number: int = 1) -> None:
        steps.append(number)
        step(self, number)

    def counted_growth(self: Budget, size: int) -> None:
        characters.append(size)
        grew(self, size)

    monkeypatch.setattr(Budget, "step", counted_step)
    monkeypatch.setattr(Budget, "grew", counted_growth)
    return steps, characters


TRICKS = {
    "an index that is only compared": """{% set ns = namespace(last=-1) %}{% for m in messages %}
        {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
        {%- if loop.index0 == ns.last %}*{% endif %}{% if loop.index0 + 3 >= ns.last %}!{% endif %}{{ m.content }}
{% endfor %}""",
    "an index that is written": """{% set n = messages | length %}{% for m in messages %}{{ n }}{{ m.content }}
        {%- endfor %}""",
    "the end, looked at from everywhere": """{% for m in messages %}{{ m.content }}{{ loop.revindex }}{% endfor %}""",
    "a look three turns ahead": """{% for m in messages %}{{ m.content }}
        {%- if messages[loop.index0 + 3] is defined %}{{ messages[loop.index0 + 3].role }}{% endif %}
{% endfor %}""",
    "a namespace by two names": """{% set a = namespace(n=0) %}{% set b = a %}{% for m in messages %}{{ a.n }}
        {%- set b.n = loop.length %}{% endfor %}""",
    "a namespace that grows": """{% set a = namespace(seen=[]) %}{% for m in messages %}
        {%- set a.seen = a.seen + [m.role] %}{{ a.seen | join }}{% endfor %}{{ a.seen | length }}""",
    "the last alone": """{% for m in messages %}{% if m == messages[-1] %}>{% endif %}{{ m.content }}{% endfor %}""",
    "an end in the midst": """{% for m in messages %}{{ m.content }}{% if loop.index > 5 %}{% break %}{% endif %}
        {%- endfor %}""",
    "two at once": """{% for m in messages[1:] %}{{ loop.previtem.content }}-{{ m.content }}
        {%- if not loop.last %},{% endif %}{% endfor %}""",
    "something else than before": """{% for m in messages %}{% if loop.changed(m.role) %}+{% endif %}{{ m.content }}
        {%- endfor %}""",
    "all of them in each": """{% for m in messages %}{{ messages | map(attribute='role') | join }}{{ m.content }}
        {%- endfor %}""",
    "a macro that reads": """{% set ns = namespace(n=0) %}{% macro more() %}{{ ns.n }}{% endmacro %}
        {%- for m in messages %}{% set ns.n = ns.n + 1 %}{{ more() }}{{ m.content }}{% endfor %}{{ ns.n }}""",
    "a search from behind": """{% set ns = namespace(going=true, last=0) %}{% for m in messages[::-1] %}
        {%- set place = messages | length - 1 - loop.index0 %}{% if ns.going and m.role == 'user' %}
        {%- set ns.going = false %}{% set ns.last = place %}{% endif %}{% endfor %}{% for m in messages %}
        {%- if loop.index0 < ns.last %}-{% endif %}{{ m.content }}{% endfor %}""",
    "a number that is also written": """{% set ns = namespace(n=messages | length) %}{% for m in messages %}
        {%- if loop.index0 < ns.n %}{{ ns['n'] }}{% endif %}{{ m.content }}{% endfor %}""",
}


@pytest.mark.parametrize("text", TRICKS.values(), ids=TRICKS)
def test_templates_that_look_elsewhere(text: str) -> None:
    template = ChatTemplate(text, tokenizer_with(["<|im_end|>"], text), {})
    messages = tuple(Message(role, f"{role} {turn}q") for turn in range(6) for role in ("user", "assistant"))
    beginnings = template.beginnings(messages, (), len(messages) - 1)
    for length in range(1, len(messages) + 1):
        assert outcome(beginnings.render, length) == outcome(template.render, messages[:length])
